"""Whether requests keep their targets, now: one judgement of each that ends, and a sliding window of them.

Pure: every time is handed in. Definitions are those of the reports (bench/attainment.py):

attains     the request finished, its first token within its TTFT target of its arrival, its later tokens
            within its TPOT target on average; a text of one token has no TPOT and misses none
offered     every request of a class with targets that ended, those that were refused, failed, timed out or
            were cancelled by the server too, and those whose client went away when they were late already.
            Left out: what no server could have kept, namely requests that are invalid and clients that went
            away in time
attainment  share of the offered requests that attain
goodput     requests per second that attain
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from omniserve.types import SLO, ServiceClass

WINDOW_S = 300.0
# Percentiles are of so many of the newest values at most, whatever the load: a scrape stays cheap.
MAX_SAMPLES = 4096

Outcome = Literal["finished", "refused", "failed", "left"]
Missed = Literal["ttft", "tpot", "refused", "failed"]
MISSED: tuple[Missed, ...] = ("ttft", "tpot", "refused", "failed")


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that ended.

    outcome: "refused": it was turned away without being run; "failed": it ended by the server's doing
    otherwise than finished; "left": its client went away. slo: its targets; None: it has none. ttft_s:
    arrival to its first token; of one left before that, to its end. tpot_s: mean over its later ones, the
    slowest of several texts; None where there is none.
    """

    service_class: str
    outcome: Outcome
    slo: SLO | None
    ttft_s: float | None = None
    tpot_s: float | None = None


def missed(ended: Ended, slo: SLO) -> Missed | None:
    """What a request missed, the first token before the later ones; None: it attains, or was left in time."""
    if ended.outcome in ("refused", "failed"):
        return ended.outcome
    if ended.ttft_s is None or ended.ttft_s > slo.ttft_s:
        return "ttft"
    return "tpot" if ended.tpot_s is not None and ended.tpot_s > slo.tpot_s else None


@dataclass(frozen=True, slots=True)
class ClassSnapshot:
    """One class over the window.

    attainment: 0 to 1; None when nothing was offered. goodput_per_s: requests per second; None for a class
    without targets. num_offered: of requests with targets. Percentiles: seconds, of requests that finished,
    with targets or without; None when none did.
    """

    attainment: float | None
    goodput_per_s: float | None
    num_offered: int
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p99_s: float | None


class LiveAttainment:
    """What became of the requests of the last `window_s` seconds, by class. A request counts when it ends."""

    def __init__(self, classes: Iterable[ServiceClass], started_s: float, window_s: float = WINDOW_S) -> None:
        """started_s: since when there are requests, on the clock of every `now_s`, which never goes back."""
        self._started_s, self._window_s = started_s, window_s
        self._of_class = {kind.name: _Window(kind.slo is not None) for kind in classes}

    def note(self, ended: Ended, now_s: float) -> Missed | None:
        """Take in a request that ended now; what it missed, None too where it has no targets or was left in
        time."""
        window = self._of_class[ended.service_class]
        window.forget(now_s - self._window_s)
        if ended.outcome == "finished":
            for samples, value in ((window.ttft_s, ended.ttft_s), (window.tpot_s, ended.tpot_s)):
                if value is not None:
                    samples.append((now_s, value))
        if ended.slo is None:
            return None
        what = missed(ended, ended.slo)
        if what is not None or ended.outcome != "left":
            window.judge(now_s, what is None)
        return what

    def snapshot(self, now_s: float) -> dict[str, ClassSnapshot]:
        """By name of the class; of a server that is younger than the window, over its life so far."""
        elapsed_s = min(self._window_s, now_s - self._started_s)
        found = {}
        for name, window in self._of_class.items():
            window.forget(now_s - self._window_s)
            found[name] = window.snapshot(elapsed_s)
        return found


@dataclass(slots=True)
class _Window:
    """Of one class. Each entry: when it ended, and its value. Counts are kept, not summed up each time."""

    has_targets: bool
    judged: deque[tuple[float, bool]] = field(default_factory=deque)
    num_met: int = 0
    ttft_s: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=MAX_SAMPLES))
    tpot_s: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=MAX_SAMPLES))

    def judge(self, now_s: float, is_met: bool) -> None:
        self.judged.append((now_s, is_met))
        self.num_met += is_met

    def forget(self, until_s: float) -> None:
        while self.judged and self.judged[0][0] <= until_s:
            self.num_met -= self.judged.popleft()[1]
        for samples in (self.ttft_s, self.tpot_s):
            while samples and samples[0][0] <= until_s:
                samples.popleft()

    def snapshot(self, elapsed_s: float) -> ClassSnapshot:
        offered = len(self.judged)
        goodput = self.num_met / elapsed_s if elapsed_s > 0 else 0.0
        ttft_s, tpot_s = (sorted(value for _, value in of) for of in (self.ttft_s, self.tpot_s))
        return ClassSnapshot(
            attainment=self.num_met / offered if offered else None,
            goodput_per_s=goodput if self.has_targets else None,
            num_offered=offered,
            ttft_p50_s=_percentile(ttft_s, 0.5),
            ttft_p99_s=_percentile(ttft_s, 0.99),
            tpot_p50_s=_percentile(tpot_s, 0.5),
            tpot_p99_s=_percentile(tpot_s, 0.99),
        )


def _percentile(ordered: Sequence[float], share: float) -> float | None:
    """The least value that `share` (0 to 1) of the values do not exceed; None of no values."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None
