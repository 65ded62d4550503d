"""The first thing a request meets: its id, its time of arrival, who sends it, how large it may be.

Plain ASGI, for it lies on the way of every token.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from contextvars import ContextVar

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from omniserve.server.answers import send_failure
from omniserve.server.auth import Keyring
from omniserve.server.errors import ApiError
from omniserve.server.visitors import Visitors

logger = logging.getLogger("omniserve.server")

REQUEST_ID_HEADER = "x-request-id"
_PLAIN_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
# A body that is too large is read on for so many times the limit, so that its sender hears why.
DRAIN_FACTOR = 4
# Uploads have a limit of their own.
UNBOUNDED = "/v1/files"
# Asked every few seconds, and not worth a line each.
PROBES = ("/health", "/ready", "/metrics", "/dashboard/data")

# For log lines: of the request at hand, in the task at hand.
current_request_id: ContextVar[str] = ContextVar("current_request_id", default="-")


class Gate:
    """Puts `arrived_s`, `request_id`, `caller` and `send` into the state of each request."""

    def __init__(self, app: ASGIApp, keyring: Keyring, visitors: Visitors, max_body_bytes: int) -> None:
        self._app, self._max_body_bytes = app, max_body_bytes
        self._keyring, self._visitors = keyring, visitors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived_s, headers = time.monotonic(), Headers(scope=scope)
        request_id = _request_id(headers.get(REQUEST_ID_HEADER))
        token = current_request_id.set(request_id)
        state = scope.setdefault("state", {})
        state["arrived_s"], state["request_id"] = arrived_s, request_id
        noted = _Noted(send, request_id)
        state["send"] = noted
        try:
            if _is_private(scope["path"]):
                self._visitors.check(scope["method"], headers)
            state["caller"] = self._caller(scope["path"], headers.get("authorization"))
            bounded = receive
            if scope["path"] != UNBOUNDED:
                bounded = _Bounded(receive, headers.get("content-length"), self._max_body_bytes)
            await self._app(scope, bounded, noted)
        except ClientDisconnect:
            pass  # in the middle of its body: nobody is left to tell, and nothing of ours failed
        except Exception as error:
            if not isinstance(error, ApiError):
                logger.exception("%s %s failed", scope["method"], scope["path"])
            if noted.status is not None:
                raise
            await send_failure(noted, error)
        finally:
            seconds = time.monotonic() - arrived_s
            level = logging.DEBUG if scope["path"] in PROBES else logging.INFO
            how = noted.status or "gone"
            logger.log(level, "%s %r %s %.3f s", scope["method"], scope["path"], how, seconds)
            current_request_id.reset(token)

    def _caller(self, path: str, authorization: str | None) -> object:
        if path.startswith("/v1/") or path == "/v1":
            return self._keyring.client(authorization)
        if path.startswith(("/admin/", "/dashboard/")) or path == "/admin":
            return self._keyring.admin(authorization)
        if path == "/dashboard":
            # A browser sends no key when somebody opens a page: this one holds no data, and asks for the key.
            self._keyring.check_administrable()
        return None


def _is_private(path: str) -> bool:
    """What tells or does something that is not everybody's business; probes are open to whoever connects."""
    return path.startswith(("/v1", "/admin", "/dashboard"))


def _request_id(asked: str | None) -> str:
    """The client's own, if it is plain text that may go into logs and headers."""
    if asked is not None and _PLAIN_ID.fullmatch(asked):
        return asked
    return "req_" + uuid.uuid4().hex


class _Noted:
    """A send that notes the status, and adds the request's id to the headers."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._header = send, (REQUEST_ID_HEADER.encode(), request_id.encode())
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), self._header]}
        await self._send(message)


class _Bounded:
    """A receive that raises ApiError 413 once a body is larger than it may be."""

    def __init__(self, receive: Receive, length: str | None, limit: int) -> None:
        self._receive, self._limit, self._num_bytes = receive, limit, 0
        self._is_hopeless = length is not None and length.isdecimal() and int(length) > limit

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] != "http.request":
            return message
        self._num_bytes += len(message.get("body", b""))
        if not self._is_hopeless and self._num_bytes <= self._limit:
            return message
        while message.get("more_body") and self._num_bytes <= DRAIN_FACTOR * self._limit:
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            self._num_bytes += len(message.get("body", b""))
        raise ApiError(
            413,
            f"the body is larger than {self._limit} bytes (--max-body-bytes); send less",
            code="request_too_large",
        )
