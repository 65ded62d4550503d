"""What all scenarios share: the plan of the runs, and how runs of several seeds become one cell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from omniserve.bench.attainment import Attained
from omniserve.bench.slo_run import Result, Timing
from omniserve.bench.slo_setup import Setup
from omniserve.bench.slo_variants import OURS, Variant
from omniserve.bench.slo_verdict import Cell, mean
from omniserve.bench.workloads import BatchJobs
from omniserve.types import SLO

Report = dict[str, Any]
T = TypeVar("T")
Save = Callable[[Report], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What all scenarios share. all_threads: of a device that has the box to itself."""

    setup: Setup
    timing: Timing
    variants: tuple[Variant, ...]
    jobs: BatchJobs
    seeds: tuple[int, ...]
    slo_factors: tuple[float, ...]
    memory_factors: tuple[float, ...]
    all_threads: int
    tune: bool = True

    @property
    def ours(self) -> Variant:
        return next(v for v in self.variants if v.policy == OURS)

    @property
    def middle_slo(self) -> SLO:
        return self.setup.slo(middle(self.slo_factors))


def middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def rotated(items: Sequence[T], plan: Plan, seed: int) -> Iterator[T]:
    """The items, beginning with another one for each seed."""
    first = plan.seeds.index(seed) * len(items) // len(plan.seeds)
    yield from items[first:]
    yield from items[:first]


def cell_of(results: Sequence[Result], slo: SLO) -> Cell:
    """One variant over its seeds, judged by `slo`."""
    reports = [r.ls(slo) for r in results]
    variant = results[0].trial.variant
    return Cell(
        variant.name,
        variant.policy,
        variant.is_baseline,
        tuple(both(r.offered) for r in reports),
        tuple(both(r.admitted) for r in reports),
        tuple(r.be_tokens_per_s() for r in results),
        tuple(r.goodput or 0.0 for r in reports),
    )


def mean_known(values: Sequence[float | None]) -> float | None:
    """Mean of those that are there; None of none."""
    known = [v for v in values if v is not None]
    return mean(known) if known else None


def both(found: Attained | None) -> float:
    """No request at all is no success."""
    return found.both if found is not None and found.both is not None else 0.0


def over_seeds(each: list[dict[str, Any]]) -> dict[str, float | None]:
    """Means of the percentiles of the seeds that have them."""
    return {name: mean_known([e[name] for e in each]) for name in ("p50", "p90", "p99")}
