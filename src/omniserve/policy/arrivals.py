"""What of chat is likely to come soon: how often, how long its prompts are, by when they want an answer.

docs/policy.md, "Newcomers".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from omniserve.policy.request import Order, Request
from omniserve.types import SLO

# What came so long ago counts 1/e.
MEMORY_S = 60.0
# Deviations above the mean of what comes within a TTFT: more comes in one of ten, or fewer.
DEVIATIONS = 1.5
# An arrival of less weight than this in all of a class's is no reason to keep anything free.
LEAST_WEIGHT = 0.01


@dataclass(frozen=True, slots=True)
class Newcomers:
    """Prompts that may arrive from now until the first of them is due: so many alike.

    num_tokens: of all of them, those that no cache holds. slo: their targets.
    """

    service_class: str
    order: Order
    count: int
    num_tokens: int
    slo: SLO

    def first(self, count: int) -> Newcomers:
        """So many of them, or all."""
        if count >= self.count:
            return self
        return replace(self, count=count, num_tokens=math.ceil(self.num_tokens * count / self.count))


@dataclass(slots=True)
class _Seen:
    """Sums over the arrivals of a class, each with the weight exp(-age / MEMORY_S)."""

    rank: int
    at_s: float
    weight: float = 0.0
    tokens: float = 0.0
    squared_tokens: float = 0.0
    ttft_s: float = 0.0
    tpot_s: float = 0.0

    def kept_share(self, now: float) -> float:
        return math.exp(-max(0.0, now - self.at_s) / MEMORY_S)

    def add(self, now: float, num_tokens: float, slo: SLO) -> None:
        kept = self.kept_share(now)
        self.at_s = max(now, self.at_s)
        self.weight = kept * self.weight + 1.0
        self.tokens = kept * self.tokens + num_tokens
        self.squared_tokens = kept * self.squared_tokens + num_tokens**2
        self.ttft_s = kept * self.ttft_s + slo.ttft_s
        self.tpot_s = kept * self.tpot_s + slo.tpot_s


@dataclass(slots=True)
class Arrivals:
    """Every arrival with targets, the refused ones too, by service class."""

    _seen: dict[str, _Seen] = field(default_factory=dict)

    def note(self, request: Request, now: float, num_tokens: int | None) -> None:
        """num_tokens: of its prompt, those that no cache holds; None: not known, taken for a usual one."""
        if request.slo is None:
            return
        seen = self._seen.setdefault(request.service_class, _Seen(request.rank, now))
        tokens = float(request.num_tokens) if num_tokens is None else float(num_tokens)
        if num_tokens is None and seen.weight:
            tokens = seen.tokens / seen.weight
        seen.add(now, tokens, request.slo)

    def newcomers(self, now: float) -> Iterator[Newcomers]:
        """Of each class what may come within its TTFT: the mean and DEVIATIONS of a compound Poisson stream.

        With n arrivals expected in that time, of p tokens in the mean and q in the mean of squares: n p
        tokens, of variance n q. One usual prompt at least.
        """
        for name, seen in self._seen.items():
            kept = seen.kept_share(now)
            weight = kept * seen.weight
            if weight < LEAST_WEIGHT:
                continue
            slo = SLO(seen.ttft_s / seen.weight, seen.tpot_s / seen.weight)
            within = kept * slo.ttft_s / MEMORY_S
            usual = seen.tokens / seen.weight
            burst = within * seen.tokens + DEVIATIONS * math.sqrt(within * seen.squared_tokens)
            tokens = max(usual, burst)
            count = math.ceil(tokens / usual - 1e-9) if usual else 0
            if count:
                order = (seen.rank, 0, now + slo.ttft_s, 0)
                yield Newcomers(name, order, count, max(count, math.ceil(tokens)), slo)
