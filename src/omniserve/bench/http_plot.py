"""A run against a server as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omniserve.bench.attainment import Record, Targets

MARKERS = "o^s"


def plot_run(records: Sequence[Record], goals: Mapping[str, Targets | None], path: Path) -> None:
    """Left: TTFT over the time of arrival, where a queue that grows is a line that climbs. Middle and right:
    the share of requests that finished with a TTFT and TPOT so long at most; those that did not finish keep
    the curve from reaching the top. Targets are broken lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), dpi=110, layout="constrained")
    over_time, *shares = figure.subplots(1, 3)
    for i, (name, goal) in enumerate(goals.items()):
        own = [r for r in records if r.service_class == name and r.outcome != "unfinished"]
        first = [(r.due_s, r.ttft_s) for r in own if r.ttft_s is not None]
        style = {"color": f"C{i}", "label": name}
        over_time.plot(*_columns(first), MARKERS[i % len(MARKERS)], ms=3, ls="", **style)
        for axes, metric in zip(shares, ("ttft_s", "tpot_s"), strict=True):
            axes.step(*reached(own, metric), where="post", **style)
            if goal is not None and math.isfinite(limit := getattr(goal, metric)):
                axes.axvline(limit, color=f"C{i}", lw=1, ls="--")
    _name_axes(over_time, "arrival, seconds", "TTFT, seconds")
    for axes, metric in zip(shares, ("TTFT", "TPOT"), strict=True):
        _name_axes(axes, f"{metric}, seconds", "share of the requests")
        axes.set_ylim(0, 1.02)
    over_time.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def reached(records: Sequence[Record], metric: str) -> tuple[list[float], list[float]]:
    """Values of finished requests in order, and the share (0 to 1) of all requests that did so well.

    metric: ttft_s or tpot_s. A finished request of one token has no TPOT and does not count in it.
    """
    finished = [getattr(r, metric) for r in records if r.outcome == "finished"]
    values = sorted(v for v in finished if v is not None)
    total = len(records) - finished.count(None)
    return values, [(n + 1) / total for n in range(len(values))]


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _name_axes(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_xlim(left=0)
    axes.grid(color="0.93")
