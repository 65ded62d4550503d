"""Result lines in OpenAI's format, and the tokens they report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from omniserve.batch.records import LineResult, Usage

# Why a line has no response, in words.
NEVER_RUN = {
    "batch_expired": "This request could not be executed before the completion window expired.",
    "batch_cancelled": "This request was not executed because the batch was cancelled.",
}


def request_id_of(batch_id: str, number: int) -> str:
    """The same whenever the line runs, and of no other line."""
    return f"batch_req_{batch_id.removeprefix('batch_')}_{number:05d}"


def answered(
    batch_id: str, number: int, custom_id: str, status_code: int, body: Mapping[str, Any]
) -> LineResult:
    """The line was run and answered; a success has status 2xx."""
    request_id = request_id_of(batch_id, number)
    is_success = 200 <= status_code < 300
    response = {"status_code": status_code, "request_id": request_id, "body": body}
    data = _encoded(request_id, custom_id, response, None)
    return LineResult(number, data, is_success, usage_of(body) if is_success else Usage())


def never_run(batch_id: str, number: int, custom_id: str, code: str) -> LineResult:
    """The line was never run; `code` is one of NEVER_RUN."""
    error = {"code": code, "message": NEVER_RUN[code]}
    return LineResult(number, _encoded(request_id_of(batch_id, number), custom_id, None, error), False)


def _encoded(
    request_id: str, custom_id: str, response: Mapping[str, Any] | None, error: Mapping[str, str] | None
) -> bytes:
    line = {"id": request_id, "custom_id": custom_id, "response": response, "error": error}
    return msgspec.json.encode(line) + b"\n"


def usage_of(body: Mapping[str, Any]) -> Usage:
    """Tokens by the `usage` of a response; what it does not say counts as none."""
    usage = _mapping(body.get("usage"))
    return Usage(
        _count(usage.get("prompt_tokens")),
        _count(_mapping(usage.get("prompt_tokens_details")).get("cached_tokens")),
        _count(usage.get("completion_tokens")),
        _count(_mapping(usage.get("completion_tokens_details")).get("reasoning_tokens")),
    )


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0
