"""`omniserve profile`: the cached or newly measured profile as table, plot or JSON."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from omniserve.config import EngineConfig, split_cpus
from omniserve.engine.build import device_decoder, model_len
from omniserve.engine.calibration import ensure_profile, profile_path
from omniserve.errors import ConfigError
from omniserve.model.sources import ensure_model
from omniserve.policy.latency_model import LatencyFit, WalkCosts

_ROWS_SHOWN = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Attribute of WalkCosts, what it is, what it is shown per, how many of that.
_LINES = (
    ("decode_token_s", "decode attention, 1,000 tokens of context", 1000),
    ("decode_request_s", "decode attention, a request", 1),
    ("prefill_load_s", "prefill attention, 1,000 pairs of tokens", 1000),
    ("prefill_context_s", "earlier KV of a chunk, 1,000 tokens", 1000),
    ("prefill_chunk_s", "prefill attention, a chunk", 1),
    ("lane_row_s", "a lane row's way in and out, at one layer", 1),
    ("lane_walk_s", "a walk that looks for lanes", 1),
    ("copy_token_s", "staging KV for the host, 100 tokens", 100),
    ("overhead_s", "engine, a walk", 1),
    ("row_overhead_s", "engine, a request", 1),
)


def run_profile(config: EngineConfig, as_json: bool, plot: str | None, refresh: bool) -> int:
    """Show what `config.model` costs here, measuring it when that has not been done."""
    if plot is not None:
        _check_plot(plot)
    split = split_cpus(config)
    path = ensure_model(config.model, config.revision)
    decoder = device_decoder(config, split, path)
    max_model_len = model_len(config, decoder.config)
    fit = ensure_profile(config, decoder, split, max_model_len, refresh=refresh).fit
    if as_json:
        print(json.dumps(fit.to_json(), indent=2))
    else:
        _print(fit)
    if plot is not None:
        draw(fit, plot)
    return 0


def _check_plot(plot: str) -> None:
    """Before a minute of measuring, not after."""
    if Path(plot).suffix not in (".svg", ".png"):
        raise ConfigError(f"--plot {plot}: the name must end in .svg or .png")
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'omniserve[plots]'")


def _print(fit: LatencyFit) -> None:
    console = Console()
    console.print(f"{fit.key['model']}, {fit.key['dtype']}, {fit.key['device_threads']} device and "
                  f"{fit.key['host_threads']} host threads; {fit.source['how']} in "
                  f"{fit.source['seconds']} s ({profile_path(fit.key)})")  # fmt: skip
    others = fit.source["cores_of_others"]
    if others > 0.1:
        console.print(f"[yellow]others kept {others} cores busy meanwhile: measure again with --refresh[/]")
    table = Table(title="milliseconds, beside an idle and a streaming host")
    for column in ("part of a walk", "host idle", "host busy"):
        table.add_column(column, justify="left" if column == "part of a walk" else "right")
    for name, stairs in (("dense modules", "dense"), ("logits and choice", "head")):
        last = getattr(fit.idle, stairs).rows[-1]
        for rows in (*(n for n in _ROWS_SHOWN if n < last), last):
            times = [getattr(costs, stairs).at(rows) for costs in (fit.idle, fit.busy)]
            table.add_row(f"{name}, {rows} row{'s' * (rows > 1)}", *_ms(*times))
    for attribute, what, count in _LINES:
        times = [count * getattr(costs, attribute) for costs in (fit.idle, fit.busy)]
        table.add_row(what, *_ms(*times))
    console.print(table)
    if fit.host_bytes_per_s:
        console.print(
            f"host attention of a lane row: {1e6 * fit.host_row_s:.0f} us and"
            f" {fit.host_bytes_per_s / 1e9:.1f} GB/s; copies: {1e6 * fit.copy_s:.0f} us and"
            f" {fit.copy_bytes_per_s / 1e9:.1f} GB/s"
        )
    found = Table(title="accuracy on walks the fit has not seen (1 - |error| / measured)")
    for column in ("kind", "walks", "mean", "P90"):
        found.add_column(column, justify="left" if column == "kind" else "right")
    for kind, accuracy in fit.accuracy.items():
        found.add_row(kind, str(accuracy["count"]), *(f"{accuracy[n]:.1%}" for n in ("mean", "p90")))
    console.print(found)


def _ms(*seconds: float) -> list[str]:
    return [f"{1e3 * s:.3g}" for s in seconds]


def draw(fit: LatencyFit, path: str) -> None:
    """Both staircases beside an idle and a busy host."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for axis, name, title in zip(
        axes, ("dense", "head"), ("dense modules of a walk", "logits and choice"), strict=True
    ):
        for host, costs in (("idle", fit.idle), ("busy", fit.busy)):
            _draw_stairs(axis, costs, name, f"host {host}")
        axis.set(title=title, xlabel="rows", ylabel="ms", ylim=(0, None))
        axis.legend()
    figure.suptitle(f"{fit.key['model']}, {fit.key['device_threads']} device threads, {fit.key['cpu']}")
    figure.savefig(path)
    pyplot.close(figure)


def _draw_stairs(axis: Any, costs: WalkCosts, name: str, label: str) -> None:
    stairs = getattr(costs, name)
    axis.plot(stairs.rows, [1e3 * s for s in stairs.seconds], marker=".", label=label)
