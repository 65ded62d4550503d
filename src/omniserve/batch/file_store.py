"""Files of owners: accepted when their bytes, their place and their row are synced, in this order."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from omniserve.batch.database import Database
from omniserve.batch.errors import (
    ConflictError,
    NoDescriptorError,
    NotFoundError,
    QuotaError,
    StorageError,
    TooLargeError,
    storage_error,
)
from omniserve.batch.files import Blobs, Disk, Incoming
from omniserve.batch.limits import MAX_FILENAME, Limits, Quota
from omniserve.batch.records import FileRecord
from omniserve.errors import RequestError

_COLUMNS = "seq, id, owner, filename, purpose, bytes, created_at, expires_at"
# Batches that still need their input and whose results are not files yet.
OPEN = "ended_at IS NULL"
# Room for an upload under way is looked for once in so many of its bytes.
LOOK_BYTES = 1024**2


@dataclass(frozen=True, slots=True)
class _UnderWay:
    incoming: Incoming
    owner: str
    quota: Quota


class FileStore:
    """Every call blocks and runs on the writer's thread."""

    def __init__(
        self, database: Database, blobs: Blobs, disk: Disk, limits: Limits, now: Callable[[], float]
    ) -> None:
        self._database, self._blobs, self._disk = database, blobs, disk
        self._limits, self._now = limits, now
        self._under_way: list[_UnderWay] = []

    def check_room(self, num_bytes: int = 0) -> None:
        """StorageError where so little of the disk would be free that the rest is kept for results under
        way."""
        free = self._disk.free_bytes(self._database.root)
        if free - num_bytes < self._limits.reserve_bytes:
            raise StorageError(
                f"the disk of the state directory has {free} bytes left, {self._limits.reserve_bytes} are "
                "kept for results; free space or delete files",
                is_full=True,
            )

    def begin(self, owner: str, quota: Quota) -> Incoming:
        """An upload that may grow with `write`; nothing is promised before `accept`."""
        self.check_room()
        self._check_quota(owner, quota, self._num_under_way(owner) + 1)
        with self._database.disk():
            incoming = self._blobs.begin()
        self._under_way.append(_UnderWay(incoming, owner, quota))
        return incoming

    def write(self, incoming: Incoming, data: bytes) -> None:
        """StorageError, TooLargeError or QuotaError: give the upload up with `Incoming.close`."""
        size = incoming.num_bytes + len(data)
        if size > self._limits.max_file_bytes:
            raise TooLargeError("file", f"is larger than {self._limits.max_file_bytes} bytes; split it")
        if incoming.num_bytes // LOOK_BYTES != size // LOOK_BYTES:
            self._check_growth(incoming, len(data))
        with self._database.disk():
            incoming.write(data)

    def _check_growth(self, incoming: Incoming, num_bytes: int) -> None:
        self.check_room(num_bytes)
        for one in self._under_way:
            if one.incoming is incoming:
                self._check_quota(one.owner, one.quota, self._num_under_way(one.owner) + num_bytes)

    def _num_under_way(self, owner: str) -> int:
        """Bytes of an owner's uploads that are not files yet."""
        self._under_way = [one for one in self._under_way if one.incoming.is_open]
        return sum(one.incoming.num_bytes for one in self._under_way if one.owner == owner)

    def accept(
        self, incoming: Incoming, owner: str, filename: str, life_s: int | None, quota: Quota
    ) -> FileRecord:
        """Make an upload a file of `owner`. Once this returns it is on disk, whatever happens.

        Other uploads under way do not count against it: who is first has the place.
        """
        at, now = self._database.at, int(self._now())
        self._check_quota(owner, quota, incoming.num_bytes)
        at("upload.written")
        with self._database.disk():
            self._disk.sync(incoming.descriptor)
            at("upload.synced")
            self._blobs.keep(incoming)
        at("upload.placed")
        expires_at = now + (life_s or quota.retention_s or self._limits.retention_s)
        row = (incoming.file_id, owner, clean_name(filename), "batch", incoming.num_bytes, now, expires_at)
        with self._database.writing() as db:
            seq = insert_file(db, row)
        at("upload.accepted")
        self._under_way = [one for one in self._under_way if one.incoming is not incoming]
        return FileRecord(seq, *row)

    def _check_quota(self, owner: str, quota: Quota, num_bytes: int) -> None:
        """QuotaError where so many bytes beside the owner's files would be too many."""
        db = self._database.db
        query = "SELECT coalesce(sum(bytes), 0), count(*) FROM files WHERE owner = ?"
        used, count = db.execute(query, (owner,)).fetchone()
        if count >= quota.max_files:
            raise QuotaError(
                "file", f"this key keeps {count} files of at most {quota.max_files}; delete some first"
            )
        used += db.execute(
            f"SELECT coalesce(sum(output_bytes + error_bytes), 0) FROM batches WHERE owner = ? AND {OPEN}",
            (owner,),
        ).fetchone()[0]
        if used + num_bytes > quota.max_bytes:
            raise QuotaError(
                "file",
                f"files of this key hold {used} bytes of at most {quota.max_bytes}, and {num_bytes} more "
                "would come; delete some first",
            )

    def get(self, owner: str, file_id: str) -> FileRecord:
        """NotFoundError also for a file that has expired and was not removed yet."""
        query = f"SELECT {_COLUMNS} FROM files WHERE id = ? AND owner = ? AND expires_at > ?"
        row = self._database.db.execute(query, (file_id, owner, int(self._now()))).fetchone()
        if row is None:
            raise NotFoundError("file_id", f"no file {file_id[:80]!r}; GET /v1/files lists yours")
        return FileRecord(*row)

    def page(
        self, owner: str, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[FileRecord], bool]:
        """A page of an owner's files behind `after`, and whether there are more."""
        where, values = "owner = ? AND expires_at > ?", [owner, int(self._now())]
        if purpose is not None:
            where, values = where + " AND purpose = ?", [*values, purpose]
        if after is not None:
            where += f" AND seq {'<' if newest_first else '>'} ?"
            values.append(self._seq_of(owner, after))
        order = "DESC" if newest_first else "ASC"
        query = f"SELECT {_COLUMNS} FROM files WHERE {where} ORDER BY seq {order} LIMIT ?"
        rows = self._database.db.execute(query, (*values, limit + 1)).fetchall()
        return [FileRecord(*row) for row in rows[:limit]], len(rows) > limit

    def _seq_of(self, owner: str, file_id: str) -> int:
        row = self._database.db.execute(
            "SELECT seq FROM files WHERE id = ? AND owner = ?", (file_id, owner)
        ).fetchone()
        if row is None:
            raise RequestError("after", f"no file {file_id[:80]!r} to go on from")
        return int(row[0])

    def open(self, owner: str, file_id: str) -> tuple[FileRecord, BinaryIO]:
        """A file to read; it stays readable although it is deleted meanwhile. The caller closes it."""
        file = self.get(owner, file_id)
        try:
            return file, self._blobs.open(file_id)
        except OSError as error:
            condition = storage_error(error)
            if isinstance(condition, NoDescriptorError):
                raise condition from error
            raise

    def delete(self, owner: str, file_id: str) -> None:
        """Gone once this returns. ConflictError while a batch that has not ended reads it."""
        self.get(owner, file_id)
        with self._database.writing() as db:
            user = db.execute(
                f"SELECT id FROM batches WHERE input_file_id = ? AND {OPEN}", (file_id,)
            ).fetchone()
            if user is not None:
                raise ConflictError("file_id", f"is the input of {user[0]}; cancel that batch first")
            db.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self._database.at("delete.committed")
        self._remove(file_id)

    def _remove(self, file_id: str) -> None:
        with self._database.disk():
            self._blobs.remove(file_id)
        self._database.at("delete.removed")

    def sweep(self) -> int:
        """Remove files past their time, but no input of a batch that has not ended; returns how many."""
        now = int(self._now())
        with self._database.writing() as db:
            ids = [
                row[0]
                for row in db.execute(
                    "SELECT id FROM files WHERE expires_at <= ? AND id NOT IN "
                    f"(SELECT input_file_id FROM batches WHERE {OPEN})",
                    (now,),
                )
            ]
            db.executemany("DELETE FROM files WHERE id = ?", [(file_id,) for file_id in ids])
        for file_id in ids:
            self._remove(file_id)
        return len(ids)


def insert_file(db: sqlite3.Connection, row: tuple[str, str, str, str, int, int, int | None]) -> int:
    """All columns of FileRecord but the first, which it returns."""
    columns = _COLUMNS.removeprefix("seq, ")
    cursor = db.execute(f"INSERT INTO files ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def clean_name(filename: str) -> str:
    """What a client called its file, to show it again; nothing is ever opened by this name."""
    shown = "".join(c for c in filename if c.isprintable())
    return shown[:MAX_FILENAME] or "upload.jsonl"
