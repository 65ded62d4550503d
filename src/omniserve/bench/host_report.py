"""`omniserve bench-host [--quick] [--json FILE] [--plot FILE]`: measures, prints tables, writes files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from omniserve.bench.host import HostBench, Sweep, default_threads, description, quick_sweep
from omniserve.bench.host_lanes import lane_cases, measure_lanes, measure_prefix, prefix_cases
from omniserve.bench.host_plot import plot_roofline
from omniserve.bench.host_scaling import measure_scaling, scaling_cases
from omniserve.bench.host_slots import SLOT_SHAPES, measure_slots, measure_trip
from omniserve.bench.host_tables import tables
from omniserve.bench.host_targets import add_over_bf16, verdicts
from omniserve.bench.measure import machine
from omniserve.host.others import Others

MIN_WIDTH = 150  # of the tables where the terminal does not say


class Measurement(Protocol):
    def as_dict(self) -> dict[str, Any]: ...


Shape = TypeVar("Shape")


def run_bench_host(quick: bool, json_path: str | None, plot_path: str | None) -> int:
    """Measures, prints, writes; returns the exit status: 1 when our streaming loop falls behind torch.sum."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, MIN_WIDTH))
    if plot_path and find_spec("matplotlib") is None:
        console.print("no plot: matplotlib is not installed (pip install 'omniserve\\[plots]')")
        plot_path = None
    bench = HostBench(quick_sweep() if quick else Sweep(threads=default_threads()))
    if not bench.is_cold:
        console.print("too little memory to leave the last-level cache behind: nothing here counts")
    report = {"machine": machine(), **description(bench), **_measure(bench, quick, console)}
    add_over_bf16(report["cases"])
    report["targets"] = verdicts(report)

    for table in tables(report):
        console.print(table)
    others = ", ".join(f"{name} {cores:.2f}" for name, cores in report["others_busy_cores"].items())
    console.print(f"cores that others kept busy meanwhile: {others}")
    if json_path:
        _write(Path(json_path), as_text(report))
        console.print(f"written to {json_path}")
    if plot_path:
        plot_roofline(report, Path(plot_path))
        console.print(f"plotted to {plot_path}")
    return 0 if all(s["holds"] for s in report["stream_check"]) else 1


def _measure(bench: HostBench, quick: bool, console: Console) -> dict[str, Any]:
    """All sections, one after the other under one progress bar."""
    threads = max(bench.sweep.threads)
    cases, lanes = list(bench.sweep.cases()), list(lane_cases(threads, quick))
    prefixes, scalings = list(prefix_cases(threads, quick)), list(scaling_cases(bench))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        total = sum(map(len, (bench.sweep.threads, cases, lanes, prefixes, scalings, SLOT_SHAPES))) + 1
        bar = progress.add_task("", total=total)

        others: dict[str, float] = {}

        def each(
            name: str, shapes: Iterable[Shape], measure: Callable[[Shape], Sequence[Measurement]]
        ) -> list[dict[str, Any]]:
            found, watch = [], Others()
            for shape in shapes:
                progress.update(bar, description=f"{name} {getattr(shape, 'text', '')}")
                found += [result.as_dict() for result in measure(shape)]
                progress.advance(bar)
            others[name] = watch.cores()
            return found

        bench.fill(cases[0])
        streams = []
        for n in bench.sweep.threads:
            progress.update(bar, description="streaming rate")
            streams.append(bench.check_stream(n))
            progress.advance(bar)
        sections: dict[str, Any] = {
            "others_busy_cores": others,
            "stream_check": streams,
            "slots": each("slots", SLOT_SHAPES, lambda shape: [measure_slots(shape)]),
            "cases": each("kernel", cases, lambda case: [bench.measure(case)]),
            "scaling": each("scaling", scalings, lambda case: [measure_scaling(case, bench)]),
            "host_workers": each("host workers", lanes, lambda case: measure_lanes(case, bench)),
            "shared_prefix": each("shared prefix", prefixes, lambda case: [measure_prefix(case, bench)]),
        }
        progress.update(bar, description="one row")
        sections["trip"] = measure_trip().as_dict()
        progress.advance(bar)
    return sections


def as_text(report: dict[str, Any]) -> str:
    """JSON, a line for each entry and for each element of a list: hundreds of cases, and a diff to read."""

    def value(entry: object) -> str:
        if not isinstance(entry, list):
            return json.dumps(entry)
        return "[\n" + ",\n".join(f"  {json.dumps(element)}" for element in entry) + "\n ]"

    return (
        "{\n" + ",\n".join(f" {json.dumps(key)}: {value(entry)}" for key, entry in report.items()) + "\n}\n"
    )


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
