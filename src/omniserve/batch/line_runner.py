"""The seam between batches and whatever answers their lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from omniserve.batch.records import Line

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


class LineRunner(Protocol):
    async def run_line(
        self, owner: str, endpoint: str, body: Mapping[str, Any], request_id: str, seconds_left: float
    ) -> LineResponse:
        """Answer one request as the endpoint would its batch's owner.

        `seconds_left`: until its batch expires, never negative.

        Raises EngineGone. Being cancelled means that nobody wants the answer any more.
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
    """A line of an input, decoded. `body` is None where its JSON cannot be."""

    custom_id: str
    body: dict[str, Any] | None


class _Line(msgspec.Struct):
    custom_id: str
    body: msgspec.Raw


def decode_request(line: Line) -> Request:
    """Of a line that passed validation, which reads a body only as far as it must."""
    found = msgspec.json.decode(line.raw, type=_Line)
    try:
        body = msgspec.json.decode(found.body, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return Request(found.custom_id, None)
    return Request(found.custom_id, body)


def failure(status_code: int, message: str, kind: str, code: str) -> LineResponse:
    """An answer of our own making, in the endpoint's error format."""
    error = {"message": message, "type": kind, "param": None, "code": code}
    return LineResponse(status_code, {"error": error})
