"""`state check` finds what is wrong with a state directory, and notes what the next start heals."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from batch.stand import LIMITS, lines, result, started, upload
from omniserve.batch.check import check_state
from omniserve.batch.errors import StateError
from omniserve.batch.records import BatchRecord
from omniserve.batch.store import Store

Damage = Callable[[Path, BatchRecord], object]


@pytest.fixture
def batch(tmp_path: Path) -> BatchRecord:
    """The state is in tmp_path, closed: a batch of three lines, one good, one bad, one to run."""
    store = Store(tmp_path, limits=LIMITS)
    batch = started(store, lines(3))
    batch = store.batches.record(batch.seq, [result(batch, 1), result(batch, 2, 400)])
    upload(store, lines(1))
    store.close()
    return batch


def blob(root: Path, file_id: str) -> Path:
    return root / "files" / file_id


def sql(root: Path, statement: str) -> None:
    db = sqlite3.connect(root / "batches.sqlite")
    with db:
        db.execute(statement)
    db.close()


def test_a_whole_state_has_no_problems(tmp_path: Path, batch: BatchRecord) -> None:
    report = check_state(tmp_path)
    assert (report.problems, report.notes) == ([], [])
    assert (report.num_files, report.num_batches, report.num_open) == (2, 1, 1)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda root, b: blob(root, b.input_file_id).unlink(), "its input file-"),
        (lambda root, b: blob(root, b.input_file_id).write_bytes(b"x"), "holds 1 bytes"),
        (lambda root, b: blob(root, b.output_file_id).write_bytes(b""), "holds 0 bytes"),
        (lambda root, b: blob(root, b.output_file_id).write_bytes(b"x" * b.output_bytes), "no result"),
        (lambda root, b: sql(root, "DELETE FROM lines WHERE number = 1"), "1 of 2 lines are finished"),
        (lambda root, b: sql(root, "UPDATE batches SET failed = 2"), "results of 1 lines, 2 were counted"),
    ],
)
def test_each_kind_of_damage_is_named(tmp_path: Path, batch: BatchRecord, damage: Damage, said: str) -> None:
    damage(tmp_path, batch)
    assert said in " ".join(check_state(tmp_path).problems)


def test_what_a_start_puts_in_order_is_only_noted(tmp_path: Path, batch: BatchRecord) -> None:
    with blob(tmp_path, batch.output_file_id).open("ab") as results:
        results.write(b"half a li")
    (tmp_path / "incoming" / "file-x").write_bytes(b"")
    report = check_state(tmp_path)
    assert report.problems == []
    assert "9 bytes" in report.notes[0]
    assert "1 half uploads" in report.notes[1]
    Store(tmp_path, limits=LIMITS).close()
    assert check_state(tmp_path).notes == []


def test_a_database_that_is_no_longer_one_is_named(tmp_path: Path, batch: BatchRecord) -> None:
    path = tmp_path / "batches.sqlite"
    data = bytearray(path.read_bytes())
    data[4096 * 2 :] = b"\x55" * (len(data) - 4096 * 2)
    path.write_bytes(data)
    assert check_state(tmp_path).problems


def test_a_file_that_is_no_database_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "batches.sqlite").write_bytes(b"something else" * 1000)
    with pytest.raises(StateError, match="damaged"):
        check_state(tmp_path)


def test_folders_that_are_gone_are_missed_by_their_files(tmp_path: Path, batch: BatchRecord) -> None:
    for name in ("files", "incoming"):
        shutil.rmtree(tmp_path / name)
    problems = " ".join(check_state(tmp_path).problems)
    assert f"file {batch.input_file_id} is gone" in problems


def test_a_state_in_use_and_no_state_at_all_are_refused(tmp_path: Path, batch: BatchRecord) -> None:
    store = Store(tmp_path, limits=LIMITS)
    with pytest.raises(StateError, match="in use"):
        check_state(tmp_path)
    store.close()
    with pytest.raises(StateError, match="holds no batches"):
        check_state(tmp_path / "elsewhere")


def everything(root: Path) -> dict[str, tuple[int, int, bytes]]:
    """Mode, time of change and bytes of all that lies there but a log's index, and of the directory."""
    return {
        str(path): (
            path.stat().st_mode,
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in (root, *sorted(root.rglob("*")))
        if not path.name.endswith("-shm")
    }


def test_a_check_of_a_closed_state_and_of_a_copy_changes_nothing(tmp_path: Path, batch: BatchRecord) -> None:
    (tmp_path / "lock").unlink()
    tmp_path.chmod(0o755)
    before = everything(tmp_path)
    assert check_state(tmp_path).problems == []
    assert everything(tmp_path) == before


def test_a_check_reads_the_log_of_a_killed_server_and_leaves_it(tmp_path: Path) -> None:
    source, copy = tmp_path / "state", tmp_path / "killed"
    store = Store(source, limits=LIMITS)
    upload(store, lines(1))
    shutil.copytree(source, copy)  # as kill -9 leaves it: its log not written back
    store.close()
    before = everything(copy)
    assert (copy / "batches.sqlite-wal").stat().st_size > 0
    assert (check_state(copy).problems, check_state(copy).num_files) == ([], 1)
    assert everything(copy) == before
