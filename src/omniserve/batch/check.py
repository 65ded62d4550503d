"""`omniserve state check`: does a state directory hold what its database says? Only reads."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from omniserve.batch.database import DATABASE_NAME, unused
from omniserve.batch.errors import StateError
from omniserve.batch.file_store import OPEN
from omniserve.batch.schema import MIGRATIONS, refuse_newer, version_of


@dataclass(slots=True)
class Report:
    """problems: what is lost or wrong. notes: what the next start of the server puts in order by itself."""

    version: int
    num_files: int = 0
    num_batches: int = 0
    num_open: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_state(root: Path) -> Report:
    """StateError when there is no state, it cannot be read, a server uses it, or it is of a newer version."""
    path = root / DATABASE_NAME
    if not path.is_file():
        raise StateError(f"{root} holds no {DATABASE_NAME}; name the --state-dir that the server was given")
    with unused(root):
        try:
            db = _opened(path)
            try:
                refuse_newer(db, path)
                return _check(db, root)
            finally:
                db.close()
        except (PermissionError, sqlite3.OperationalError) as error:
            raise StateError(
                f"{root} cannot be read: {error}; be the user of the server, or restore a backup"
            ) from error


def _opened(path: Path) -> sqlite3.Connection:
    """For reading, without the log being written back.

    SQLite makes the index of a log (`-shm`) anew, as it must to read one. Where there is no log it is told
    that nothing changes, or it would begin one.
    """
    log = path.with_name(path.name + "-wal")
    has_log = log.exists() and log.stat().st_size > 0
    how = "mode=ro" if has_log else "mode=ro&immutable=1"
    db = sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True, isolation_level=None)
    db.row_factory = sqlite3.Row
    return db


def _check(db: sqlite3.Connection, root: Path) -> Report:
    report = Report(version_of(db))
    try:
        found = [row[0] for row in db.execute("PRAGMA integrity_check")]
    except sqlite3.DatabaseError as error:
        found = [str(error)]
    if found != ["ok"]:
        report.problems += [f"{DATABASE_NAME}: {one}" for one in found]
        return report
    if report.version < len(MIGRATIONS):
        report.notes.append(
            f"version {report.version} will be brought to {len(MIGRATIONS)}; check again then"
        )
        return report
    report.num_files, report.num_batches, report.num_open = (
        db.execute(f"SELECT count(*) FROM {what}").fetchone()[0]
        for what in ("files", "batches", f"batches WHERE {OPEN}")
    )
    known = _check_files(db, root, report)
    for batch in db.execute(f"SELECT * FROM batches WHERE {OPEN} ORDER BY seq"):
        known |= {batch["output_file_id"], batch["error_file_id"]}
        _check_batch(db, root, batch, report)
    _check_strays(root, known, report)
    return report


def _check_files(db: sqlite3.Connection, root: Path, report: Report) -> set[str]:
    known = set()
    for file in db.execute("SELECT id, bytes FROM files"):
        known.add(file["id"])
        size = _size(root, file["id"])
        if size != file["bytes"]:
            there = "is gone" if size is None else f"holds {size} bytes"
            report.problems.append(f"file {file['id']} {there}, {file['bytes']} were accepted")
    return known


def _check_batch(db: sqlite3.Connection, root: Path, batch: sqlite3.Row, report: Report) -> None:
    name = f"batch {batch['id']}"
    if _size(root, batch["input_file_id"]) is None:
        report.problems.append(f"{name}: its input {batch['input_file_id']} is gone")
    if batch["status"] == "validating":
        return
    num_lines, num_finished = db.execute(
        "SELECT count(*), coalesce(sum(is_finished), 0) FROM lines WHERE batch = ?", (batch["seq"],)
    ).fetchone()
    if (num_lines, num_finished) != (batch["total"], batch["completed"] + batch["failed"]):
        report.problems.append(
            f"{name}: {num_finished} of {num_lines} lines are finished, "
            f"{batch['completed']} + {batch['failed']} of {batch['total']} were counted"
        )
    _check_results(root, name, batch["output_file_id"], batch["output_bytes"], batch["completed"], report)
    _check_results(root, name, batch["error_file_id"], batch["error_bytes"], batch["failed"], report)


def _check_results(root: Path, name: str, file_id: str, num_bytes: int, count: int, report: Report) -> None:
    """As many whole result lines as were counted, each of another line."""
    size = _size(root, file_id) or 0
    if size < num_bytes:
        report.problems.append(f"{name}: {file_id} holds {size} bytes, {num_bytes} were recorded")
        return
    if size > num_bytes:
        report.notes.append(f"{name}: {size - num_bytes} bytes of {file_id} were never recorded and will go")
    seen = set()
    try:
        for raw in _result_lines(root / "files" / file_id, num_bytes):
            seen.add(json.loads(raw)["id"])
    except (ValueError, KeyError, TypeError) as error:
        report.problems.append(f"{name}: {file_id} holds a line that is no result: {error!r}")
        return
    if len(seen) != count:
        report.problems.append(f"{name}: {file_id} holds results of {len(seen)} lines, {count} were counted")


def _result_lines(path: Path, num_bytes: int) -> Iterator[bytes]:
    if num_bytes:
        with path.open("rb") as source:
            while source.tell() < num_bytes:
                yield source.readline(num_bytes - source.tell())


def _check_strays(root: Path, known: set[str], report: Report) -> None:
    strays, half = _names_in(root / "files") - known, _names_in(root / "incoming")
    if strays or half:
        report.notes.append(
            f"{len(strays)} files that nobody knows and {len(half)} half uploads will be removed"
        )


def _names_in(folder: Path) -> set[str]:
    """None where the folder is gone, which the next start makes anew; what was in it is missed by name."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _size(root: Path, file_id: str) -> int | None:
    try:
        return (root / "files" / file_id).stat().st_size
    except FileNotFoundError:
        return None
