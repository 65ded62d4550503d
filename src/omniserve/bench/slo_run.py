"""One measured run: an engine of its own, a load, records and what the engine says of itself meanwhile."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle
from typing import Any

from omniserve.bench.attainment import ClassReport, Record, class_report, due_between
from omniserve.bench.load import Backlog, InProcess, Load, Stream, send_load
from omniserve.bench.measure import percentile
from omniserve.bench.slo_variants import Variant, device_rows, engine_settings
from omniserve.bench.workloads import Arrival, BatchJobs, Lengths, at_rate, between
from omniserve.bench.workloads import stream as drawn_stream
from omniserve.types import BEST_EFFORT, LATENCY_SENSITIVE, SLO

SAMPLE_S = 0.5
# Counters of the engine whose growth within the window a run reports.
COUNTERS = (
    "num_lane_tokens",
    "device_tokens",
    "prompt_tokens",
    "walk_s",
    "pass_s",
    "starved_s",
    "host_busy_s",
    "num_dropped",
    "num_displaced",
    "num_swapped_in",
    "num_broken_promises",
)


@dataclass(frozen=True, slots=True)
class Traffic:
    """The latency-sensitive stream: lengths drawn and gamma arrivals, or a trace stretched to the rate."""

    lengths: Lengths
    burstiness: float = 1.0
    trace: tuple[Arrival, ...] | None = None

    def arrivals(self, rate: float, duration_s: float, seed: int) -> list[Arrival]:
        """One seed, one stream; of a trace, each seed has a part of its own while there is enough of it."""
        if self.trace is None:
            return drawn_stream(self.lengths, rate, duration_s, seed, self.burstiness)
        whole = at_rate(self.trace, rate)
        begin_s = (seed * duration_s) % max(whole[-1].at_s - duration_s, duration_s)
        return between(whole, begin_s, begin_s + duration_s)

    def sizes(self, seed: int) -> Iterator[tuple[int, int]]:
        """Prompt and output tokens of one request after the other, without end."""
        if self.trace is not None:
            yield from cycle((a.num_prompt, a.num_output) for a in self.trace)
        rng = random.Random(f"{seed} sizes")
        while True:
            yield self.lengths.draw(rng)

    @property
    def mean_output(self) -> float:
        if self.trace is None:
            return self.lengths.output.mean
        return sum(a.num_output for a in self.trace) / len(self.trace)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one run. Requests and tokens of the warm-up do not count."""

    warmup_s: float
    duration_s: float
    drain_s: float

    @property
    def total_s(self) -> float:
        return self.warmup_s + self.duration_s

    @property
    def window(self) -> tuple[float, float]:
        return self.warmup_s, self.total_s


@dataclass(frozen=True, slots=True)
class Trial:
    """One run to be made. rate: latency-sensitive requests/s, 0 for none; jobs: the batch backlog, if any.

    saturated: the latency-sensitive requests are kept in a backlog instead: what the engine can do at most.
    arrivals: those to send, in place of the traffic's at `rate`.
    """

    variant: Variant
    seed: int
    rate: float
    jobs: BatchJobs | None = None
    device_memory_bytes: int | None = None
    slo: SLO | None = None
    saturated: bool = False
    arrivals: tuple[Arrival, ...] | None = None

    def sent(self, traffic: Traffic, timing: Timing) -> Sequence[Arrival]:
        """The latency-sensitive stream."""
        if self.arrivals is not None:
            return self.arrivals
        return traffic.arrivals(self.rate, timing.total_s, self.seed) if self.rate > 0 else ()


@dataclass(slots=True)
class Result:
    """What a trial gave. pages: device pages held by latency-sensitive requests, one sample each SAMPLE_S."""

    trial: Trial
    timing: Timing
    settings: dict[str, Any]
    records: list[Record] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    device_pages: int = 0
    counters: dict[str, float] = field(default_factory=dict)

    def due(self, service_class: str) -> list[Record]:
        """The requests of one class that count."""
        return due_between([r for r in self.records if r.service_class == service_class], *self.timing.window)

    def ls(self, slo: SLO | None = None) -> ClassReport:
        return class_report(self.records, LATENCY_SENSITIVE.name, self.timing.window, slo)

    def be(self) -> ClassReport:
        return class_report(self.records, BEST_EFFORT.name, self.timing.window)

    def be_tokens_per_s(self) -> float:
        return self.be().tokens_per_s

    def as_dict(self, slos: dict[str, SLO]) -> dict[str, Any]:
        """Plain data for the report; the latency-sensitive class judged by each of the targets."""
        due = self.due(LATENCY_SENSITIVE.name)
        late = [r.sent_s - r.due_s for r in due]
        return {
            "variant": self.trial.variant.name,
            "seed": self.trial.seed,
            "settings": _plain(self.settings),
            "device_rows": device_rows(self.settings),
            "rate": self.trial.rate,
            "latency_sensitive": {name: asdict(self.ls(slo)) for name, slo in slos.items()},
            "best_effort": asdict(self.be()),
            "ls_pages_p99": percentile(self.pages, 0.99) if self.pages else None,
            "sender_late_p99_s": percentile(late, 0.99) if late else None,
            "reasons": sorted({r.reason for r in due if r.reason})[:5],
            "engine": self.counters,
        }


# One trial, for so long, under a name that a person can follow.
RunOne = Callable[[Trial, Timing, str], Result]


def run_trial(
    trial: Trial,
    timing: Timing,
    traffic: Traffic,
    depth: int,
    model: str,
    on_tick: Callable[[float], None] | None = None,
) -> Result:
    """Start an engine, send the load, end the engine. depth: requests kept in a backlog."""
    settings = {"model": model, **engine_settings(trial.variant, trial.device_memory_bytes, trial.slo)}
    result = Result(trial, timing, settings)
    asyncio.run(_run(result, _load(trial, timing, traffic, depth), on_tick))
    return result


def _load(trial: Trial, timing: Timing, traffic: Traffic, depth: int) -> Load:
    backlog = None
    if trial.saturated:
        backlog = Backlog(LATENCY_SENSITIVE.name, depth, traffic.sizes(trial.seed))
    elif trial.jobs is not None:
        backlog = Backlog(BEST_EFFORT.name, depth, trial.jobs.draw(trial.seed))
    stream = Stream(LATENCY_SENSITIVE.name, trial.sent(traffic, timing))
    return Load([stream], timing.total_s, backlog, drain_s=timing.drain_s, seed=trial.seed)


async def _run(result: Result, load: Load, on_tick: Callable[[float], None] | None) -> None:
    from omniserve.engine.async_llm import AsyncLLM

    llm = AsyncLLM(**result.settings)
    samples: list[tuple[float, dict[str, Any]]] = []
    try:
        loop = asyncio.get_running_loop()
        began_s = loop.time()

        async def sample() -> None:
            while True:
                stats = await llm.stats()
                samples.append((loop.time() - began_s, stats))
                await asyncio.sleep(SAMPLE_S)

        sampler = asyncio.create_task(sample())
        try:
            result.records = await send_load(InProcess(llm), load, on_tick)
        finally:
            sampler.cancel()
            await asyncio.gather(sampler, return_exceptions=True)
    finally:
        llm.close()
    _note_samples(result, samples)


def _note_samples(result: Result, samples: list[tuple[float, dict[str, Any]]]) -> None:
    begin_s, end_s = result.timing.window
    inside = [stats for at_s, stats in samples if begin_s <= at_s <= end_s]
    if not inside:
        return
    result.pages = [int(stats["pages"]["device_latency_sensitive"]) for stats in inside]
    result.device_pages = int(inside[0]["pages"]["device_total"])
    first, last = inside[0], inside[-1]
    result.counters = {name: last[name] - first[name] for name in COUNTERS if name in first}


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON takes them."""
    return {
        name: [asdict(c) for c in value] if name == "classes" else value for name, value in settings.items()
    }


def bytes_per_page(result: Result, device_memory_bytes: int) -> int:
    """Of the device's KV memory, rounded up, from a run whose memory is known."""
    return math.ceil(device_memory_bytes / result.device_pages)
