"""Sends on a socket without ever holding up the caller, be the other end as slow as it likes."""

from __future__ import annotations

import socket
import threading
from collections import deque


class Outbox:
    """What the socket takes at once is sent at once; the rest follows from a thread, in order.

    Once the other end is gone nothing is sent anymore, silently: whoever reads from it notices.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._backlog: deque[bytes | memoryview] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def put(self, message: bytes) -> None:
        with self._changed:
            if self._is_closed:
                return
            rest: bytes | memoryview = message
            if not self._backlog:
                rest = memoryview(message)[self._send_now(message) :]
            if not rest:
                return
            self._backlog.append(rest)
            if self._thread is None:
                self._thread = threading.Thread(target=self._drain, name="omniserve-outbox", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _send_now(self, message: bytes) -> int:
        """Bytes that need not be sent anymore."""
        try:
            return self._socket.send(message, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError:
            return len(message)

    def _drain(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._backlog or self._is_closed)
                if self._is_closed:
                    return
                message = self._backlog[0]  # it stays there until it is sent: nothing may overtake it
            try:
                self._socket.sendall(message)
            except OSError:
                self._stop()
                return
            with self._changed:
                if self._backlog:
                    self._backlog.popleft()

    def _stop(self) -> None:
        with self._changed:
            self._is_closed = True
            self._backlog.clear()
            self._changed.notify()

    def close(self) -> None:
        """To be called when the socket is shut down, which ends a send under way; waits for the thread."""
        self._stop()
        if self._thread is not None:
            self._thread.join()
