"""How fast lines are being finished, from what was just finished. Pure: time is handed in."""

from __future__ import annotations

from collections import deque

WINDOW_S = 300.0


class Pace:
    """Lines per second over the last minutes in which lines ran; times without any do not count."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._busy_s = 0.0
        self._since_s: float | None = None
        self._finished: deque[tuple[float, int]] = deque()

    def began(self, now_s: float) -> None:
        """A line runs; says nothing new when another did already."""
        self._since_s = now_s if self._since_s is None else self._since_s

    def ended(self, now_s: float) -> None:
        """No line runs any more."""
        self._busy_s, self._since_s = self._busy_at(now_s), None

    def finished(self, count: int, now_s: float) -> None:
        self._finished.append((self._busy_at(now_s), count))
        self._forget(now_s)

    def lines_per_s(self, now_s: float) -> float | None:
        """None while nothing was finished in the window."""
        self._forget(now_s)
        elapsed_s = min(self._busy_at(now_s), self._window_s)
        if not self._finished or elapsed_s <= 0:
            return None
        return sum(count for _, count in self._finished) / elapsed_s

    def _busy_at(self, now_s: float) -> float:
        return self._busy_s + (0.0 if self._since_s is None else now_s - self._since_s)

    def _forget(self, now_s: float) -> None:
        while self._finished and self._finished[0][0] <= self._busy_at(now_s) - self._window_s:
            self._finished.popleft()
