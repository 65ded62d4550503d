"""Staircase: seconds of work over n rows, from a few measured points; and where to measure next."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Where an interval is split. Tiles have powers of two as sizes: midpoints of such an interval would all lie
# at the same place of their tile, and a staircase seen only there looks like a line.
SPLIT = 0.382


@dataclass(frozen=True, slots=True)
class Staircase:
    """Seconds at `rows` (ascending, from at least 1), linear in between; no rows cost nothing.

    `seconds` never fall: a budget search over n needs that. Beyond the last point goes the line through
    it and the point nearest half of its rows.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, n: float) -> float:
        """Seconds of n rows; a fraction stands for a mean of row counts that differ from layer to layer."""
        rows, seconds = self.rows, self.seconds
        if n <= rows[0]:
            return seconds[0] * min(1.0, max(0.0, n)) if n < 1 else seconds[0]
        i = bisect_left(rows, n)
        if i == len(rows):
            i -= 1
            return seconds[i] + self.last_slope * (n - rows[i])
        low, high = rows[i - 1], rows[i]
        return seconds[i - 1] + (seconds[i] - seconds[i - 1]) * (n - low) / (high - low)

    @property
    def last_slope(self) -> float:
        """Seconds per row beyond the last point."""
        rows, seconds = self.rows, self.seconds
        if len(rows) == 1:
            return seconds[0] / rows[0]
        half = min(range(len(rows) - 1), key=lambda i: abs(rows[i] - rows[-1] / 2))
        return (seconds[-1] - seconds[half]) / (rows[-1] - rows[half])

    def table(self) -> list[float]:
        """Seconds of 0, 1, ... rows up to the last point."""
        return [self.at(n) for n in range(self.rows[-1] + 1)]


def never_falling(seconds: Sequence[float]) -> tuple[float, ...]:
    """The closest sequence (least squares) that never falls: neighbours in the wrong order become their mean.

    Measured rows can cost less than fewer rows, by noise or by another kernel; a search for the largest n
    within a budget must not depend on that.
    """
    blocks: list[tuple[float, int]] = []
    for value in seconds:
        mean, count = value, 1
        while blocks and blocks[-1][0] > mean:
            last_mean, last_count = blocks.pop()
            mean = (mean * count + last_mean * last_count) / (count + last_count)
            count += last_count
        blocks.append((mean, count))
    return tuple(mean for mean, count in blocks for _ in range(count))


def find_steps(
    measure: Callable[[int], float],
    max_rows: int,
    tolerance: float,
    may_go_on: Callable[[int], bool] = lambda num_points: True,
) -> dict[int, float]:
    """Measured points that describe a staircase of 1..max_rows rows: the paper's Algorithm 1, corrected.

    The paper splits an interval in the middle while its ends differ by more than latency(16) - latency(1).
    That stops on no step wider than its threshold, but measures long even slopes to the last row, and its
    threshold is noise where one row costs as much as sixteen. Here every interval carries a bound on what
    interpolation can miss, the rise between its ends at first; the interval with the largest bound relative
    to its time is split next, until no bound exceeds `tolerance` or `may_go_on(points so far)` says stop. An
    interval whose new point lies on the line of its ends passes a smaller bound to its halves.
    """
    points = {1: measure(1)}
    if max_rows > 1:
        points[max_rows] = measure(max_rows)
    bounds = {(1, max_rows): abs(points[max_rows] - points[1])}
    while bounds and may_go_on(len(points)):
        low, high = max(bounds, key=lambda ends: bounds[ends] / points[ends[0]])
        bound = bounds.pop((low, high))
        if high - low < 2 or bound <= tolerance * points[low]:
            continue
        middle = low + min(high - low - 1, max(1, round(SPLIT * (high - low))))
        points[middle] = measure(middle)
        line = points[low] + (points[high] - points[low]) * (middle - low) / (high - low)
        missed = abs(points[middle] - line)
        for ends in ((low, middle), (middle, high)):
            rise = abs(points[ends[1]] - points[ends[0]])
            bounds[ends] = min(rise, max(bound / 6, 3 * missed))
    return dict(sorted(points.items()))
