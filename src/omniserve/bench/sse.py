"""Server-sent events out of the bytes of a stream. Pure."""

from __future__ import annotations


class EventStream:
    """Cuts a stream of bytes into the data of its events; comments and other fields are passed over."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, received: bytes) -> list[str]:
        """The data of the events that these bytes complete. A character cut in two waits for its rest."""
        *lines, self._rest = (self._rest + received).split(b"\n")
        complete = []
        for line in lines:
            field, _, value = line.removesuffix(b"\r").decode("utf-8", errors="replace").partition(":")
            if field == "data":
                self._data.append(value.removeprefix(" "))
            elif not field and not value and self._data:
                complete.append("\n".join(self._data))
                self._data = []
        return complete
