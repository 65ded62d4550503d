"""The store: files and batches of all owners in one state directory. Its promises: docs/batches.md."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from omniserve.batch.batch_store import BatchStore
from omniserve.batch.database import At, Database
from omniserve.batch.file_store import FileStore
from omniserve.batch.files import Blobs, Disk
from omniserve.batch.limits import Limits, Quota

# Every write boundary, in the order in which a batch meets them.
POINTS = (
    "migrate.changed",
    "upload.written",
    "upload.synced",
    "upload.placed",
    "upload.accepted",
    "create.committed",
    "validate.read",
    "validate.committed",
    "death.committed",
    "record.output_synced",
    "record.errors_synced",
    "record.committing",
    "record.committed",
    "cancel.committed",
    "finish.committed",
    "expire.committed",
    "settle.committing",
    "settle.committed",
    "delete.committed",
    "delete.removed",
)


def pass_by(point: str) -> None:
    """What happens at a write boundary outside tests."""


class Store:
    """Opens a state directory, alone; every call blocks. `at` is called at each of POINTS.

    Raises StateError when another process has the directory or it is of a newer version, StorageError when
    the disk fails. A write that fails breaks nothing: the next call opens the database anew.
    """

    def __init__(
        self,
        root: Path,
        *,
        limits: Limits | None = None,
        now: Callable[[], float] = time.time,
        disk: Disk | None = None,
        at: At = pass_by,
    ) -> None:
        self.limits = limits or Limits()
        self._root, self._disk = root, disk or Disk()
        disk = self._disk
        self._database = Database(root, at, self._recover, disk.sync_folder)
        try:
            self._blobs = Blobs(root, disk)
            self._blobs.clear_incoming()
            self.files = FileStore(self._database, self._blobs, disk, self.limits, now)
            self.batches = BatchStore(self._database, self._blobs, self.files, self.limits, now)
            self._database.open()
        except BaseException:
            self._database.close()
            raise

    def _recover(self) -> None:
        """Bring the files in line with the database: drop what was never recorded or is no longer known."""
        self.batches.recover()
        known = {row[0] for row in self._database.db.execute("SELECT id FROM files")}
        known |= self.batches.reserved_ids()
        for file_id in [file_id for file_id in self._blobs.ids() if file_id not in known]:
            self._blobs.remove(file_id)

    def free_bytes(self) -> int:
        """What the disk has left for everybody but root; OSError. Any thread may ask."""
        return self._disk.free_bytes(self._root)

    def sweep(self, quota_of: Callable[[str], Quota] = lambda owner: Quota()) -> None:
        """Remove what is past its time."""
        self.files.sweep()
        self.batches.sweep(quota_of)

    def close(self) -> None:
        self._database.close()
