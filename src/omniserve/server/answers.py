"""Answers as ASGI responses: whole or as server-sent events; both end when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from omniserve.server.errors import ApiError, as_api_error

# Proxies cut connections on which nothing comes for about a minute.
COMMENT_EVERY_S = 15.0
COMMENT = b": still here\n\n"
JSON_HEADERS = ((b"content-type", b"application/json"),)
SSE_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would gather tokens
)


class JsonBody(Response):
    """A JSON answer that is there already."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


def error_answer(error: ApiError) -> JsonBody:
    return JsonBody(error.body, error.status_code, error.headers)


class Answer(Response):
    """Runs `produce(send)` until it ends or the client goes away, which cancels it.

    What it sends goes straight to the gate: FastAPI's layers each take a call for each token, to note what
    the gate notes too.
    """

    def __init__(self, produce: Callable[[Send], Awaitable[None]]) -> None:
        self._produce = produce
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._produce(scope["state"]["send"]))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        if not work.cancelled():
            work.result()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def start(status: int, headers: tuple[tuple[bytes, bytes], ...], more: Mapping[str, str]) -> Message:
    extra = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in more.items()]
    return {"type": "http.response.start", "status": status, "headers": [*headers, *extra]}


class EventStream:
    """Server-sent events. The status goes out with the first of them, or with a comment after 15 s.

    Until then a failure still has a status of its own; later it is an event with an `error`.
    """

    def __init__(self, send: Send, headers: Mapping[str, str]) -> None:
        self._send, self._headers = send, headers
        self._loop = asyncio.get_running_loop()
        self._last_s = self._loop.time()
        self._turn = asyncio.Lock()
        self._comments = asyncio.create_task(self._comment())
        self.has_started = False

    async def push(self, events: bytes) -> None:
        async with self._turn:
            if not self.has_started:
                await self._start()
            await self._send({"type": "http.response.body", "body": events, "more_body": True})
            self._last_s = self._loop.time()

    async def _start(self) -> None:
        self.has_started = True
        await self._send(start(200, SSE_HEADERS, self._headers))

    async def fail(self, error: ApiError) -> None:
        """Tell of a failure, as an answer of its own or in the stream, and end."""
        await self._end_comments()
        if not self.has_started:
            body = msgspec.json.encode(error.body)
            headers = {**(error.headers or {}), **self._headers, "content-length": str(len(body))}
            await self._send(start(error.status_code, JSON_HEADERS, headers))
            await self._send({"type": "http.response.body", "body": body})
            return
        await self.close(b"data: " + msgspec.json.encode(error.body) + b"\n\n")

    async def close(self, events: bytes) -> None:
        """End with these events: they and the end of the answer are one write."""
        await self._end_comments()
        if not self.has_started:
            await self._start()
        await self._send({"type": "http.response.body", "body": events})

    def abandon(self) -> None:
        """Whatever became of the stream, leave nothing behind."""
        self._comments.cancel()

    async def _end_comments(self) -> None:
        async with self._turn:  # a comment on its way goes out whole
            self._comments.cancel()
        await asyncio.gather(self._comments, return_exceptions=True)

    async def _comment(self) -> None:
        while True:
            quiet_s = self._loop.time() - self._last_s
            if quiet_s >= COMMENT_EVERY_S:
                await self.push(COMMENT)
            else:
                await asyncio.sleep(COMMENT_EVERY_S - quiet_s)


async def send_json(send: Send, status: int, content: Any, headers: Mapping[str, str]) -> None:
    body = msgspec.json.encode(content)
    await send(start(status, JSON_HEADERS, {**headers, "content-length": str(len(body))}))
    await send({"type": "http.response.body", "body": body})


async def send_failure(send: Send, error: Exception) -> None:
    told = as_api_error(error)
    await send_json(send, told.status_code, told.body, told.headers or {})
