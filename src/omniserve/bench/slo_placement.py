"""Where batch work should decode, by context length and memory cap; whether `auto` finds out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

from omniserve.bench.slo_plan import Plan, Report, RunOne, Save
from omniserve.bench.slo_run import Trial
from omniserve.bench.slo_variants import Variant
from omniserve.bench.slo_verdict import Placement, mean
from omniserve.config import HostOffload


@dataclass(slots=True)
class Spot:
    """One context length at one memory cap: batch tokens/s per seed of each choice."""

    context: int
    memory_factor: float
    rates: dict[str, list[float]] = field(default_factory=dict)


CONTEXTS = (256, 1024, 4096)
CHOICES: dict[str, HostOffload] = {"auto": "auto", "lanes": "always", "device": "never"}
WHOLE_BOX = "device, all cores"


def num_placement_runs(plan: Plan) -> int:
    spots = sum(c <= plan.setup.memory(f).tokens for f in plan.memory_factors for c in CONTEXTS)
    return spots * len(plan.seeds) * (len(CHOICES) + 1)


def run_placement(plan: Plan, run_one: RunOne, save: Save) -> Report:
    """Batch tokens/s by context length and memory cap, beside the latency-sensitive stream: decode chosen by
    the engine, always by host attention, never. The device with all cores is shown too: it is another split
    of the machine, which no choice at run time reaches."""
    report: Report = {"slo": asdict(plan.middle_slo), "spots": [], "left_out": []}
    for factor in plan.memory_factors:
        memory = plan.setup.memory(factor)
        for context in CONTEXTS:
            if context > memory.tokens:
                left_out = {"context": context, "memory_factor": factor, "device_tokens": memory.tokens}
                report["left_out"].append(left_out)
                continue
            spot = Spot(context, factor)
            jobs = replace(plan.jobs, low=context, high=context)
            for seed in plan.seeds:
                for name, variant in _choices(plan).items():
                    trial = Trial(variant, seed, plan.setup.rate, jobs, memory.num_bytes, plan.middle_slo)
                    result = run_one(trial, plan.timing, f"context {context}, memory x{factor:g}")
                    spot.rates.setdefault(name, []).append(result.be_tokens_per_s())
            report["spots"].append(asdict(spot) | placement_verdict(spot))
            save(report)
    return report


def _choices(plan: Plan) -> dict[str, Variant]:
    found = {name: replace(plan.ours, host_offload=offload) for name, offload in CHOICES.items()}
    found[WHOLE_BOX] = replace(plan.ours, host_offload="never", device_threads=plan.all_threads)
    return found


def placement_verdict(spot: Spot) -> Report:
    found = Placement(*(mean(spot.rates[name]) for name in CHOICES))
    return {"winner": found.winner, "auto_share_of_winner": found.share, "is_near": found.is_near}
