"""`python -m omniserve.bench.slo`: latency-sensitive targets kept, batch tokens made, beside the baselines.

The rate is a share of the capacity of `ls_only` at our device threads, the targets are multiples of its 95th
percentiles, the memory cap is a multiple of its page use, all measured first and on this machine. Then every
policy gets the same arrivals and the same backlog in turn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from omniserve.bench import slo_tables
from omniserve.bench.attainment import DEFINITIONS
from omniserve.bench.measure import machine, write_json
from omniserve.bench.slo_arrival import num_arrival_runs, run_arrival
from omniserve.bench.slo_mixed import num_mixed_runs, run_mixed
from omniserve.bench.slo_overload import num_overload_runs, run_overload
from omniserve.bench.slo_placement import num_placement_runs, run_placement
from omniserve.bench.slo_plan import Plan, Report
from omniserve.bench.slo_plot import PLOTS
from omniserve.bench.slo_run import Result, RunOne, Timing, Traffic, Trial, run_trial
from omniserve.bench.slo_setup import measure_setup, reference_of
from omniserve.bench.slo_variants import POLICIES, check_policies, split_with_targets, variants
from omniserve.bench.traces import SHIPPED, read_trace
from omniserve.bench.workloads import SHAREGPT, BatchJobs, resized
from omniserve.config import EngineConfig
from omniserve.errors import ConfigError, OmniServeError
from omniserve.machine import available_cpus

MIN_WIDTH = 170  # of the tables where the terminal does not say
MAX_LS_TOKENS = 4096  # of prompt and output together


@dataclass(frozen=True, slots=True)
class Scenario:
    count: Callable[[Plan], int]
    run: Callable[[Plan, RunOne, Callable[[Report], None]], Report]
    tables: Callable[[Report], Iterator[Any]]


SCENARIOS = {
    "slo": Scenario(num_mixed_runs, run_mixed, slo_tables.mixed_tables),
    "arrival": Scenario(num_arrival_runs, run_arrival, slo_tables.arrival_tables),
    "overload": Scenario(num_overload_runs, run_overload, slo_tables.overload_tables),
    "placement": Scenario(num_placement_runs, run_placement, slo_tables.placement_tables),
}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="omniserve.bench.slo", description=__doc__)
    add = parser.add_argument
    add("--scenario", choices=list(SCENARIOS), default="slo")
    add("--model", default="smollm2-135m")
    known, shipped = ", ".join(POLICIES), ", ".join(SHIPPED)
    add("--policies", nargs="+", default=list(POLICIES), help=f"of {known}; ours and ls_only always run")
    add("--duration", type=float, default=60.0, metavar="S", help="seconds of each run that count")
    add(
        "--warmup",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds before: batch work finds its level",
    )
    add("--drain", type=float, default=60.0, metavar="S", help="seconds the last requests may take beyond")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--load-factor", type=float, default=0.5, help="rate as a share of the capacity")
    add("--rate", type=float, metavar="R", help="requests/s, in place of --load-factor")
    add("--burstiness", type=float, default=1.0, help="shape of gamma arrivals: 1 Poisson, below 1 in bursts")
    add("--trace", help=f"lengths and rhythm of a trace, at that rate: a file, {shipped}")
    add("--length-scale", type=float, default=0.25, help="times the lengths of ShareGPT or of the trace")
    add("--slo-factors", type=float, nargs="+", default=[1.25, 1.5, 2.0], help="times p95 of ls_only")
    add("--memory-factors", type=float, nargs="+", default=[1.25, 2.0, 4.0], help="times its P99 page use")
    add("--be-context", type=int, nargs=2, default=[256, 4096], metavar=("LOW", "HIGH"), help="tokens")
    add("--be-output-share", type=float, default=0.75, help="of a batch job's context that is generated")
    add("--backlog", type=int, default=96, help="batch requests with the engine at all times")
    add("--no-tune", action="store_true", help="baselines with their defaults, not their best tunables")
    add("--quick", action="store_true", help="one seed, one cap, one pair of targets, short runs: no result")
    add("--json", type=Path, metavar="FILE", help="default: results/SCENARIO.json")
    add("--plot", type=Path, metavar="FILE", help=".svg or .png; needs matplotlib")
    options = parser.parse_args(arguments)
    if options.quick:
        _hurry(options)
    options.json = options.json or Path(f"results/{options.scenario}.json")
    return options


def _hurry(options: argparse.Namespace) -> None:
    options.seeds, options.no_tune = options.seeds[:1], True
    options.slo_factors, options.memory_factors = [1.5], [4.0]
    options.duration, options.warmup, options.drain = 15.0, 3.0, 10.0
    options.length_scale = min(options.length_scale, 0.05)
    options.be_context = [32, min(options.be_context[1], 256)]


class Bench:
    """One invocation: runs under two progress bars, everything measured so far on disk after each."""

    def __init__(self, options: argparse.Namespace, console: Console, run: Callable[..., Result]) -> None:
        self.options, self.console, self._run = options, console, run
        self.policies = check_policies(options.policies)
        self.timing = Timing(options.warmup, options.duration, options.drain)
        self.traffic = make_traffic(options)
        split = split_with_targets(options.model)
        self.device_threads, self.all_threads = split.device_threads, available_cpus().count
        self.variants = variants(self.policies, split, self.all_threads)
        self.report: Report = {
            "scenario": options.scenario,
            "machine": machine(),
            "definitions": DEFINITIONS,
            "options": _as_json(vars(options)),
        }

    def measure(self) -> None:
        options, scenario = self.options, SCENARIOS[self.options.scenario]
        with self._bars() as run_one:
            setup, results = measure_setup(
                run_one,
                self.timing,
                self.traffic,
                reference_of(self.variants),
                options.seeds,
                EngineConfig().page_size,
                options.load_factor,
                options.rate,
            )
            slos = {f"{f:g}": setup.slo(f) for f in options.slo_factors}
            self.report["setup"] = asdict(setup) | {"device_threads": self.device_threads}
            self.report["reference"] = [r.as_dict(slos) for r in results]
            for line in slo_tables.setup_lines(self.report["setup"]):
                self.console.print(line)
            low, high = options.be_context
            plan = Plan(
                setup,
                self.timing,
                tuple(self.variants),
                BatchJobs(low, high, options.be_output_share),
                tuple(options.seeds),
                tuple(options.slo_factors),
                tuple(options.memory_factors),
                self.all_threads,
                tune=not options.no_tune,
            )
            self._expect(scenario.count(plan))
            self._save(scenario.run(plan, run_one, self._save))

    def _save(self, found: Report) -> None:
        self.report[self.options.scenario] = found
        write_json(self.options.json, self.report)

    @contextmanager
    def _bars(self) -> Iterator[RunOne]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console) as progress:
            self._progress = progress
            self._runs = progress.add_task("all runs", total=1 + len(self.options.seeds))
            self._seconds = progress.add_task("seconds", total=None)
            yield self._run_one

    def _expect(self, count: int) -> None:
        task = self._progress.tasks[self._runs]
        self._progress.update(self._runs, total=(task.total or 0) + count)
        minutes = count * self.timing.total_s / 60
        self.console.print(f"{count} runs to come, {minutes:.0f} minutes and more")

    def _run_one(self, trial: Trial, timing: Timing, what: str) -> Result:
        total = round(timing.total_s)
        self._progress.reset(self._seconds, total=total, description=f"{what}: {trial.variant.name}")
        result = self._run(
            trial,
            timing,
            self.traffic,
            self.options.backlog,
            self.options.model,
            lambda now_s: self._progress.update(self._seconds, completed=min(total, round(now_s))),
        )
        self._progress.advance(self._runs)
        return result

    def print(self) -> None:
        for part in SCENARIOS[self.options.scenario].tables(self.report[self.options.scenario]):
            self.console.print(part)
        self.console.print(DEFINITIONS)
        self.console.print(f"written to {self.options.json}")


def make_traffic(options: argparse.Namespace) -> Traffic:
    lengths = SHAREGPT.scaled(options.length_scale)
    if options.trace is None:
        return Traffic(lengths, options.burstiness)
    trace = resized(read_trace(options.trace), options.length_scale, MAX_LS_TOKENS)
    return Traffic(lengths, options.burstiness, tuple(trace))


def _as_json(options: dict[str, Any]) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}


def main(arguments: list[str], run: Callable[..., Result] = run_trial) -> int:
    options = parse(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, MIN_WIDTH))
    if options.plot and find_spec("matplotlib") is None:
        console.print("no plot: matplotlib is not installed (pip install 'omniserve\\[plots]')")
        options.plot = None
    try:
        bench = Bench(options, console, run)
        bench.measure()
    except OmniServeError as error:
        print(f"bench-slo: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    bench.print()
    if options.plot:
        PLOTS[options.scenario](bench.report[options.scenario], options.plot)
        console.print(f"plotted to {options.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
