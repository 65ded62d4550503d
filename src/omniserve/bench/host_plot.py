"""The roofline of host attention, drawn from a report."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from omniserve.bench.host_memory import TORCH_DTYPES, short_name

Report = dict[str, Any]
MIN_CONTEXT, MIN_LANES = 1024, 8  # of the points: what the project promises figures for


def plot_roofline(report: Report, path: Path) -> None:
    """Rate over arithmetic intensity, all cores: roofs of memory and of arithmetic, ours and SDPA per shape.

    "Arithmetic alone" reads pages that stay in the caches. A point is the median over head sizes, contexts
    and lanes, its bar their range. `report` is what the JSON file holds, so that a plot can be drawn from it
    later. Needs matplotlib; the suffix of `path` chooses the format.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    threads = max(report["sweep"]["threads"])
    cases = [c for c in report["cases"] if c["threads"] == threads]
    figure = Figure(figsize=(9, 5.5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    stream = next(s for s in report["stream_check"] if s["threads"] == threads)["stream_gbps"]
    axes.axhspan(stream["low"], stream["high"], color="0.85")
    axes.axhline(
        stream["median"], color="k", label=f"streaming read, {stream['median']:.0f} GB/s (and its range)"
    )
    for i, dtype in enumerate(d for d in TORCH_DTYPES if any(c["dtype"] == d for c in cases)):
        ours = [c for c in cases if c["dtype"] == dtype]
        name, colour = short_name(dtype), f"C{i}"
        aside = 2 ** (0.08 * i)  # types of one size share their intensities: set their points side by side
        cached = _points([c for c in ours if c["cached"]], "ours")
        axes.plot(
            *zip(*[p[:2] for p in cached], strict=True),
            "--",
            color=colour,
            lw=1,
            label=f"{name}: arithmetic alone",
        )
        _bars(
            axes, _points([c for c in ours if _counts(c)], "ours", aside), "o", colour, f"{name}: our kernel"
        )
        _bars(
            axes, _points([c for c in ours if _counts(c)], "sdpa", aside), "v", colour, f"{name}: torch SDPA"
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xlabel("arithmetic intensity, flop per byte of KV (group 1, 3, 4, 8 of each type)")
    axes.set_ylabel("GB/s of KV")
    axes.set_title(
        f"Decode attention, {threads} threads, {report['simd']}, {report['machine']['cpu']}", fontsize=11
    )
    axes.grid(which="major", color="0.9")
    figure.legend(loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


Point = tuple[float, float, float, float]  # intensity; median, lowest, highest rate


def _points(cases: list[Report], reader: str, aside: float = 1.0) -> list[Point]:
    """One per intensity (times `aside`): the cases that share it."""
    rates: dict[float, list[float]] = {}
    for case in cases:
        if reader in case["gbps"]:
            rates.setdefault(case["intensity_flop_per_byte"], []).append(case["gbps"][reader]["median"])
    return [(x * aside, statistics.median(y), min(y), max(y)) for x, y in sorted(rates.items())]


def _bars(axes: Any, points: list[Point], marker: str, colour: str, label: str) -> None:
    if not points:
        return
    x, y, low, high = zip(*points, strict=True)
    reach = ([a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)])
    axes.errorbar(x, y, yerr=reach, fmt=marker, color=colour, capsize=2, elinewidth=0.8, label=label)


def _counts(case: Report) -> bool:
    return bool(case["counts"]) and case["context"] >= MIN_CONTEXT and case["lanes"] >= MIN_LANES
