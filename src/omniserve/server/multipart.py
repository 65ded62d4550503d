"""multipart/form-data read as it arrives: nothing of a file is gathered here, in memory or on disk."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from omniserve.errors import RequestError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

# The parser itself bounds the headers of a part.
MAX_PARTS = 32


@dataclass(slots=True, eq=False)
class Part:
    """One field of the form; `filename` only where it is a file."""

    name: str
    filename: str | None


@dataclass(slots=True)
class _Reader:
    """What the parser calls; `pieces` gathers what one piece of the body brought."""

    pieces: list[tuple[Part, bytes]] = field(default_factory=list)
    num_parts: int = 0
    has_ended: bool = False
    _part: Part | None = None
    _name: bytes = b""
    _value: bytes = b""
    _disposition: bytes = b""

    def on_part_begin(self) -> None:
        self.num_parts += 1
        self._part, self._disposition = None, b""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = self._value
        self._name = self._value = b""

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options or self.num_parts > MAX_PARTS:
            raise RequestError("file", f"every part of the form needs a name; at most {MAX_PARTS} parts")
        filename = options.get(b"filename")
        self._part = Part(
            options[b"name"].decode("utf-8", "replace"),
            None if filename is None else filename.decode("utf-8", "replace"),
        )
        self.pieces.append((self._part, b""))

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        assert self._part is not None
        self.pieces.append((self._part, data[start:end]))

    def on_end(self) -> None:
        self.has_ended = True


async def form_parts(request: Request) -> AsyncIterator[tuple[Part, bytes]]:
    """Each part with the bytes of it that just came, first with none. RequestError: no such form."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise RequestError("file", "the body must be multipart/form-data with a field 'file'")
    reader = _Reader()
    callbacks: MultipartCallbacks = {
        "on_part_begin": reader.on_part_begin,
        "on_header_field": reader.on_header_field,
        "on_header_value": reader.on_header_value,
        "on_header_end": reader.on_header_end,
        "on_headers_finished": reader.on_headers_finished,
        "on_part_data": reader.on_part_data,
        "on_end": reader.on_end,
    }
    try:
        parser = MultipartParser(options[b"boundary"], callbacks)
        async for chunk in request.stream():
            parser.write(chunk)
            pieces, reader.pieces = reader.pieces, []
            for piece in pieces:
                yield piece
    except FormParserError as error:
        raise RequestError("file", f"the body is not valid multipart/form-data: {error}") from None
    if not reader.has_ended:
        raise RequestError("file", "the body ends before its last part does; send it whole")
