"""`omniserve bench-host`: runs the sweep with a progress bar; table, JSON and roofline plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from omniserve.bench.host import HostBench, Result, Sweep, default_threads, description, quick_sweep
from omniserve.bench.host_lanes import LaneResult, lane_cases, measure_lanes
from omniserve.bench.measure import machine


def run_bench_host(quick: bool, json_path: str | None, plot_path: str | None) -> int:
    """Measures, prints, writes; returns the exit status: 1 when our streaming loop falls behind torch.sum."""
    console = Console()
    if plot_path and find_spec("matplotlib") is None:
        console.print("no plot: matplotlib is not installed (pip install 'omniserve\\[plots]')")
        plot_path = None
    bench = HostBench(quick_sweep() if quick else Sweep(threads=default_threads()))
    if not bench.is_cold:
        console.print("too little memory to leave the last-level cache behind: nothing here counts")
    report: dict[str, Any] = {"machine": machine(), **description(bench)}
    results, lanes, streams = _measure(bench, quick, console)
    report["stream_check"] = streams
    report["cases"] = [r.as_dict() for r in results]
    report["host_workers"] = [r.as_dict() for r in lanes]

    console.print(stream_table(streams))
    console.print(kernel_table(results))
    console.print(lane_table(lanes))
    if json_path:
        _write(Path(json_path), json.dumps(report, indent=1) + "\n")
        console.print(f"written to {json_path}")
    if plot_path:
        plot_roofline(report, Path(plot_path))
        console.print(f"plotted to {plot_path}")
    return 0 if all(s["holds"] for s in streams) else 1


def _measure(
    bench: HostBench, quick: bool, console: Console
) -> tuple[list[Result], list[LaneResult], list[dict[str, Any]]]:
    threads = bench.sweep.threads
    cases, lanes = list(bench.sweep.cases()), list(lane_cases(max(threads), quick))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("streaming rate", total=len(cases) + len(lanes))
        bench.fill(cases[0].dtype)
        streams = [bench.check_stream(n) for n in threads]
        results = []
        for case in cases:
            progress.update(
                bar,
                description=f"{case.dtype} group {case.group} head {case.head_dim} threads {case.threads}",
            )
            results.append(bench.measure(case))
            progress.advance(bar)
        lane_results = []
        for case in lanes:
            progress.update(bar, description=f"host workers: {case.lanes} lanes, context {case.context}")
            lane_results.append(measure_lanes(case, bench))
            progress.advance(bar)
    return results, lane_results, streams


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def stream_table(streams: Sequence[dict[str, Any]]) -> Table:
    table = _table("streaming read, GB/s", "threads", "ours", "torch.sum", "ratio (at least 0.95)")
    for s in streams:
        table.add_row(
            str(s["threads"]),
            f"{s['stream_gbps']['median']:.1f}",
            f"{s['torch_sum_gbps']['median']:.1f}",
            f"{s['ratio']:.2f}" + ("" if s["holds"] else " TOO SLOW"),
        )
    return table


def kernel_table(results: Sequence[Result]) -> Table:
    table = _table(
        "decode attention, GB/s of KV, median (range); cached cases do not count",
        "dtype", "head", "group", "threads", "context", "lanes", "stream", "ours", "share",
        "SDPA", "ours / SDPA", "ours / SDPA grouped",
    )  # fmt: skip
    for r in results:
        c = r.case
        ours, sdpa = r.gbps["ours"], r.gbps.get("sdpa")
        table.add_row(
            c.dtype,
            str(c.head_dim),
            str(c.group),
            str(c.threads),
            str(c.context) if r.counts else f"{c.context} cached",
            str(c.lanes),
            f"{r.gbps['stream'].median:.1f}",
            f"{ours.median:.1f} ({ours.low:.1f} to {ours.high:.1f})",
            f"{r.share:.0%}" if r.counts else "",
            "" if sdpa is None else f"{sdpa.median:.2f}",
            *(_times(r.over(reader)) for reader in ("sdpa", "sdpa_grouped")),
        )
    return table


def lane_table(results: Sequence[LaneResult]) -> Table:
    table = _table(
        "through host workers: exit of all rows to take, GB/s of KV",
        "dtype", "head", "group", "threads", "context", "lanes", "stream", "lanes' rate", "share",
    )  # fmt: skip
    for r in results:
        c = r.case
        table.add_row(
            *(str(v) for v in (c.dtype, c.head_dim, c.group, c.threads, c.context, c.lanes)),
            f"{r.stream_gbps.median:.1f}",
            f"{r.gbps.median:.1f} ({r.gbps.low:.1f} to {r.gbps.high:.1f})",
            f"{r.gbps.median / r.stream_gbps.median:.0%}",
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.1f}x"


def plot_roofline(report: dict[str, Any], path: Path) -> None:
    """Rate over arithmetic intensity on all cores: the memory's roof, ours, SDPA, and ours on cached pages.

    `report` is what the JSON file holds, so that a plot can be drawn from it later. Needs matplotlib.
    """
    from matplotlib.figure import Figure

    threads = max(c["threads"] for c in report["cases"])
    cases = [c for c in report["cases"] if c["threads"] == threads]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    stream = next(s for s in report["stream_check"] if s["threads"] == threads)["stream_gbps"]["median"]
    lowest, highest = (pick(c["intensity_flop_per_byte"] for c in cases) for pick in (min, max))
    axes.plot([lowest / 1.2, highest * 1.2], [stream, stream], "k-", label="streaming read of memory")
    chosen = (
        ("ours", "o", "our kernel, context 1024 and more", [c for c in cases if _counts(c)]),
        ("sdpa", "v", "torch SDPA, query length 1", [c for c in cases if _counts(c)]),
        ("ours", "x", "our kernel on cached pages (arithmetic alone)", [c for c in cases if c["cached"]]),
    )
    for reader, marker, label, points in chosen:
        axes.plot(
            [c["intensity_flop_per_byte"] for c in points],
            [c["gbps"][reader]["median"] for c in points],
            marker,
            alpha=0.6,
            label=label,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("arithmetic intensity, flop per byte of KV")
    axes.set_ylabel("GB/s of KV")
    axes.set_title(f"decode attention on {threads} threads ({report['simd']}), {report['machine']['cpu']}")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _counts(case: dict[str, Any]) -> bool:
    return bool(case["counts"]) and case["context"] >= 1024
