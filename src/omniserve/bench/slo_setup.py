"""The set-up that can not be gamed: rate, targets and memory all come from `ls_only` on this machine, now."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from omniserve.bench.attainment import latency
from omniserve.bench.measure import percentile
from omniserve.bench.slo_run import Result, RunOne, Timing, Traffic, Trial, bytes_per_page
from omniserve.bench.slo_variants import REFERENCE, Variant
from omniserve.bench.workloads import BatchJobs
from omniserve.errors import OmniServeError
from omniserve.types import LATENCY_SENSITIVE, SLO

# The reference's memory: far more than it uses, so that its page use shows what it wants.
ROOMY_BYTES = 1 << 30
CAPACITY_S = 30.0
MIN_REQUESTS = 20


@dataclass(frozen=True, slots=True)
class Setup:
    """capacity, rate: requests/s. p95 of the reference in seconds; its P99 use of device pages."""

    capacity: float
    rate: float
    ttft_p95_s: float
    tpot_p95_s: float
    pages_p99: int
    page_bytes: int
    page_size: int

    def slo(self, factor: float) -> SLO:
        return SLO(factor * self.ttft_p95_s, factor * self.tpot_p95_s)

    def memory(self, factor: float) -> Memory:
        pages = math.ceil(self.pages_p99 * factor)
        return Memory(factor, pages * self.page_bytes, pages * self.page_size)


@dataclass(frozen=True, slots=True)
class Memory:
    """A cap of the device's KV memory: times the reference's page use; in bytes and tokens."""

    factor: float
    num_bytes: int
    tokens: int

    def fit(self, jobs: BatchJobs) -> BatchJobs:
        """The batch jobs that the device could hold at all; the same ones for everybody.

        An engine refuses a job whose whole context exceeds the device's memory, and without a host it must.
        """
        if jobs.low > self.tokens:
            raise OmniServeError(
                f"batch contexts: the shortest, {jobs.low} tokens, exceed the {self.tokens} tokens of a "
                f"device with {self.factor:g} times the reference's page use; lower --be-context, or raise "
                "--load-factor, --length-scale or --memory-factors"
            )
        return replace(jobs, high=min(jobs.high, self.tokens))

    def cut(self, jobs: BatchJobs) -> dict[str, Any]:
        """What `fit` does to these jobs: contexts asked for and used, [low, high] in tokens, and the share
        of those asked for that is longer than the device can hold. All are drawn from the narrower range."""
        fitting = self.fit(jobs)
        return {
            "asked": [jobs.low, jobs.high],
            "used": [fitting.low, fitting.high],
            "share_too_long": jobs.share_longer(fitting.high),
        }


def measure_setup(
    run_one: RunOne,
    timing: Timing,
    traffic: Traffic,
    variant: Variant,
    seeds: Sequence[int],
    page_size: int,
    load_factor: float,
    rate: float | None,
) -> tuple[Setup, list[Result]]:
    """Capacity of the reference, then its latencies and page use at the rate of the benchmark."""
    brief = replace(timing, duration_s=min(timing.duration_s, CAPACITY_S))
    full = run_one(
        Trial(variant, seeds[0], 0.0, saturated=True, device_memory_bytes=ROOMY_BYTES), brief, "capacity"
    )
    capacity = full.ls().tokens_per_s / traffic.mean_output
    if capacity <= 0:
        raise OmniServeError("capacity: no request made a token in the time; raise --duration or --warmup")
    rate = rate or load_factor * capacity
    results = [
        run_one(Trial(variant, seed, rate, device_memory_bytes=ROOMY_BYTES), timing, "reference")
        for seed in seeds
    ]
    due = [r for result in results for r in result.due(LATENCY_SENSITIVE.name)]
    ttft, tpot = (latency([getattr(r, name) for r in due]) for name in ("ttft_s", "tpot_s"))
    if ttft.p95 is None or tpot.p95 is None or ttft.count < MIN_REQUESTS:
        raise OmniServeError(
            f"reference: {ttft.count} requests in {timing.duration_s:g} s at {rate:.2g}/s, at least "
            f"{MIN_REQUESTS} are needed for a 95th percentile; raise --duration or lower --length-scale"
        )
    pages = percentile([p for result in results for p in result.pages], 0.99)
    setup = Setup(
        capacity,
        rate,
        ttft.p95,
        tpot.p95,
        max(1, math.ceil(pages)),
        bytes_per_page(results[0], ROOMY_BYTES),
        page_size,
    )
    return setup, results


def reference_of(variants: Sequence[Variant]) -> Variant:
    return next(v for v in variants if v.policy == REFERENCE)
