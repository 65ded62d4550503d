"""How much admission's predictions are to be doubted, learned from what became of those admitted.

A forecast that is right on average is late for half of those whom it puts just within their target. That
hardly matters while few come near it; under overload nearly all do. docs/policy.md, "Admission".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from omniserve.policy.request import Request

# Of those admitted, so many may miss a target.
MISSES = 0.02
# A miss adds this to the factor; as many as MISSES allows take it away again.
STEP = 0.05
# What was added is forgotten: 1/e of it is left after so long.
MEMORY_S = 120.0
# At most so much is doubted, however many have missed.
MOST = 2.0
# A chat near its TTFT mostly comes sooner than forecast, for others end meanwhile: where all are in time, a
# tenth is trusted. A TPOT is not: what one chat takes too long, all the others do.
LEAST_TTFT, LEAST_TPOT = 0.9, 1.0


@dataclass(slots=True)
class Caution:
    """By what a prediction is multiplied so that a share MISSES of those admitted by it miss their target.

    One step up for a miss, a small one down for each that was met, until both are in balance: adaptive
    conformal inference (Gibbs and Candes, NeurIPS 2021).
    """

    least: float
    _factor: float = 1.0
    _at_s: float = 0.0

    def factor(self, now: float) -> float:
        kept = math.exp(-max(0.0, now - self._at_s) / MEMORY_S)
        return 1.0 + kept * (self._factor - 1.0)

    def note(self, is_missed: bool, now: float) -> None:
        change = STEP * (1.0 - MISSES if is_missed else -MISSES)
        self._factor = min(MOST, max(self.least, self.factor(now) + change))
        self._at_s = now


@dataclass(slots=True)
class Promises:
    """What became of the targets of those admitted."""

    ttft: Caution = field(default_factory=lambda: Caution(LEAST_TTFT))
    tpot: Caution = field(default_factory=lambda: Caution(LEAST_TPOT))

    def note_first_token(self, request: Request, now: float) -> None:
        if request.slo is not None:
            self.ttft.note(now - request.arrival_s > request.slo.ttft_s, now)

    def note_end(self, request: Request, now: float) -> None:
        """After its last token."""
        if request.slo is None or request.first_token_s is None or request.num_out < 2:
            return
        tpot_s = (now - request.first_token_s) / (request.num_out - 1)
        self.tpot.note(tpot_s > request.slo.tpot_s, now)
