"""The reports of bench-slo as pictures. Each function draws from what the JSON file holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from omniserve.bench.slo_placement import CHOICES, CONTEXTS, WHOLE_BOX
from omniserve.bench.slo_variants import OURS, POLICIES, REFERENCE
from omniserve.bench.slo_verdict import HARD, POINT, mean

Report = dict[str, Any]
MARKERS = "oXsD^v"


def plot_mixed(report: Report, path: Path) -> None:
    """Attainment over batch tokens/s, a panel for each memory cap and pair of targets; best: up and right.

    Filled: the setting of a policy that counts. The band: within a point of ls_only.
    """
    from matplotlib.figure import Figure

    tables = report["tables"]
    memories = sorted({t["memory_factor"] for t in tables})
    factors = sorted({t["slo_factor"] for t in tables})
    figure = Figure(figsize=(3.6 * len(factors) + 2, 3.0 * len(memories)), dpi=110, layout="constrained")
    panels = figure.subplots(len(memories), len(factors), squeeze=False, sharex=True, sharey=True)
    for table in tables:
        axes = panels[memories.index(table["memory_factor"])][factors.index(table["slo_factor"])]
        _mixed_panel(axes, table)
    for row in panels:
        row[0].set_ylabel("attained of offered, %")
    for axes in panels[-1]:
        axes.set_xlabel("best-effort tokens/s")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    _save(figure, path)


def _mixed_panel(axes: Any, table: Report) -> None:
    reference = next(r for r in table["rows"] if r["policy"] == REFERENCE)
    level = 100 * mean(reference["offered"])
    axes.axhspan(level - 100 * POINT, 101, color="0.9", lw=0)
    axes.axhline(100 * HARD, color="0.6", lw=0.8, ls=":")
    for row in table["rows"]:
        index = POLICIES.index(row["policy"])
        axes.plot(
            mean(row["be_tokens_per_s"]),
            100 * mean(row["offered"]),
            MARKERS[index],
            color=f"C{index}",
            fillstyle="full" if row["counts"] else "none",
            ms=9 if row["policy"] == OURS else 7,
            ls="",
            clip_on=False,
            label=row["variant"],
        )
    axes.set_title(f"SLO x{table['slo_factor']:g}, memory x{table['memory_factor']:g}", fontsize=9)
    axes.set_ylim(-3, 104)
    axes.set_xlim(left=0)
    axes.grid(color="0.93")


def plot_overload(report: Report, path: Path) -> None:
    """TTFT of served requests over their time of arrival: a queue that grows is a line that climbs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for (name, side), marker in zip(report["sides"].items(), "o^", strict=True):
        points = side["ttft_over_time_s"]
        axes.plot([p[0] for p in points], [p[1] for p in points], marker, ms=4, ls="", label=name)
    axes.axhline(report["slo"]["ttft_s"], color="k", lw=1, label="target")
    axes.set_yscale("log")
    axes.set_xlabel("arrival, seconds")
    axes.set_ylabel("TTFT, seconds")
    axes.set_title(f"Twice the capacity, {report['rate']:.2f} requests/s", fontsize=11)
    axes.grid(color="0.93")
    axes.legend(fontsize=8)
    _save(figure, path)


def plot_arrival(report: Report, path: Path) -> None:
    """Share of the lone chats that waited so long at most."""
    from matplotlib.figure import Figure

    waits = sorted(report["waits_s"])
    figure = Figure(figsize=(6, 4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.step(waits, [(i + 1) / len(waits) for i in range(len(waits))], where="post")
    axes.axvline(report["walk_bound_s"], color="k", lw=1, label="longest walk with batch rows")
    axes.set_xlim(left=0)
    axes.set_xlabel("wait, seconds")
    axes.set_ylabel("share of the chats")
    axes.grid(color="0.93")
    axes.legend(fontsize=8)
    _save(figure, path)


def plot_placement(report: Report, path: Path) -> None:
    """Batch tokens/s over context length, a panel for each memory cap."""
    from matplotlib.figure import Figure

    memories = sorted({s["memory_factor"] for s in report["spots"]})
    figure = Figure(figsize=(3.6 * max(1, len(memories)) + 2, 3.6), dpi=110, layout="constrained")
    panels = figure.subplots(1, max(1, len(memories)), squeeze=False, sharey=True)[0]
    for axes, memory in zip(panels, memories, strict=False):
        spots = [s for s in report["spots"] if s["memory_factor"] == memory]
        shown = [name for name in (*CHOICES, WHOLE_BOX) if all(name in s["rates"] for s in spots)]
        for name, marker in zip(shown, MARKERS, strict=False):
            rates = [mean(s["rates"][name]) for s in spots]
            style = "--" if name == WHOLE_BOX else "-"
            axes.plot([s["context"] for s in spots], rates, marker + style, label=name)
        broken = [(s["context"], mean(s["rates"][c])) for s in spots for c in CHOICES if not s["holds"][c]]
        axes.plot([x for x, _ in broken], [y for _, y in broken], "kx", ms=10, label="breaks targets")
        axes.set_xscale("log", base=2)
        axes.set_xticks(CONTEXTS, [str(context) for context in CONTEXTS])
        axes.set_ylim(bottom=0)
        axes.set_title(f"memory x{memory:g}", fontsize=9)
        axes.set_xlabel("batch context, tokens")
        axes.grid(color="0.93")
    panels[0].set_ylabel("best-effort tokens/s")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    _save(figure, path)


PLOTS: dict[str, Callable[[Report, Path], None]] = {
    "slo": plot_mixed,
    "arrival": plot_arrival,
    "overload": plot_overload,
    "placement": plot_placement,
}


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
