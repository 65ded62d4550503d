"""A line runner that does what the test says, and helpers to wait for what a batch becomes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from batch.stand import OWNER, new_batch
from omniserve.batch.records import BatchRecord
from omniserve.batch.runner import LineResponse, RunnerSettings
from omniserve.batch.service import BatchService

# Pauses so short that no test waits for them.
SETTINGS = RunnerSettings(concurrency=4, first_pause_s=0.001, longest_pause_s=0.01)
NO_ROOM = LineResponse(429, {"error": {"code": "resource_unavailable"}})


def answer(body: Mapping[str, Any]) -> LineResponse:
    text = body["messages"][0]["content"].upper()
    usage = {"prompt_tokens": 2, "completion_tokens": 1}
    return LineResponse(200, {"choices": [{"message": {"content": text}}], "usage": usage})


class ScriptedRunner:
    """Answers in capitals. `behave(text, run)`, if given, is asked first; a LineResponse of its own counts.

    runs: how often each line was started; most: the largest number in flight at once.
    """

    def __init__(self, behave: Callable[[str, int], Awaitable[LineResponse | None]] | None = None) -> None:
        self.behave = behave
        self.runs: Counter[str] = Counter()
        self.order: list[str] = []
        self.seconds_left: dict[str, float] = {}
        self.num_now = self.most = 0

    async def run_line(
        self, owner: str, endpoint: str, body: Mapping[str, Any], request_id: str, seconds_left: float
    ) -> LineResponse:
        text = body["messages"][0]["content"]
        self.runs[text] += 1
        self.order.append(text)
        self.seconds_left[text] = seconds_left
        self.num_now += 1
        self.most = max(self.most, self.num_now)
        try:
            await asyncio.sleep(0)
            made = await self.behave(text, self.runs[text]) if self.behave is not None else None
            return answer(body) if made is None else made
        finally:
            self.num_now -= 1


async def submit(service: BatchService, data: bytes, owner: str = OWNER, **changes: Any) -> BatchRecord:
    upload = await service.begin_upload(owner)
    await upload.write(data)
    file = await upload.accept("in.jsonl")
    return await service.create(owner, new_batch(file, **changes))


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Look again and again; the test's own time limit ends a wait in vain."""
    while not await condition():
        await asyncio.sleep(0.002)


async def ended(service: BatchService, batch: BatchRecord) -> BatchRecord:
    found = batch

    async def look() -> bool:
        nonlocal found
        found = await service.batch(batch.owner, batch.id)
        return found.has_ended

    await until(look)
    return found
