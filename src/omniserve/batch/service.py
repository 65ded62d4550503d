"""Files and batches for an asyncio server: the store on its thread, and the runner beside it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import BinaryIO

from omniserve.batch.database import At
from omniserve.batch.files import Disk, Incoming
from omniserve.batch.limits import Limits, Quota
from omniserve.batch.line_runner import LineRunner
from omniserve.batch.records import BatchRecord, FileRecord, NewBatch
from omniserve.batch.runner import BatchRunner, RunnerSettings
from omniserve.batch.store import Store, pass_by
from omniserve.batch.writer import Writer

# What one call writes or reads; smaller pieces of an upload are gathered first.
PIECE_BYTES = 1024**2


class Upload:
    """An upload on its way. End it with `accept` or `abandon`; after `accept`, `abandon` does nothing."""

    def __init__(self, writer: Writer, store: Store, incoming: Incoming, owner: str, quota: Quota) -> None:
        self._writer, self._store, self._incoming = writer, store, incoming
        self._owner, self._quota = owner, quota
        self._gathered = bytearray()

    async def write(self, data: bytes) -> None:
        """StorageError, TooLargeError: abandon it."""
        self._gathered += data
        if len(self._gathered) >= PIECE_BYTES:
            await self._flush()

    async def _flush(self) -> None:
        data, self._gathered = bytes(self._gathered), bytearray()
        await self._writer.run(self._store.files.write, self._incoming, data)

    async def accept(self, filename: str, life_s: int | None = None) -> FileRecord:
        """Once this returns the file is on disk, whatever happens. life_s: seconds until it expires."""
        await self._flush()
        accept = self._store.files.accept
        file = await self._writer.run(accept, self._incoming, self._owner, filename, life_s, self._quota)
        await self._writer.run(self._incoming.close)
        return file

    async def abandon(self) -> None:
        await self._writer.run(self._incoming.close)


class BatchService:
    """Opens the state directory at once (StateError, StorageError); `start` when the line runner can be used.

    quota_of: what an owner may keep. at, disk: for tests.
    """

    def __init__(
        self,
        root: Path,
        line_runner: LineRunner,
        *,
        settings: RunnerSettings | None = None,
        limits: Limits | None = None,
        quota_of: Callable[[str], Quota] = lambda owner: Quota(),
        is_known_model: Callable[[str], bool] = lambda name: True,
        now: Callable[[], float] = time.time,
        disk: Disk | None = None,
        at: At = pass_by,
    ) -> None:
        self._store = Store(root, limits=limits, now=now, disk=disk, at=at)
        self._writer, self._quota_of = Writer(), quota_of
        self.runner = BatchRunner(
            self._store, self._writer, line_runner, settings, now, is_known_model, quota_of
        )

    @property
    def limits(self) -> Limits:
        return self._store.limits

    async def free_bytes(self) -> int:
        """What the disk of the state directory has left; OSError. The writer is not kept from its work."""
        return await asyncio.to_thread(self._store.free_bytes)

    def start(self) -> None:
        self.runner.start()

    async def stop(self) -> None:
        """Lines in flight are given up and run again after the next start."""
        await self.runner.stop()
        await self._writer.run(self._store.close)
        self._writer.close()

    async def begin_upload(self, owner: str) -> Upload:
        quota = self._quota_of(owner)
        incoming = await self._writer.run(self._store.files.begin, owner, quota)
        return Upload(self._writer, self._store, incoming, owner, quota)

    async def file(self, owner: str, file_id: str) -> FileRecord:
        return await self._writer.run(self._store.files.get, owner, file_id)

    async def files(
        self, owner: str, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[FileRecord], bool]:
        page = self._store.files.page
        return await self._writer.run(page, owner, purpose, after, limit, newest_first)

    async def open_file(self, owner: str, file_id: str) -> tuple[FileRecord, AsyncIterator[bytes]]:
        """A file and its bytes, piece by piece; they stay readable although it is deleted meanwhile."""
        file, source = await self._writer.run(self._store.files.open, owner, file_id)
        return file, _pieces(source)

    async def delete_file(self, owner: str, file_id: str) -> None:
        await self._writer.run(self._store.files.delete, owner, file_id)

    async def create(self, owner: str, new: NewBatch) -> BatchRecord:
        batch = await self._writer.run(self._store.batches.create, owner, new, self._quota_of(owner))
        self.runner.notice()
        return batch

    async def batch(self, owner: str, batch_id: str) -> BatchRecord:
        return await self._writer.run(self._store.batches.get, owner, batch_id)

    async def batches(self, owner: str, after: str | None, limit: int) -> tuple[list[BatchRecord], bool]:
        return await self._writer.run(self._store.batches.page, owner, after, limit)

    async def open_batches(self) -> list[BatchRecord]:
        """All that have not ended, of all owners, the most urgent first: for the operator."""
        return await self._writer.run(self._store.batches.open_batches)

    async def overview(self, limit: int) -> list[tuple[BatchRecord, str | None]]:
        """Open batches and the last that ended, of all owners, with the names of their inputs: for the
        operator."""
        return await self._writer.run(self._store.batches.overview, limit)

    async def cancel(self, owner: str, batch_id: str) -> BatchRecord:
        batch = await self._writer.run(self._store.batches.cancel, owner, batch_id)
        self.runner.notice()
        return batch


async def _pieces(source: BinaryIO) -> AsyncIterator[bytes]:
    """Read beside the writer: a slow disk or client holds up nobody."""
    try:
        while piece := await asyncio.to_thread(source.read, PIECE_BYTES):
            yield piece
    finally:
        source.close()
