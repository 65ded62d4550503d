"""The seam between batches and whatever answers their lines."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from omniserve.batch.records import Line, Usage

# "No room for best-effort work now", and "cannot serve now": the line was not run and runs later.
NO_ROOM, NO_SERVICE = 429, 503
NO_ROOM_CODE = "resource_unavailable"


@dataclass(frozen=True, slots=True)
class LineResponse:
    """What the endpoint answers: an HTTP status and a JSON body."""

    status_code: int
    body: dict[str, Any]


class EngineGone(Exception):
    """The engine ended while it had the line: the line is not finished, and may be what ended the engine."""


class LineCancelled(asyncio.CancelledError):
    """The line was cancelled when it had tokens. usage: those it had by then."""

    def __init__(self, usage: Usage) -> None:
        super().__init__()
        self.usage = usage


class LineRunner(Protocol):
    async def run_line(
        self, owner: str, endpoint: str, body: Mapping[str, Any], request_id: str, seconds_left: float
    ) -> LineResponse:
        """Answer one request as the endpoint would its batch's owner.

        `seconds_left`: until its batch expires, never negative.

        Raises EngineGone. Being cancelled means that nobody wants the answer any more; LineCancelled then
        says what was spent on it.
        """
        ...


def is_not_now(response: LineResponse) -> bool:
    """Whether the line was turned away unrun, to be tried again later."""
    if response.status_code == NO_SERVICE:
        return True
    error = response.body.get("error")
    code = error.get("code") if isinstance(error, Mapping) else None
    return response.status_code == NO_ROOM and code == NO_ROOM_CODE


@dataclass(frozen=True, slots=True)
class Request:
    """A line of an input, decoded. `body` is None where its JSON cannot be.

    custom_id: empty where it cannot be told.
    """

    custom_id: str
    body: dict[str, Any] | None


class _Line(msgspec.Struct):
    custom_id: str
    body: msgspec.Raw


_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_CUSTOM_ID = re.compile(rb'"custom_id"\s*:\s*"((?:[^"\\]|\\.)*)"', re.DOTALL)


def decode_request(line: Line) -> Request:
    """Of a line that passed validation, which reads a body only as far as it must. Never raises.

    A line can be bad here all the same: how deep JSON may be nested depends on who calls, and its file may
    have been changed from outside.
    """
    try:
        found = msgspec.json.decode(line.raw, type=_Line)
    except _UNREADABLE:
        return Request(_likely_custom_id(line.raw), None)
    try:
        body = msgspec.json.decode(found.body, type=dict[str, Any])
    except _UNREADABLE:
        return Request(found.custom_id, None)
    return Request(found.custom_id, body)


def _likely_custom_id(raw: bytes) -> str:
    """The first text of that name in a line that is no JSON."""
    found = _CUSTOM_ID.search(raw)
    if found is None:
        return ""
    text = found[1].decode("utf-8", "replace")
    with suppress(ValueError):  # an escape that is none: as it stands
        text = json.loads(f'"{text}"', strict=False)
    return text.encode("utf-8", "replace").decode()


def failure(status_code: int, message: str, kind: str, code: str) -> LineResponse:
    """An answer of our own making, in the endpoint's error format."""
    error = {"message": message, "type": kind, "param": None, "code": code}
    return LineResponse(status_code, {"error": error})
