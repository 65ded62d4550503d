"""The HTTP client of server_cost.py, in a process of its own: `python -m omniserve.bench.server_cost_client`.

Reads what to ask from standard input, writes times to standard output, JSON both. It does as little for a
token as it can, for what it takes would count as the server's: one connection for each place, kept open, a
parser in C, no JSON read.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from typing import Any

import httptools
import msgspec
import uvloop

from omniserve.bench.server_cost_load import Question, Timing, run_load
from omniserve.bench.sse import EventStream
from omniserve.errors import OmniServeError

CHAT = "/v1/chat/completions"
DONE = "[DONE]"
# The chunk that opens a choice: the role, no text.
OPENING = '"delta":{"role"'


class Task(msgspec.Struct):
    """What comes in. load: by place."""

    host: str
    port: int
    load: list[list[Question]]


class Findings(msgspec.Struct):
    """What goes out. cpu_s: of this process, while it asked."""

    places: list[list[Timing]]
    seconds: float
    cpu_s: float


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection, one request at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._token_s: list[float] = []

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._parser = httptools.HttpResponseParser(self)

    async def ask(self, request: bytes, token_s: list[float]) -> None:
        """Until the answer has ended; OmniServeError when it is not what it should be."""
        self._token_s, self._events = token_s, EventStream()
        self._ended = self._loop.create_future()
        self._transport.write(request)
        await self._ended

    def data_received(self, data: bytes) -> None:
        self._now_s = time.monotonic()
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        if self._parser.get_status_code() != 200:
            self._fail(f"{self._parser.get_status_code()}: {body[:500]!r}")
            return
        for data in self._events.feed(body):
            if OPENING not in data and data != DONE:
                self._token_s.append(self._now_s)

    def on_message_complete(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(f"the connection was closed: {error}")

    def _fail(self, reason: str) -> None:
        if not self._ended.done():
            self._ended.set_exception(OmniServeError(reason))

    def close(self) -> None:
        self._transport.close()


def request_of(question: Question) -> bytes:
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": question.content}],
            "max_completion_tokens": question.num_output,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
        }
    ).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"content-type: application/json\r\n\r\n" + body


async def run(task: Task) -> Findings:
    loop = asyncio.get_running_loop()
    connections = [(await loop.create_connection(Connection, task.host, task.port))[1] for _ in task.load]

    async def ask(place: int, question: Question, token_s: list[float]) -> None:
        await connections[place].ask(request_of(question), token_s)

    began_s, began_cpu_s = time.monotonic(), time.process_time()
    places = await run_load(task.load, ask)
    findings = Findings(places, time.monotonic() - began_s, time.process_time() - began_cpu_s)
    for connection in connections:
        connection.close()
    return findings


def main() -> int:
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)
    gc.collect()
    gc.freeze()
    findings = uvloop.run(run(task))
    sys.stdout.buffer.write(msgspec.json.encode(findings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
