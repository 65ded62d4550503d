"""What accepting a batch of 50,000 lines takes: seconds, memory, and how long the event loop was held up.

`python -m omniserve.bench.batch_accept [--lines N] [--line-bytes B] [--json FILE]`. A file is made, uploaded
in pieces as a socket brings them, and submitted to the batch service, on a directory of its own; nothing runs
and no HTTP is spoken. Memory is the growth of the process's largest resident size meanwhile. The gap is the
most that an event loop was late which wants a turn every millisecond; streams of chats would be as late.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omniserve.batch.limits import DAY_S, Limits
from omniserve.batch.records import BatchRecord, NewBatch
from omniserve.batch.runner import LineResponse
from omniserve.batch.service import BatchService
from omniserve.bench.measure import machine, write_json

ENDPOINT = "/v1/chat/completions"
NUM_LINES, LINE_BYTES = 50_000, 4000
CHUNK_BYTES = 64 * 1024
TICK_S = 1e-3
# What the figures must stay under.
LIMIT_S, LIMIT_BYTES = 10.0, 100 * 10**6
OWNER = "bench"


class _Idle:
    """The service is paused: no line comes here."""

    async def run_line(
        self, owner: str, endpoint: str, body: Mapping[str, Any], request_id: str, seconds_left: float
    ) -> LineResponse:
        raise AssertionError("a line was started while the service was paused")


class Ticker:
    """Wants a turn of the event loop every millisecond, and remembers the longest wait for one."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._task = asyncio.create_task(self._tick())

    async def _tick(self) -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(TICK_S)
            self.longest_s = max(self.longest_s, time.perf_counter() - began - TICK_S)

    def stop(self) -> float:
        self._task.cancel()
        return self.longest_s


def write_input(path: Path, num_lines: int, line_bytes: int) -> int:
    """Lines of about `line_bytes` bytes; returns the size of the file."""
    with path.open("wb") as file:
        for number in range(num_lines):
            message = {"role": "user", "content": "word " * (max(0, line_bytes - 170) // 5)}
            body = {"model": "any", "messages": [message], "max_tokens": 64}
            line = {"custom_id": f"line-{number}", "method": "POST", "url": ENDPOINT, "body": body}
            file.write(json.dumps(line).encode() + b"\n")
    return path.stat().st_size


async def accept(folder: Path, source: Path) -> dict[str, Any]:
    """Upload and submit a file; the seconds of both steps, the growth of memory and the longest gap."""
    service = BatchService(folder / "state", _Idle(), limits=Limits(reserve_bytes=0))
    service.runner.pause()
    service.start()
    try:
        ticker, before_bytes = Ticker(), reset_peak_bytes()
        began = time.perf_counter()
        upload = await service.begin_upload(OWNER)
        for chunk in _chunks(source):
            await upload.write(chunk)
        file = await upload.accept(source.name)
        uploaded = time.perf_counter()
        new = NewBatch(ENDPOINT, file.id, "24h", DAY_S)
        batch = await _validated(service, await service.create(OWNER, new))
        accepted = time.perf_counter()
        return {
            "num_lines": batch.total,
            "file_bytes": file.bytes,
            "upload_s": uploaded - began,
            "accept_s": accepted - uploaded,
            "memory_growth_bytes": peak_bytes() - before_bytes,
            "longest_loop_gap_s": ticker.stop(),
        }
    finally:
        await service.stop()


def _chunks(source: Path) -> Iterator[bytes]:
    with source.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


async def _validated(service: BatchService, batch: BatchRecord) -> BatchRecord:
    while batch.status == "validating":
        await asyncio.sleep(0.01)
        batch = await service.batch(OWNER, batch.id)
    return batch


def reset_peak_bytes() -> int:
    """Let the kernel forget the process's largest resident size; returns the size now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """Largest resident size since then."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=NUM_LINES)
    parser.add_argument("--line-bytes", type=int, default=LINE_BYTES)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="omniserve-batch-") as name:
        source = Path(name) / "input.jsonl"
        write_input(source, options.lines, options.line_bytes)
        figures = asyncio.run(accept(Path(name), source))
    is_within = (
        figures["upload_s"] + figures["accept_s"] < LIMIT_S and figures["memory_growth_bytes"] < LIMIT_BYTES
    )
    report = figures | {"is_within_limits": is_within, "limit_s": LIMIT_S, "limit_bytes": LIMIT_BYTES}
    for name, value in report.items():
        print(f"{name:>22}: {value:.4g}" if isinstance(value, float) else f"{name:>22}: {value}")
    if options.json:
        write_json(options.json, report | {"machine": machine()})


if __name__ == "__main__":
    main()
