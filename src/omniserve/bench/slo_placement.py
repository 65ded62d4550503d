"""Where batch work should decode, by context length and memory cap; whether `auto` finds out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from itertools import product

from omniserve.bench.slo_plan import Plan, Report, Save, both, mean_known, rotated
from omniserve.bench.slo_run import Result, RunOne, Trial
from omniserve.bench.slo_setup import Memory
from omniserve.bench.slo_variants import Variant
from omniserve.bench.slo_verdict import Placement, mean
from omniserve.config import HostOffload


@dataclass(slots=True)
class Spot:
    """One context length at one memory cap, per seed of each choice: batch tokens/s, attainment.

    context is that of a job at its end; contexts: what decode attention really read, mean over the seeds.
    """

    context: int
    memory_factor: float
    rates: dict[str, list[float]] = field(default_factory=dict)
    offered: dict[str, list[float]] = field(default_factory=dict)
    contexts: dict[str, float | None] = field(default_factory=dict)


CONTEXTS = (256, 1024, 4096)
CHOICES: dict[str, HostOffload] = {"auto": "auto", "lanes": "always", "device": "never"}
WHOLE_BOX = "device, all cores"


def num_placement_runs(plan: Plan) -> int:
    spots = sum(c <= plan.setup.memory(f).tokens for f in plan.memory_factors for c in CONTEXTS)
    return spots * len(plan.seeds) * len(_choices(plan))


def run_placement(plan: Plan, run_one: RunOne, save: Save) -> Report:
    """Batch tokens/s by context length and memory cap, beside the latency-sensitive stream: decode chosen by
    the engine, always by host attention, never. The device with all cores is shown too: it is another split
    of the machine, which no choice at run time reaches."""
    report: Report = {"slo": asdict(plan.middle_slo), "spots": [], "left_out": []}
    for memory, context in product(map(plan.setup.memory, plan.memory_factors), CONTEXTS):
        if context > memory.tokens:
            left_out = {"context": context, "memory_factor": memory.factor, "device_tokens": memory.tokens}
            report["left_out"].append(left_out)
            continue
        spot = _measure_spot(plan, memory, context, run_one)
        report["spots"].append(asdict(spot) | placement_verdict(spot))
        save(report)
    return report


def _measure_spot(plan: Plan, memory: Memory, context: int, run_one: RunOne) -> Spot:
    jobs, slo = replace(plan.jobs, low=context, high=context), plan.middle_slo
    results: dict[str, list[Result]] = {name: [] for name in _choices(plan)}
    for seed in plan.seeds:
        for name, variant in rotated(list(_choices(plan).items()), plan, seed):
            trial = Trial(variant, seed, plan.setup.rate, jobs, memory.num_bytes, slo)
            results[name].append(run_one(trial, plan.timing, f"context {context}, memory x{memory.factor:g}"))
    return Spot(
        context,
        memory.factor,
        {name: [r.be_tokens_per_s() for r in each] for name, each in results.items()},
        {name: [both(r.ls(slo).offered) for r in each] for name, each in results.items()},
        {name: mean_known([r.be().context for r in each]) for name, each in results.items()},
    )


def _choices(plan: Plan) -> dict[str, Variant]:
    found = {name: replace(plan.ours, host_offload=offload) for name, offload in CHOICES.items()}
    if plan.ours.device_threads != plan.all_threads:
        found[WHOLE_BOX] = replace(plan.ours, host_offload="never", device_threads=plan.all_threads)
    return found


def placement_verdict(spot: Spot) -> Report:
    found = Placement(*(mean(spot.rates[name]) for name in CHOICES))
    return {"winner": found.winner, "auto_share_of_winner": found.share, "is_near": found.is_near}
