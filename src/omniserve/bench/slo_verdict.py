"""Judgement over cells of one table: who holds the targets, whose batch work counts, is the load hard enough.

A cell is a variant at one memory cap and one pair of targets, over all seeds. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from omniserve.bench.slo_variants import OURS, REFERENCE

# Within so much of the reference's attainment a policy holds the targets.
POINT = 0.01
# Unless a baseline falls below, the load proves nothing.
HARD = 0.80
# The automatic choice of placement reaches so much of the better fixed one.
NEAR = 0.95
# Of the admitted requests under overload, so many are in time.
KEPT = 0.95


@dataclass(frozen=True, slots=True)
class Cell:
    """offered, admitted: attainment of both targets per seed; be_tokens_per_s and goodput per seed."""

    variant: str
    policy: str
    is_baseline: bool
    offered: tuple[float, ...]
    admitted: tuple[float, ...]
    be_tokens_per_s: tuple[float, ...]
    goodput: tuple[float, ...]

    @property
    def attainment(self) -> float:
        return mean(self.offered)

    @property
    def be_rate(self) -> float:
        return mean(self.be_tokens_per_s)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Over one table. Names are variants'; None: nothing to compare.

    within_point: ours holds the targets as well as the reference, to POINT. best_baseline: of those that hold
    them, the one with most batch tokens. be_ratio: ours over that one. hardest: lowest attainment of a
    baseline; too_easy: it is not below HARD, or there is no baseline at all.
    """

    within_point: bool
    gap: float
    best_baseline: str | None
    be_ratio: float | None
    hardest: float | None
    too_easy: bool


def is_within_point(attainment: float, of_reference: float) -> bool:
    # Attainments are counts over counts: half a request is no difference.
    return attainment >= of_reference - POINT - 1e-9


def holds(cell: Cell, reference: Cell) -> bool:
    return is_within_point(cell.attainment, reference.attainment)


def better(cells: Sequence[Cell], reference: Cell) -> Cell:
    """The one that counts among settings of one policy: of those that hold, most batch tokens; else whoever
    comes nearest to holding."""
    holding = [c for c in cells if holds(c, reference)]
    if holding:
        return max(holding, key=lambda c: c.be_rate)
    return max(cells, key=lambda c: (c.attainment, c.be_rate))


def judge(cells: Sequence[Cell]) -> Verdict:
    """The verdict over one table, which holds ours and the reference."""
    ours = next(c for c in cells if c.policy == OURS)
    reference = next(c for c in cells if c.policy == REFERENCE)
    baselines = [c for c in cells if c.is_baseline]
    holding = [c for c in baselines if holds(c, reference)]
    best = max(holding, key=lambda c: c.be_rate, default=None)
    # A baseline is given by its better setting: a bad one must not make the load look hard.
    policies = {c.policy for c in baselines}
    counting = [better([c for c in baselines if c.policy == p], reference) for p in policies]
    hardest = min((c.attainment for c in counting), default=None)
    return Verdict(
        within_point=holds(ours, reference),
        gap=ours.attainment - reference.attainment,
        best_baseline=best.variant if best else None,
        be_ratio=ours.be_rate / best.be_rate if best and best.be_rate else None,
        hardest=hardest,
        too_easy=hardest is None or hardest >= HARD,
    )


def counts(cell: Cell, cells: Sequence[Cell]) -> bool:
    """Whether this is the setting of its policy that counts."""
    reference = next(c for c in cells if c.policy == REFERENCE)
    return better([c for c in cells if c.policy == cell.policy], reference) is cell


@dataclass(frozen=True, slots=True)
class Placement:
    """The automatic choice, "auto", and the fixed ones at the same threads, "lanes" and "device".

    rates: batch tokens/s; attained: of the latency-sensitive requests beside them; reference: by ls_only.
    """

    rates: Mapping[str, float]
    attained: Mapping[str, float]
    reference: float

    def holds(self, choice: str) -> bool:
        return is_within_point(self.attained[choice], self.reference)

    @property
    def winner(self) -> str | None:
        """Of the fixed choices that hold the targets, the one with most batch tokens; None: neither holds."""
        holding = [choice for choice in ("lanes", "device") if self.holds(choice)]
        return max(holding, key=self.rates.__getitem__, default=None)

    @property
    def share(self) -> float | None:
        """Of the winner's rate that the automatic choice reaches; None where the winner makes none."""
        best = self.rates[self.winner] if self.winner else 0.0
        return self.rates["auto"] / best if best else None

    @property
    def is_near(self) -> bool | None:
        """Whether the automatic choice holds the targets and comes near the winner; None: not known, for
        there is nothing to come near to."""
        return None if self.share is None else self.holds("auto") and self.share >= NEAR
