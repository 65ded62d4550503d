"""A batch without a server: an input file in, a file of results out; the same formats, the same promises.

The work lies in a state directory beside the output until it is done. A run that was interrupted, even by
kill -9, goes on from there when it is started again; what is finished is not run again.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from omniserve.batch.files import Disk
from omniserve.batch.limits import ENDPOINTS, Limits, Quota
from omniserve.batch.records import BatchRecord, NewBatch
from omniserve.batch.runner import LineRunner, RunnerSettings
from omniserve.batch.service import BatchService
from omniserve.batch.states import Status
from omniserve.errors import ConfigError, RequestError

OWNER = "offline"
# Nobody waits: a window that ends after everybody has gone.
WINDOW_S = 100 * 365 * 86400
# The limits of a service do not concern one's own files; what a line takes in memory does (about 200 bytes).
LIMITS = Limits(max_lines=10**7, max_file_bytes=1 << 40, reserve_bytes=0, retention_s=WINDOW_S)
QUOTA = Quota(max_bytes=1 << 50, max_open_lines=10**7)
LOOK_S = 0.1
COPY_BYTES = 1024**2


def work_folder(output: Path) -> Path:
    """Where the work on `output` lies until it is done."""
    return output.with_name(f".{output.name}.state")


def _done_folder(folder: Path) -> Path:
    """What a work folder is called once nothing in it is needed: half removed, it is no longer mistaken for
    work to go on with."""
    return folder.with_name(folder.name + ".done")


async def run_file(
    source: Path,
    output: Path,
    line_runner: LineRunner,
    settings: RunnerSettings,
    overwrite: bool = False,
    on_progress: Callable[[BatchRecord], None] = lambda batch: None,
    is_known_model: Callable[[str], bool] = lambda name: True,
) -> BatchRecord:
    """Run every line of `source`; `output` appears when all have a result, errors among them.

    ConfigError: the output is there already, or the work that lies there is of another input. RequestError:
    the input is bad. Cancelled, or interrupted in whatever way, it goes on when it is called again.
    """
    folder = work_folder(output)
    await asyncio.to_thread(_remove_done, folder)
    if output.exists() and not folder.exists() and not overwrite:
        raise ConfigError(f"{output} exists; name another output, or say --overwrite")
    service = BatchService(
        folder,
        line_runner,
        settings=settings,
        limits=LIMITS,
        quota_of=lambda owner: QUOTA,
        is_known_model=is_known_model,
    )
    service.start()
    try:
        batch = await _found_or_created(service, source, folder)
        while not batch.has_ended:
            on_progress(batch)
            await asyncio.sleep(LOOK_S)
            batch = await service.batch(OWNER, batch.id)
        on_progress(batch)
        if batch.status is Status.COMPLETED:
            await _write_output(service, batch, output)
    finally:
        await service.stop()
    await asyncio.to_thread(_set_aside, folder)
    await asyncio.to_thread(_remove_done, folder)
    if batch.status is not Status.COMPLETED:
        told = "; ".join(f"line {error.line}: {error.message}" for error in batch.errors[:5])
        raise RequestError("input", f"{source} cannot be run: {told}")
    return batch


def _set_aside(folder: Path) -> None:
    os.replace(folder, _done_folder(folder))
    Disk().sync_folder(folder.parent)


def _remove_done(folder: Path) -> None:
    """Also what a run that was killed here has left."""
    with suppress(FileNotFoundError):
        shutil.rmtree(_done_folder(folder))


async def _found_or_created(service: BatchService, source: Path, folder: Path) -> BatchRecord:
    batches, _ = await service.batches(OWNER, None, 1)
    if batches:
        if not await _is_same(service, batches[0].input_file_id, source):
            raise ConfigError(
                f"{folder} holds unfinished work on another input than {source}; name another output, "
                "or remove that folder"
            )
        return batches[0]
    upload = await service.begin_upload(OWNER)
    try:
        with source.open("rb") as file:
            while piece := await asyncio.to_thread(file.read, COPY_BYTES):
                await upload.write(piece)
        stored = await upload.accept(source.name)
    finally:
        await upload.abandon()
    endpoint = await asyncio.to_thread(_endpoint_of, source)
    return await service.create(OWNER, NewBatch(endpoint, stored.id, "offline", WINDOW_S))


async def _is_same(service: BatchService, file_id: str, source: Path) -> bool:
    stored, pieces = await service.open_file(OWNER, file_id)
    same = stored.bytes == source.stat().st_size
    with source.open("rb") as file:
        async for piece in pieces:
            same = same and piece == await asyncio.to_thread(file.read, len(piece))
    return same


def _endpoint_of(source: Path) -> str:
    """That of the first line; where it names none that there is, validation says what is wrong with it."""
    with source.open("rb") as file:
        for raw in file:
            if raw.strip():
                try:
                    url = json.loads(raw)["url"]
                except (ValueError, TypeError, KeyError, RecursionError):
                    break
                return url if url in ENDPOINTS else ENDPOINTS[0]
    return ENDPOINTS[0]


async def _write_output(service: BatchService, batch: BatchRecord, output: Path) -> None:
    """All results in one file that appears at once, synced."""
    disk, part = Disk(), output.with_name(f".{output.name}.part")
    with part.open("wb") as file:
        for file_id, size in (
            (batch.output_file_id, batch.output_bytes),
            (batch.error_file_id, batch.error_bytes),
        ):
            if size:
                _, pieces = await service.open_file(OWNER, file_id)
                async for piece in pieces:
                    await asyncio.to_thread(file.write, piece)
        file.flush()
        await asyncio.to_thread(disk.sync, file.fileno())
    os.replace(part, output)
    await asyncio.to_thread(disk.sync_folder, output.parent)
