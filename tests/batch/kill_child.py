"""A process to be killed: it submits three batches, takes each to another end, and deletes an input.

Started again on the same folder it goes on where the store says it is. `run` is what each process does.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batch.scripted import until
from batch.stand import LIMITS, OWNER, jsonl, line, new_batch
from omniserve.batch.database import At
from omniserve.batch.errors import NotFoundError
from omniserve.batch.files import Disk
from omniserve.batch.limits import HOUR_S
from omniserve.batch.records import BatchRecord
from omniserve.batch.runner import EngineGone, LineResponse, RunnerSettings
from omniserve.batch.service import BatchService
from omniserve.errors import RequestError

# Lines of each batch by what becomes of it. Of the last two, only the first ANSWERED are ever answered.
WHOLE, STOPPED, ANSWERED = 40, 16, 8
SIZES = {"completed": WHOLE, "cancelled": STOPPED, "expired": STOPPED}
# Every so many-th line is answered with an error.
BAD = 5


# The line whose engine dies the first time it runs.
MORTAL = ("completed", 7)
# Not a boundary but the middle of a write: half of the bytes are there.
TORN = "torn write"


class TornDisk(Disk):
    """Tells when half of a write is done, and again when the whole of it is."""

    def __init__(self, at: At) -> None:
        self._at = at

    def write(self, descriptor: int, data: bytes, offset: int) -> None:
        half = len(data) // 2
        super().write(descriptor, data[:half], offset)
        self._at(TORN)
        super().write(descriptor, data[half:], offset + half)


class LoggingRunner:
    """Answers by what the line says; writes down every start of a line before anything else."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._log = os.open(root / "runs", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    async def run_line(
        self, owner: str, endpoint: str, body: Mapping[str, Any], request_id: str, seconds_left: float
    ) -> LineResponse:
        os.write(self._log, f"{request_id}\n".encode())
        end, number = body["messages"][0]["content"].split()
        if (end, int(number)) == MORTAL and self._runs(request_id) == 1:
            raise EngineGone
        if end != "completed" and int(number) > ANSWERED:
            await asyncio.Event().wait()
        await asyncio.sleep(int(number) % 3 * 0.001)
        if int(number) % BAD == 0:
            return LineResponse(400, {"error": {"code": "bad"}})
        return LineResponse(200, {"text": f"{end} {number}"})

    def _runs(self, request_id: str) -> int:
        return (self._root / "runs").read_text().split().count(request_id)


def input_of(end: str) -> bytes:
    def body(number: int) -> dict[str, Any]:
        return {"model": "m", "messages": [{"role": "user", "content": f"{end} {number}"}]}

    return jsonl(line(number, body=body(number)) for number in range(1, SIZES[end] + 1))


class Life:
    """One process from its start to its end or its death."""

    def __init__(self, root: Path, kill_at: str, passes: int) -> None:
        self._root, self._kill_at, self._left = root, kill_at, passes
        self._passed_s = 0.0
        runner, settings = LoggingRunner(root), RunnerSettings(concurrency=100)
        options: dict[str, Any] = {"settings": settings, "limits": LIMITS, "now": self._now, "at": self._at}
        options["disk"] = TornDisk(self._at)
        self._service = BatchService(root / "state", runner, **options)

    def _now(self) -> float:
        return time.time() + self._passed_s

    def _at(self, point: str) -> None:
        if point == self._kill_at:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    async def live(self) -> None:
        self._service.start()
        done = {end: await self._submitted(end) for end in SIZES}
        await self._answered(done["cancelled"])
        try:
            await self._service.cancel(OWNER, done["cancelled"].id)
        except RequestError:
            raise AssertionError("only a cancelled batch was cancelled") from None
        await self._answered(done["expired"])
        await self._ended(done["completed"])
        self._passed_s = HOUR_S
        self._service.runner.notice()
        for batch in done.values():
            await self._ended(batch)
        try:
            await self._service.delete_file(OWNER, done["completed"].input_file_id)
        except NotFoundError:
            assert done["completed"].metadata  # deleted by an earlier life
        await self._service.stop()

    async def _submitted(self, end: str) -> BatchRecord:
        """The batch, from an earlier life or new. What was promised to a client is written down."""
        for batch in (await self._service.batches(OWNER, None, 100))[0]:
            if batch.metadata == {"end": end}:
                return batch
        upload = await self._service.begin_upload(OWNER)
        await upload.write(input_of(end))
        file = await upload.accept(f"{end}.jsonl")
        self._promise(file.id)
        window_s = HOUR_S if end == "expired" else 100 * HOUR_S
        batch = await self._service.create(OWNER, new_batch(file, window_s=window_s, metadata={"end": end}))
        self._promise(batch.id)
        return batch

    def _promise(self, object_id: str) -> None:
        with (self._root / "promised").open("a") as promised:
            promised.write(f"{object_id}\n")

    async def _answered(self, batch: BatchRecord) -> None:
        """Until every line that is ever answered has its result."""

        async def look() -> bool:
            now = await self._service.batch(OWNER, batch.id)
            return now.completed + now.failed >= ANSWERED

        await until(look)

    async def _ended(self, batch: BatchRecord) -> None:
        async def look() -> bool:
            return (await self._service.batch(OWNER, batch.id)).has_ended

        await until(look)


def run(root: Path, kill_at: str = "", passes: int = 1) -> None:
    """Go on until all is done, or die at the `passes`-th time that boundary `kill_at` is passed."""
    asyncio.run(Life(root, kill_at, passes).live())
