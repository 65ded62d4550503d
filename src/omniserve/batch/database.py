"""The state directory: one writer at a time, one database, and what happens when the disk fails under it."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from omniserve.batch.errors import NoDescriptorError, StateError, storage_error
from omniserve.batch.schema import connect

DATABASE_NAME, LOCK_NAME = "batches.sqlite", "lock"
# Called with the name of a write boundary each time one is passed; tests end the process there.
At = Callable[[str], None]


def lock_folder(root: Path, sync_folder: Callable[[Path], None]) -> int:
    """Make the directory if need be (0700) and take its lock; returns the descriptor that holds it.

    The kernel gives the lock up when its process ends, however it ends. StateError: another process has it,
    or the directory cannot be used.
    """
    try:
        _make_folder(root, sync_folder)
        if stat.S_IMODE(root.stat().st_mode) != 0o700:
            root.chmod(0o700)
        descriptor = os.open(root / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateError(
            f"--state-dir {root} cannot be used: {error}; name a directory that is this user's own, "
            "or one that can be made"
        ) from error
    _take_lock(descriptor, fcntl.LOCK_EX, root)
    return descriptor


def _make_folder(root: Path, sync_folder: Callable[[Path], None]) -> None:
    """Its name lasts when this returns, and so do those of its parents that were not there."""
    holders = {path.parent for path in (root, *root.parents) if not path.exists()}
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    # The last one also where it is there: whoever made it may have been killed before it was synced.
    for holder in sorted(holders | {root.parent}, reverse=True):
        with suppress(PermissionError):  # a folder that may be written and not read cannot be synced
            sync_folder(holder)


def _take_lock(descriptor: int, kind: int, root: Path) -> None:
    """StateError, and the descriptor closed, when another process has it."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StateError(
            f"{root} is in use by another process; stop it first, or use another --state-dir"
        ) from None


@contextmanager
def unused(root: Path) -> Iterator[None]:
    """No process writes in the directory meanwhile. Changes nothing; StateError as of `lock_folder`.

    A directory without a lock, as a copy is, was never opened.
    """
    descriptor: int | None = None
    try:
        with suppress(FileNotFoundError):
            descriptor = os.open(root / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StateError(f"{root} cannot be read: {error}; be the user of the server") from error
    if descriptor is not None:
        _take_lock(descriptor, fcntl.LOCK_SH, root)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


class Database:
    """The connection. A failed write breaks it; the next use opens it anew and sees what truly is on disk.

    After a failed sync nobody knows what the disk holds, so nothing in memory is trusted then: SQLite
    recovers its log, and `on_open` brings the files in line with what the database says.
    """

    def __init__(
        self, root: Path, at: At, on_open: Callable[[], None], sync_folder: Callable[[Path], None]
    ) -> None:
        self.root, self.at = root, at
        self._path, self._on_open = root / DATABASE_NAME, on_open
        self._lock = lock_folder(root, sync_folder)
        self._db: sqlite3.Connection | None = None

    def open(self) -> None:
        """Does nothing when it is open and whole."""
        if self._db is None:
            with self.disk():
                self._db = connect(self._path, self.at)
                try:
                    self._on_open()
                except BaseException:
                    self._break()
                    raise

    @property
    def db(self) -> sqlite3.Connection:
        """For reading."""
        self.open()
        assert self._db is not None
        return self._db

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction, synced when the block is left. StorageError: nothing of it counts."""
        db = self.db
        with self.disk():
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    @contextmanager
    def disk(self) -> Iterator[None]:
        """Whatever writes to the state directory: conditions of the disk come out as StorageError."""
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            condition = storage_error(error)
            if condition is None:
                raise
            # Without descriptors nothing could be opened anew; and what failed is an opening, not a write.
            if not isinstance(condition, NoDescriptorError):
                self._break()
            raise condition from error

    def _break(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            with suppress(sqlite3.Error):  # the disk fails; the next opening tells whether it still does
                db.close()

    def close(self) -> None:
        """May be called more than once."""
        self._break()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
