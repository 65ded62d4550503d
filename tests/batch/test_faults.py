"""A full or failing disk: the caller is told, nothing is corrupt, and it goes on when the disk is well."""

from __future__ import annotations

import errno
import os
import resource
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from batch.stand import (
    LIMITS,
    OWNER,
    Clock,
    blobs,
    content,
    create,
    custom_ids,
    lines,
    new_batch,
    result,
    started,
    upload,
    validate,
)
from omniserve.batch.errors import NoDescriptorError, StateError, StorageError
from omniserve.batch.files import Disk
from omniserve.batch.limits import Limits, Quota
from omniserve.batch.schema import MIGRATIONS
from omniserve.batch.states import Event, Status
from omniserve.batch.store import Store

MIB = 1024**2
FULL, BROKEN = OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "Input/output error")


class FaultyDisk(Disk):
    """Works until told which call fails, and after how many bytes of a write."""

    def __init__(self) -> None:
        self.failure: OSError | None = None
        self.failing = ""
        self.calls: list[str] = []
        self.free = 1 << 40

    def fail(self, call: str, error: OSError) -> None:
        self.failing, self.failure = call, error

    def heal(self) -> None:
        self.failure = None

    def _called(self, call: str) -> None:
        self.calls.append(call)
        if self.failure is not None and call == self.failing:
            raise self.failure

    def write(self, descriptor: int, data: bytes, offset: int) -> None:
        if self.failure is not None and self.failing == "write":
            super().write(descriptor, data[: len(data) // 2], offset)  # as a disk that fills up does
        self._called("write")
        super().write(descriptor, data, offset)

    def sync(self, descriptor: int) -> None:
        self._called("sync")
        super().sync(descriptor)

    def sync_folder(self, folder: Path) -> None:
        self._called("sync_folder")
        super().sync_folder(folder)

    def free_bytes(self, folder: Path) -> int:
        return self.free


class Faults:
    """A hook that fails once at a write boundary, as SQLite's own writes would."""

    def __init__(self) -> None:
        self.point, self.error = "", FULL
        self.passed: list[str] = []

    def __call__(self, point: str) -> None:
        self.passed.append(point)
        if point == self.point:
            self.point = ""
            raise self.error


@pytest.fixture
def disk() -> FaultyDisk:
    return FaultyDisk()


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def store(tmp_path: Path, disk: FaultyDisk, faults: Faults) -> Iterator[Store]:
    store = Store(tmp_path, limits=LIMITS, now=Clock(), disk=disk, at=faults)
    yield store
    store.close()


@pytest.mark.parametrize("call", ["write", "sync", "sync_folder"])
@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE])
def test_too_many_open_files_are_not_taken_for_a_failing_disk(
    store: Store, disk: FaultyDisk, tmp_path: Path, call: str, code: int
) -> None:
    kept = upload(store, lines(3))
    batch = validate(store, store.batches.create(OWNER, new_batch(kept), Quota()))
    connection = store._database.db
    disk.fail(call, OSError(code, "Too many open files"))
    for attempt in (
        lambda: upload(store, lines(1)),
        lambda: store.batches.record(batch.seq, [result(batch, 1)]),
    ):
        with pytest.raises(NoDescriptorError, match="ulimit -n"):
            attempt()
    assert store._database.db is connection, "nothing was opened anew"
    disk.heal()
    assert {path.name for path in (tmp_path / "incoming").iterdir()} == set()
    assert blobs(tmp_path) <= {kept.id, batch.output_file_id}
    finish(store, batch.seq)


def test_what_cannot_be_opened_for_want_of_descriptors_is_told_so(store: Store) -> None:
    file = upload(store, lines(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        with pytest.raises(NoDescriptorError):
            store.files.open(OWNER, file.id)
        store._database._break()
        with pytest.raises(NoDescriptorError):
            store.files.get(OWNER, file.id)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert store.files.get(OWNER, file.id) == file


def test_the_name_of_a_new_state_directory_is_synced(tmp_path: Path) -> None:
    synced = list[Path]()

    class Noting(Disk):
        def sync_folder(self, folder: Path) -> None:
            synced.append(folder)
            super().sync_folder(folder)

    root = tmp_path / "new" / "state"
    for _ in range(2):
        Store(root, limits=LIMITS, disk=Noting()).close()
    first = synced.index(root)
    assert set(synced[:first]) == {tmp_path / "new", tmp_path}
    assert tmp_path / "new" in synced[first:], "the first start may have been killed before it"


@pytest.mark.parametrize("call", ["write", "sync", "sync_folder"])
@pytest.mark.parametrize(("error", "is_full"), [(FULL, True), (BROKEN, False)])
def test_an_upload_that_the_disk_does_not_take_is_refused(
    store: Store, disk: FaultyDisk, tmp_path: Path, call: str, error: OSError, is_full: bool
) -> None:
    kept = upload(store, lines(1))
    disk.fail(call, error)
    with pytest.raises(StorageError) as refusal:
        upload(store, lines(20))
    assert refusal.value.is_full is is_full
    disk.heal()
    assert store.files.page(OWNER, None, None, 10, True) == ([kept], False)
    assert blobs(tmp_path) == {kept.id}
    assert custom_ids(content(store, upload(store, lines(3)).id)) == ["line-1", "line-2", "line-3"]


def test_accepted_means_synced_in_the_right_order(store: Store, disk: FaultyDisk, faults: Faults) -> None:
    disk.calls.clear()
    upload(store, lines(1))
    assert disk.calls == ["write", "sync", "sync_folder"]  # the bytes, then their place, then the row
    assert faults.passed == ["migrate.changed"] * len(MIGRATIONS) + [
        "upload.written",
        "upload.synced",
        "upload.placed",
        "upload.accepted",
    ]
    assert store._database.db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert store._database.db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL: commits are synced


@pytest.mark.parametrize("call", ["write", "sync", "sync_folder"])
@pytest.mark.parametrize("error", [FULL, BROKEN])
def test_results_that_the_disk_does_not_take_do_not_count_and_can_be_recorded_later(
    store: Store, disk: FaultyDisk, call: str, error: OSError
) -> None:
    batch = started(store, lines(3))
    if call != "sync_folder":  # which only a file's first result needs
        store.batches.record(batch.seq, [result(batch, 1)])
    expected = store.batches.get(OWNER, batch.id)
    disk.fail(call, error)
    for _ in range(2):
        with pytest.raises(StorageError):
            store.batches.record(batch.seq, [result(batch, 1), result(batch, 2)])
    disk.heal()
    assert store.batches.get(OWNER, batch.id) == expected
    finish(store, batch.seq)


def finish(store: Store, seq: int) -> None:
    """Record everything and look at the output."""
    (batch,) = store.batches.open_batches()
    store.batches.record(seq, [result(batch, number) for number in (2, 3, 1)])
    store.batches.step(seq, Event.FINISH)
    batch = store.batches.settle(seq)
    assert sorted(custom_ids(content(store, batch.output_file_id))) == ["line-1", "line-2", "line-3"]


@pytest.mark.parametrize("point", ["record.output_synced", "record.committing", "record.committed"])
def test_a_failing_commit_leaves_results_whole_or_out(store: Store, faults: Faults, point: str) -> None:
    batch = started(store, lines(3))
    faults.point = point
    with pytest.raises((StorageError, OSError)):
        store.batches.record(batch.seq, [result(batch, 1)])
    assert store.batches.get(OWNER, batch.id).completed == (1 if point == "record.committed" else 0)
    finish(store, batch.seq)


def test_a_failing_commit_does_not_end_a_batch_half(store: Store, faults: Faults) -> None:
    batch = started(store, lines(1))
    store.batches.record(batch.seq, [result(batch, 1)])
    store.batches.step(batch.seq, Event.FINISH)
    faults.point = "settle.committing"
    with pytest.raises(StorageError):
        store.batches.settle(batch.seq)
    assert store.files.page(OWNER, "batch_output", None, 10, True) == ([], False)
    batch = store.batches.settle(batch.seq)
    assert custom_ids(content(store, batch.output_file_id)) == ["line-1"]


def test_a_database_that_cannot_grow_refuses_and_stays_whole(store: Store) -> None:
    file = upload(store, lines(5000))
    batch = store.batches.create(OWNER, new_batch(file), Quota())
    pages = store._database.db.execute("PRAGMA page_count").fetchone()[0]
    store._database.db.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(StorageError) as refusal:
        validate(store, batch)
    assert refusal.value.is_full
    assert validate(store, batch).total == 5000  # opened anew, without the bound


def test_the_last_bytes_of_a_disk_are_kept_for_results(tmp_path: Path, disk: FaultyDisk) -> None:
    store = Store(tmp_path, limits=Limits(reserve_bytes=1000), disk=disk)
    batch = started(store, lines(2))
    disk.free = 999
    with pytest.raises(StorageError, match="999 bytes left, 1000 are kept"):
        upload(store, lines(1))
    with pytest.raises(StorageError):
        store.batches.pending(batch.seq, 0, 10)
    assert store.batches.record(batch.seq, [result(batch, 1)]).completed == 1
    store.close()


def test_an_upload_does_not_grow_into_what_is_kept_for_results(tmp_path: Path) -> None:
    class Filling(FaultyDisk):
        """Has less and less."""

        num_looks = 0

        def write(self, descriptor: int, data: bytes, offset: int) -> None:
            super().write(descriptor, data, offset)
            self.free -= len(data)

        def free_bytes(self, folder: Path) -> int:
            self.num_looks += 1
            return super().free_bytes(folder)

    disk = Filling()
    store = Store(tmp_path, limits=Limits(reserve_bytes=10 * MIB), disk=disk)
    disk.free = 14 * MIB
    disk.num_looks = 0
    with pytest.raises(StorageError, match="are kept for results"):
        upload(store, b"x" * (8 * MIB))
    assert disk.free >= 10 * MIB
    assert disk.num_looks <= 1 + 5, "at the beginning, and once for each MiB"
    assert blobs(tmp_path) == set()
    store.close()


@pytest.mark.parametrize("damage", ["input", "output"])
def test_damage_from_outside_fails_one_batch_and_keeps_the_rest(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path, limits=LIMITS)
    hurt, whole = started(store, lines(3)), started(store, lines(1))
    store.batches.record(hurt.seq, [result(hurt, 1)])
    hurt = store.batches.record(hurt.seq, [result(hurt, 2)])
    store.close()
    path = tmp_path / "files" / (hurt.input_file_id if damage == "input" else hurt.output_file_id)
    first_line = path.read_bytes().partition(b"\n")[0] + b"\n"
    if damage == "input":
        path.unlink()
    else:
        path.write_bytes(first_line)
    store = Store(tmp_path, limits=LIMITS)
    hurt = store.batches.get(OWNER, hurt.id)
    assert (hurt.status, hurt.errors[0].code) == (Status.FAILED, "state_damaged")
    left = ["line-1", "line-2"] if damage == "input" else ["line-1"]
    assert custom_ids(content(store, hurt.output_file_id)) == left
    assert store.batches.get(OWNER, whole.id).status is Status.IN_PROGRESS
    store.close()


def test_bytes_that_nobody_accepted_are_removed_when_the_store_opens(tmp_path: Path) -> None:
    store = Store(tmp_path, limits=LIMITS)
    file = upload(store, lines(1))
    store.close()
    (tmp_path / "files" / ("file-" + "0" * 32)).write_bytes(b"placed, not accepted")
    (tmp_path / "incoming" / ("file-" + "1" * 32)).write_bytes(b"half an upload")
    Store(tmp_path, limits=LIMITS).close()
    assert blobs(tmp_path) == {file.id}


def test_a_store_of_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    store = Store(tmp_path, limits=LIMITS)
    create(store, lines(1))
    store.close()
    path = tmp_path / "batches.sqlite"
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    db.close()
    before = path.read_bytes()
    with pytest.raises(StateError, match="use the release that wrote it"):
        Store(tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("version", range(1, len(MIGRATIONS)))
def test_a_store_of_an_older_version_is_brought_up_to_date_with_everything_in_it(
    tmp_path: Path, version: int
) -> None:
    write_older_version(tmp_path, version)
    store = Store(tmp_path, limits=LIMITS, now=Clock())
    assert store._database.db.execute("PRAGMA user_version").fetchone()[0] == len(MIGRATIONS)
    ended, running = (store.batches.get(OWNER, f"batch_{name}") for name in ("ended", "running"))
    assert (ended.status, ended.ended_at, running.ended_at) == (Status.CANCELLED, 50, None)
    assert [batch.id for batch in store.batches.open_batches()] == ["batch_running"]
    assert [line.num_deaths for line in store.batches.unfinished(running.seq, 0, 9)] == [0, 0, 0]
    store.batches.note_death(running.seq, 2)
    assert [line.num_deaths for line in store.batches.unfinished(running.seq, 0, 9)] == [0, 1, 0]
    finish(store, running.seq)
    store.close()


def test_a_migration_that_is_interrupted_happened_wholly_or_not_at_all(
    tmp_path: Path, faults: Faults
) -> None:
    write_older_version(tmp_path, 1)
    faults.point, faults.error = "migrate.changed", BROKEN
    with pytest.raises(StorageError):
        Store(tmp_path, limits=LIMITS, at=faults)
    with sqlite3.connect(tmp_path / "batches.sqlite") as db:
        assert db.execute("PRAGMA user_version").fetchone()[0] == 1
        assert "ended_at" not in {row[1] for row in db.execute("PRAGMA table_info(batches)")}
    db.close()
    Store(tmp_path, limits=LIMITS).close()


def write_older_version(root: Path, version: int) -> None:
    """As that version left it: one batch that was cancelled, one under way with three lines."""
    data, input_id = lines(3), "file-" + "a" * 32
    (root / "files").mkdir()
    (root / "files" / input_id).write_bytes(data)
    db = sqlite3.connect(root / "batches.sqlite")
    for migration in MIGRATIONS[:version]:
        db.executescript(migration)
    db.execute(f"PRAGMA user_version = {version}")
    values = "'/v1/chat/completions', ?, '24h', 2000000000, ?, ?, 1, ?, ?, ?"
    columns = (
        "endpoint, input_file_id, completion_window, expires_at, output_file_id, error_file_id, created_at"
    )
    insert = (
        f"INSERT INTO batches (id, owner, {columns}, status, total, cancelled_at) VALUES (?, ?, {values})"
    )
    for name, digit, status, total, cancelled_at in (
        ("ended", "b", "cancelled", 0, 50),
        ("running", "c", "in_progress", 3, None),
    ):
        ids = (input_id, "file-0" + digit * 31, "file-1" + digit * 31)
        db.execute(insert, (f"batch_{name}", OWNER, *ids, status, total, cancelled_at))
    offset = 0
    for number, raw in enumerate(data.splitlines(keepends=True), 1):
        db.execute("INSERT INTO lines VALUES (2, ?, ?, ?, 0)", (number, offset, len(raw)))
        offset += len(raw)
    db.execute(
        "INSERT INTO files (id, owner, filename, purpose, bytes, created_at, expires_at) "
        "VALUES (?, ?, 'in.jsonl', 'batch', ?, 1, 2000000000)",
        (input_id, OWNER, len(data)),
    )
    if version >= 2:
        db.execute("UPDATE batches SET ended_at = cancelled_at")
    db.commit()
    db.close()
