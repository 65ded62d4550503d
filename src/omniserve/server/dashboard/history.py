"""The last minutes as columns of numbers, and rates of counters. Pure: every time is handed in."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

Number = float | None
# What a chart can show; the answers are a third as long.
SIGNIFICANT_DIGITS = 4


class History:
    """Rows of numbers, a column for each of `names`: those of `span_s` seconds, `max_rows` at most."""

    def __init__(self, names: Sequence[str], span_s: float, max_rows: int) -> None:
        self._names, self._span_s = tuple(names), span_s
        self._rows: deque[tuple[float, tuple[Number, ...]]] = deque(maxlen=max_rows)

    def add(self, at_s: float, values: Mapping[str, Number]) -> None:
        """A row; a name without a value has None. When the clock was set back, the rows before are dropped:
        they would lie in the future."""
        if self._rows and at_s <= self._rows[-1][0]:
            self._rows.clear()
        while self._rows and self._rows[0][0] <= at_s - self._span_s:
            self._rows.popleft()
        self._rows.append((at_s, tuple(_rounded(values.get(name)) for name in self._names)))

    def since(self, after_s: float) -> dict[str, Any]:
        """Rows later than `after_s`, oldest first: {"at_s": [...], "columns": {name: [...]}}."""
        found: list[tuple[float, tuple[Number, ...]]] = []
        for row in reversed(self._rows):
            if row[0] <= after_s:
                break
            found.append(row)
        found.reverse()
        columns = {name: [values[i] for _, values in found] for i, name in enumerate(self._names)}
        return {"at_s": [at_s for at_s, _ in found], "columns": columns}


class Rates:
    """What counters gained per second between two looks at each."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, float]] = {}

    def per_s(self, name: str, now_s: float, total: float) -> Number:
        """None at the first look, and where a counter began anew: that of another engine."""
        last_s, last = self._last.get(name, (now_s, total))
        self._last[name] = (now_s, total)
        return (total - last) / (now_s - last_s) if now_s > last_s and total >= last else None


def _rounded(value: Number) -> Number:
    return None if value is None else float(f"{value:.{SIGNIFICANT_DIGITS}g}")
