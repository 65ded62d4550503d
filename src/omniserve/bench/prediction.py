"""How well walks are predicted: `python -m omniserve.bench.prediction [--out FILE]`.

Random requests run through a real engine with a real host process; what it does is compared with what its
latency model expects, walk by walk, once as fitted and once corrected by all walks before. The profile is
measured (or read from the cache) on walks of another kind: random mixes on a device without clients. No walk
is left out. Beside it stands the noise floor: one plan, repeated, against its own median.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from omniserve.bench.measure import machine, write_json
from omniserve.bench.slo_variants import split_with_targets
from omniserve.config import DEVICE_ROWS_WITH_TARGETS, CpuSplit, EngineConfig, split_cpus
from omniserve.engine.build import device_decoder, lane_geometry, make_engine, make_limits
from omniserve.engine.calibration import ensure_profile
from omniserve.engine.loop import Engine
from omniserve.engine.profiler import LOAD_BYTES
from omniserve.engine.sandbox import Mix, Sandbox
from omniserve.host.load import HostLoad, host_load
from omniserve.host.others import Others
from omniserve.model.decoder import Decoder
from omniserve.model.sources import ensure_model
from omniserve.policy.budget import FixedBudget
from omniserve.policy.correction import accuracy
from omniserve.policy.latency import WalkLoad
from omniserve.policy.latency_model import LatencyFit, LatencyModel, kind_of
from omniserve.types import SamplingParams

MODEL = "smollm2-135m"
MODEL_LEN = 2048
WALKS = 200  # of a kind, at least
REPEATS = 200  # of the one plan
MOST_STEPS = 30  # times the walks wanted: some kind may hardly come up on this machine
TURN_STEPS = 60  # requests come at its start only: their chunks are done before it ends, decodes follow
# Requests of the workload, from and to: tokens of prompts and outputs, of chats without lanes, of chats
# beside lanes, of lanes; token budgets of walks.
CHAT, BRIEF_CHAT = ((8, 1000), (20, 120)), ((8, 200), (20, 100))
LANE, MOST_LANES = ((16, 1000), (50, 200)), 16
BUDGETS = (16, 64, DEVICE_ROWS_WITH_TARGETS)
Pairs = list[tuple[float, float]]
Lengths = tuple[tuple[int, int], tuple[int, int]]


@dataclass(slots=True)
class Watched:
    """Two models see the same walks: one learns from them, one stays as fitted."""

    fitted: LatencyModel
    learning: LatencyModel
    before: dict[str, Pairs] = field(default_factory=dict)
    after: dict[str, Pairs] = field(default_factory=dict)
    covered: dict[str, list[bool]] = field(default_factory=dict)

    def observe(self, load: WalkLoad, share: float, seconds: float) -> float:
        kind = kind_of(load, share)
        self.before.setdefault(kind, []).append((self.fitted.walk_s(load, share), seconds))
        self.covered.setdefault(kind, []).append(seconds <= self.learning.bound_s(load, share))
        expected = self.learning.observe(load, share, seconds)
        self.after.setdefault(kind, []).append((expected, seconds))
        return expected


class WatchedModel(LatencyModel):
    """Stands where the engine's model stands. busy: a host beside the engine's own reads at full speed."""

    def __init__(self, watched: Watched) -> None:
        super().__init__(watched.fitted.fit)
        self.watched = watched
        self.busy = False

    def observe(
        self,
        load: WalkLoad,
        host_is_busy: float,
        seconds: float,
        planned: tuple[WalkLoad, float] | None = None,
    ) -> float:
        """Its plans are made by constants: `planned` is None."""
        return self.watched.observe(load, 1.0 if self.busy else host_is_busy, seconds)


@contextmanager
def _engine(
    config: EngineConfig, decoder: Decoder, split: CpuSplit, latency: LatencyModel
) -> Iterator[Engine]:
    engine = make_engine(config, decoder, MODEL_LEN, split, latency=latency)
    try:
        while not (engine.state.host_ready or engine.state.host_failed):
            engine.step()
            engine.sleep(timeout_s=0.1)
        yield engine
    finally:
        engine.close()


class Workload:
    """Requests that come and go at random: chats of any length, and batch work whose lanes ride along."""

    def __init__(self, engine: Engine, rng: random.Random) -> None:
        self.engine = engine
        self.rng = rng

    def keep_up(self, service_class: str, count: int, lengths: Lengths) -> None:
        """Requests of a class, `count` at a time, and another token budget now and then."""
        is_batch = service_class == "best_effort"
        present = sum(r.best_effort == is_batch for r in self.engine.state.requests.values())
        for _ in range(count - present):
            self._add(service_class, lengths)
        if self.rng.random() < 0.5:
            budget = self.engine.policy
            assert isinstance(budget, FixedBudget)
            self.engine.policy = replace(budget, max_num_batched_tokens=self.rng.choice(BUDGETS))

    def _add(self, service_class: str, lengths: Lengths) -> None:
        (shortest, longest), output = lengths
        length = round(shortest * (longest / shortest) ** self.rng.random())
        prompt = [self.rng.randrange(100, 40_000) for _ in range(length)]
        sampling = SamplingParams(
            temperature=self.rng.choice((0.0, 0.0, 0.8)),
            max_tokens=self.rng.randint(*output),
            ignore_eos=True,
        )
        self.engine.add(prompt, sampling, service_class)

    def step(self) -> None:
        if self.engine.step().was_idle:
            self.engine.sleep(timeout_s=0.05)


def run_workload(
    config: EngineConfig, decoder: Decoder, split: CpuSplit, fit: LatencyFit, num_walks: int, console: Console
) -> Watched:
    """Until every kind that the workload can bring has `num_walks` walks."""
    watched = Watched(LatencyModel(fit), LatencyModel(fit))
    model = WatchedModel(watched)
    rng = random.Random(1)
    limits = make_limits(config, decoder.config, decoder.dtype, MODEL_LEN)
    geometry = lane_geometry(config, decoder, limits, MODEL_LEN)
    with host_load(geometry, LOAD_BYTES, split.host_threads, split.host_cpus) as load:
        for what, leg in (("without", _without_lanes), ("with", _with_lanes)):
            with (
                console.status(f"measuring walks {what} lanes ..."),
                _engine(config, decoder, split, model) as engine,
            ):
                leg(Workload(engine, rng), model, load, num_walks)
    return watched


def _without_lanes(workload: Workload, model: WatchedModel, load: HostLoad, num_walks: int) -> None:
    """Decodes and chunks: some steps beside an idle host, some beside a busy one, in turns."""
    for is_busy in _turns(model, ("decode", "chunk"), num_walks):
        model.busy = is_busy
        load.go() if is_busy else load.rest()
        chats = workload.rng.randint(1, 8)
        workload.keep_up("latency_sensitive", chats, CHAT)
        for _ in range(TURN_STEPS):
            workload.step()
    load.rest()


def _with_lanes(workload: Workload, model: WatchedModel, load: HostLoad, num_walks: int) -> None:
    """Lanes of any length, in turns with the host to themselves and beside somebody who keeps it busy."""
    for is_busy in _turns(model, ("lanes",), num_walks):
        model.busy = is_busy
        load.go() if is_busy else load.rest()
        workload.keep_up("latency_sensitive", workload.rng.randint(1, 6), BRIEF_CHAT)
        workload.keep_up("best_effort", workload.rng.randint(2, MOST_LANES), LANE)
        for _ in range(TURN_STEPS):
            workload.step()
    load.rest()


def _turns(model: WatchedModel, wanted: Sequence[str], num_walks: int) -> Iterator[bool]:
    """False and True in turns until there are `num_walks` of each kind wanted, or many more of others."""
    kinds = [f"{what}, host {host}" for what in wanted for host in ("idle", "busy")]
    for turn in range(MOST_STEPS * num_walks // TURN_STEPS):
        if all(len(model.watched.after.get(kind, ())) >= num_walks for kind in kinds):
            return
        yield turn % 2 == 1


def noise_floor(config: EngineConfig, decoder: Decoder, split: CpuSplit, repeats: int) -> Pairs:
    """(median, seconds) of one walk of decodes and a chunk, repeated."""
    sandbox = Sandbox(config, decoder, split, MODEL_LEN)
    try:
        mix = Mix(decodes=(200, 400, 600, 800), chunks=((128, 12, True),))
        for _ in range(10):
            sandbox.walk(mix)
        times = [sandbox.walk(mix)[1] for _ in range(repeats)]
    finally:
        sandbox.close()
    return [(statistics.median(times), seconds) for seconds in times]


# ---------------------------------------------------------------- report


def as_report(watched: Watched, floor: Pairs) -> dict[str, Any]:
    """By kind and overall: accuracy before and after correction, and how many walks the bound held for."""
    kinds = sorted(watched.after)
    report: dict[str, Any] = {"noise_floor": accuracy(floor), "kinds": {}}
    for kind in kinds:
        report["kinds"][kind] = _row(watched.before[kind], watched.after[kind], watched.covered[kind])
    before, after = ([x for kind in kinds for x in side[kind]] for side in (watched.before, watched.after))
    report["overall"] = _row(before, after, [x for kind in kinds for x in watched.covered[kind]])
    return report


def _row(before: Pairs, after: Pairs, covered: Sequence[bool]) -> dict[str, Any]:
    return {
        "as_fitted": accuracy(before),
        "corrected": accuracy(after),
        "within_bound": sum(covered) / len(covered),
        "mean_s": statistics.fmean(seconds for _, seconds in after),
    }


def show(report: dict[str, Any], console: Console) -> None:
    table = Table(title="accuracy of predicted walks (1 - |error| / measured), no walk left out")
    for name in ("kind", "walks", "ms", "as fitted: mean", "P90", "corrected: mean", "P90", "within bound"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for kind, row in (*report["kinds"].items(), ("overall", report["overall"])):
        numbers = [row[side][name] for side in ("as_fitted", "corrected") for name in ("mean", "p90")]
        shown = [f"{number:.1%}" for number in (*numbers, row["within_bound"])]
        table.add_row(kind, str(row["corrected"]["count"]), f"{1e3 * row['mean_s']:.1f}", *shown)
    console.print(table)
    floor = report["noise_floor"]
    console.print(
        f"noise floor: one plan {floor['count']} times against its median: mean {floor['mean']:.1%}, "
        f"P90 {floor['p90']:.1%}; others kept {report['cores_of_others']} cores busy"
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="omniserve.bench.prediction", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/prediction.json"))
    parser.add_argument("--walks", type=int, default=WALKS, help="of each kind, at least")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of the plan of the noise floor")
    parser.add_argument(
        "--threads",
        type=int,
        nargs=2,
        metavar=("DEVICE", "HOST"),
        help="default: those that an engine with targets takes, which shares all CPUs",
    )
    parser.add_argument("--refresh", action="store_true", help="measure the profile again")
    options = parser.parse_args(arguments)
    console = Console()
    usual = split_with_targets(MODEL)
    device_threads, host_threads = options.threads or (usual.device_threads, usual.host_threads)
    config = EngineConfig(
        model=MODEL,
        max_model_len=MODEL_LEN,
        max_num_batched_tokens=DEVICE_ROWS_WITH_TARGETS,
        device_threads=device_threads,
        host_threads=host_threads,
        host_offload="always",
        device_memory_bytes=1 << 30,
        host_memory_bytes=3 << 30,
        enable_prefix_caching=False,
    )
    split = split_cpus(config)
    where = machine()  # before this process is pinned
    decoder = device_decoder(config, split, ensure_model(MODEL))
    fit = ensure_profile(config, decoder, split, MODEL_LEN, refresh=options.refresh).fit
    others = Others()
    watched = run_workload(config, decoder, split, fit, options.walks, console)
    floor = noise_floor(config, decoder, split, options.repeats)
    report = as_report(watched, floor) | {
        "machine": where,
        "profile": {"source": fit.source, "accuracy": fit.accuracy, "key": fit.key},
        "cores_of_others": round(others.cores(), 2),
    }
    show(report, console)
    write_json(options.out, report)
    console.print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
