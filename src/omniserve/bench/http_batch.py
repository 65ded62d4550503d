"""Best-effort work as a batch: one file through /v1/files and /v1/batches, beside the load or alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from omniserve.bench.http_api import check

POLL_S = 1.0
TERMINAL = ("completed", "failed", "expired", "cancelled")


@dataclass(slots=True)
class BatchResult:
    """What became of a batch. seconds: from its creation to its end or to when it was told to stop.

    counts: as the server gives them (total, completed, failed). output_tokens: of the lines in the output
    file, by the server's usage; a line that was under way when the batch was stopped counts nothing.
    """

    id: str = ""
    status: str = ""
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    output_tokens: int = 0

    @property
    def tokens_per_s(self) -> float | None:
        return self.output_tokens / self.seconds if self.seconds > 0 else None


async def run_batch(
    client: httpx.AsyncClient,
    endpoint: str,
    bodies: Iterable[dict[str, Any]],
    stop: asyncio.Event,
    result: BatchResult,
) -> None:
    """Upload, start, wait for the end or for `stop`, which cancels it; then count what was done.

    result: kept up to date all the while. Raises OmniServeError or Refused with the server's own words when
    it will not.
    """
    file_id = await _upload(client, endpoint, bodies)
    asked = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": "24h"}
    batch = await _json(client, "POST", "/v1/batches", json=asked)
    result.id, path = batch["id"], f"/v1/batches/{batch['id']}"
    loop = asyncio.get_running_loop()
    began_s, is_stopped = loop.time(), False
    while True:
        result.status, result.counts = batch["status"], batch.get("request_counts") or {}
        if not is_stopped:
            result.seconds = loop.time() - began_s
        if result.status in TERMINAL:
            break
        if stop.is_set() and not is_stopped:
            is_stopped = True
            # Refused when it has come to its end meanwhile, which the next look will show.
            await client.post(f"{path}/cancel")
        await _pause(stop, is_stopped)
        batch = await _json(client, "GET", path)
    if batch.get("output_file_id"):
        result.output_tokens = await _output_tokens(client, batch["output_file_id"])


async def _pause(stop: asyncio.Event, is_stopped: bool) -> None:
    """POLL_S, or until `stop` where that has not been acted upon."""
    with suppress(TimeoutError):
        await asyncio.wait_for(asyncio.Event().wait() if is_stopped else stop.wait(), POLL_S)


async def _upload(client: httpx.AsyncClient, endpoint: str, bodies: Iterable[dict[str, Any]]) -> str:
    lines = (
        json.dumps({"custom_id": f"line-{i}", "method": "POST", "url": endpoint, "body": body})
        for i, body in enumerate(bodies)
    )
    content = "\n".join(lines).encode() + b"\n"
    files = {"file": ("bench.jsonl", content, "application/jsonl")}
    uploaded = await _json(client, "POST", "/v1/files", files=files, data={"purpose": "batch"})
    return str(uploaded["id"])


async def _output_tokens(client: httpx.AsyncClient, file_id: str) -> int:
    total = 0
    path = f"/v1/files/{file_id}/content"
    async with client.stream("GET", path) as response:
        if not response.is_success:
            await response.aread()
        check(response, path)
        async for line in response.aiter_lines():
            if line:
                answer = json.loads(line).get("response") or {}
                total += ((answer.get("body") or {}).get("usage") or {}).get("completion_tokens", 0)
    return total


async def _json(client: httpx.AsyncClient, method: str, path: str, **options: Any) -> dict[str, Any]:
    response = await client.request(method, path, **options)
    check(response, path)
    found: dict[str, Any] = response.json()
    return found
