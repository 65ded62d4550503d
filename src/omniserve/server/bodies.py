"""Bodies of requests as JSON objects, the same for every endpoint that takes one."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

from omniserve.server.errors import ApiError, invalid

# A body is looked through for the place of what is wrong up to so many bytes: that takes a few milliseconds.
MAX_SEARCHED_BYTES = 64 * 1024
# Characters of a place that the answer names.
MAX_PATH = 200
_HALF = re.compile(r"[\ud800-\udfff]")
_ESCAPED_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


def decoded(raw: bytes) -> dict[str, Any]:
    """A body as a JSON object, every text of which can be written as UTF-8; ApiError 400."""
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _halved(raw) or _broken(error) from None
    if not isinstance(body, dict):
        raise invalid(None, "the body must be a JSON object", "invalid_json")
    return body


def _broken(error: Exception) -> ApiError:
    return invalid(None, f"the body is not valid JSON in UTF-8: {error}", "invalid_json")


def _halved(raw: bytes) -> ApiError | None:
    """The refusal of what is JSON but for half a surrogate pair, naming the field; None for anything else."""
    if len(raw) > MAX_SEARCHED_BYTES or not _ESCAPED_HALF.search(raw):
        return None
    try:
        path = _path_of_half(json.loads(raw))
    except (ValueError, RecursionError):
        return None
    if path is None:
        return None
    shown = _HALF.sub("?", path.removeprefix("."))[:MAX_PATH]
    message = f"{shown or 'body'}: holds half of a surrogate pair, which is no character; send both"
    return invalid(shown or None, message)


def _path_of_half(value: object) -> str | None:
    """From here to the first text that has no UTF-8, as `.messages[0].content`; None where there is none."""
    if isinstance(value, str):
        return "" if _HALF.search(value) else None
    if isinstance(value, dict):
        for name, one in value.items():
            found = "" if _HALF.search(name) else _path_of_half(one)
            if found is not None:
                return f".{name}{found}"
    if isinstance(value, list):
        for i, one in enumerate(value):
            found = _path_of_half(one)
            if found is not None:
                return f"[{i}]{found}"
    return None
