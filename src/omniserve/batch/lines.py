"""Is the input of a batch good? Read from disk line by line, a piece at a time, never as a whole."""

from __future__ import annotations

import codecs
import hashlib
import json
from array import array
from collections.abc import Callable
from typing import Any, BinaryIO

import msgspec

from omniserve.batch.limits import Limits
from omniserve.batch.records import LineError

# A piece is what one call reads at most, unless a single line is longer.
PIECE_LINES, PIECE_BYTES = 256, 1024**2
# What JSON allows around a value; Python's own idea of a blank is wider, and a decoder's is not.
JSON_BLANKS = b" \t\r\n"
# Enough that two custom_ids of a file never share it.
DIGEST_BYTES = 16


class InputLine(msgspec.Struct):
    """A line as the Batch API defines it. The body stays as it came."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _Body(msgspec.Struct):
    model: str


_decode_line = msgspec.json.Decoder(InputLine).decode
_decode_body = msgspec.json.Decoder(_Body).decode


def decode_line(raw: bytes) -> InputLine:
    """A line that was found good before."""
    return _decode_line(raw)


class Validation:
    """Reads an input and keeps of each line where it begins and how long it is, or what is wrong.

    Call `advance` until it returns True. Then `errors` is empty and `numbers`, `offsets`, `lengths` and
    `model` say what there is to run, or the batch is to fail. Lines count from 1. Blank ones are
    passed over, and so is a byte order mark before the first.
    """

    def __init__(
        self,
        source: BinaryIO,
        endpoint: str,
        limits: Limits,
        is_known_model: Callable[[str], bool] = lambda name: True,
    ) -> None:
        self.model: str | None = None
        self.errors: list[LineError] = []
        self.numbers, self.offsets, self.lengths = array("Q"), array("Q"), array("Q")
        self._source, self._endpoint, self._limits = source, endpoint, limits
        self._is_known_model = is_known_model
        self._number, self._offset = 0, 0
        self._seen: dict[bytes, int] = {}

    def advance(self) -> bool:
        """Read the next piece; True when the end, or as many errors as are told, is reached."""
        num_bytes = 0
        for _ in range(PIECE_LINES):
            mark = len(codecs.BOM_UTF8) if self._number == 0 else 0  # it may stand before the first line
            raw = self._source.readline(self._limits.max_line_bytes + 1 + mark)
            if not raw:
                if not self.numbers and not self.errors:
                    self._wrong("empty_file", "the input file holds no request")
                return True
            self._take(raw)
            if len(self.errors) >= self._limits.max_errors or len(self.numbers) > self._limits.max_lines:
                return True
            num_bytes += len(raw)
            if num_bytes >= PIECE_BYTES:
                break
        return False

    def close(self) -> None:
        self._source.close()

    def _take(self, raw: bytes) -> None:
        self._number += 1
        if self._number == 1 and raw.startswith(codecs.BOM_UTF8):
            raw = raw.removeprefix(codecs.BOM_UTF8)
            self._offset = len(codecs.BOM_UTF8)
        begin, self._offset = self._offset, self._offset + len(raw)
        if len(raw) > self._limits.max_line_bytes:
            self._skip_rest()
            self._wrong(
                "line_too_long", f"the line is longer than {self._limits.max_line_bytes} bytes", self._number
            )
        elif text := raw.strip(JSON_BLANKS):
            self._check(text)
            self.numbers.append(self._number)
            self.offsets.append(begin)
            self.lengths.append(len(raw))
            if len(self.numbers) > self._limits.max_lines:
                message = f"the file holds more than {self._limits.max_lines} requests; split it"
                self._wrong("too_many_requests", message, self._number)

    def _skip_rest(self) -> None:
        """Go to the end of a line that is too long, without holding it."""
        while rest := self._source.readline(PIECE_BYTES):
            self._offset += len(rest)
            if rest.endswith(b"\n"):
                break

    def _check(self, text: bytes) -> None:
        try:
            line = _decode_line(text)
            model = _decode_body(line.body).model
        except RecursionError:
            self._wrong("invalid_json_line", "the line is nested too deeply", self._number)
            return
        except (msgspec.DecodeError, UnicodeDecodeError):
            self.errors.append(_diagnose(text, self._number))
            return
        if line.method != "POST":
            self._wrong("invalid_method", f"must be 'POST', got {line.method[:20]!r}", self._number, "method")
        elif line.url != self._endpoint:
            message = f"must be the batch's endpoint {self._endpoint!r}, got {line.url[:80]!r}"
            self._wrong("mismatched_endpoint", message, self._number, "url")
        else:
            self._check_model(model)
        self._check_custom_id(line.custom_id)

    def _check_model(self, model: str) -> None:
        if self.model is None:
            self.model = model
            if not self._is_known_model(model):
                message = f"the model {model[:80]!r} does not exist here; GET /v1/models lists those that do"
                self._wrong("model_not_found", message, self._number, "body.model")
        elif model != self.model:
            message = f"one model per file: {self.model[:80]!r} first, {model[:80]!r} here"
            self._wrong("mismatched_model", message, self._number, "body.model")

    def _check_custom_id(self, custom_id: str) -> None:
        digest = hashlib.blake2b(
            custom_id.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES
        ).digest()
        first = self._seen.setdefault(digest, self._number)
        if first != self._number:
            message = f"{custom_id[:80]!r} is the custom_id of line {first} already"
            self._wrong("duplicate_custom_id", message, self._number, "custom_id")

    def _wrong(self, code: str, message: str, line: int | None = None, param: str | None = None) -> None:
        self.errors.append(LineError(code, message, line, param))


def _diagnose(text: bytes, number: int) -> LineError:
    """Why a line could not be decoded: the first field that is missing or of the wrong type."""
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        return LineError("invalid_json_line", f"the line is not valid JSON: {error}"[:300], number)
    if not isinstance(found, dict):
        return LineError("invalid_json_line", "the line must be a JSON object", number)
    body = found.get("body")
    fields: list[tuple[str, Any, type]] = [
        (name, found.get(name), str) for name in ("custom_id", "method", "url")
    ]
    fields += [
        ("body", body, dict),
        ("body.model", body.get("model") if isinstance(body, dict) else None, str),
    ]
    for name, value, kind in fields:
        if value is None:
            return LineError("missing_required_parameter", f"{name} is missing", number, name)
        if not isinstance(value, kind):
            expected = "text" if kind is str else "an object"
            return LineError("invalid_type", f"{name} must be {expected}", number, name)
    return LineError("invalid_json_line", "the line is not valid JSON in UTF-8", number)
