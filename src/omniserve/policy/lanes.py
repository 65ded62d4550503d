"""Rules of the lanes: who enters at a layer, and which pass runs next.

The engine applies the entry rule natively, once per layer (csrc, `LanePort::take`); this is the same rule
for the simulator, and a test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WaitingLane:
    """A lane row that left the batch at some layer, in submission order within that layer.

    walk: number of the walk in which it left; ready: its attention result is there.
    """

    slot: int
    walk: int
    ready: bool


def take(waiting: Sequence[WaitingLane], cap: int, walk: int, same_iteration: bool) -> list[int]:
    """Slots that enter at a layer now: those ready, oldest first, at most `cap`.

    With `same_iteration` false a row that left in this very walk stays out (the paper's rule).
    """
    entering = [w.slot for w in waiting if w.ready and (same_iteration or w.walk < walk)]
    return entering[:cap]


def carried_cap(cap: int, carried: int, max_rows: int) -> int:
    """Rows that may enter at a layer: its own cap and what earlier layers left, within the row buffers."""
    return min(cap + carried, max_rows)


def next_pass(num_ready: Sequence[int], oldest: Sequence[int]) -> int | None:
    """The layer whose pass runs next without device rows: most rows ready, the oldest row on a tie.

    num_ready[l]: lanes whose result for layer l is there; oldest[l]: submission number of the oldest of
    them. None when no row is ready.
    """
    best: int | None = None
    for layer, count in enumerate(num_ready):
        if count and (best is None or (-count, oldest[layer]) < (-num_ready[best], oldest[best])):
            best = layer
    return best
