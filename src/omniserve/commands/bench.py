"""`omniserve bench`: an open-loop load of two classes on any OpenAI-compatible server.

Flags that `vllm bench serve` has too are named as there and mean the same; docs/bench.md names the
differences.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
from collections.abc import Callable
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omniserve.bench.http_names import BACKENDS, CHAT, COMPLETIONS, DATASETS, METRICS, NO_TOKENIZER
from omniserve.errors import ConfigError

if TYPE_CHECKING:
    from omniserve.bench.http_report import Report

MIN_WIDTH = 140  # of the tables where the terminal does not say


def add_parser(commands: Any) -> None:
    """Declare `bench` among the commands (what argparse's add_subparsers returned)."""
    parser = commands.add_parser(
        "bench", help="load an OpenAI-compatible server with two classes of requests", description=__doc__
    )
    _add_server(parser.add_argument_group("server").add_argument)
    _add_chats(parser.add_argument_group("latency-sensitive requests").add_argument)
    _add_best_effort(parser.add_argument_group("best-effort requests beside them"))
    _add_report(parser.add_argument_group("report").add_argument)
    parser.set_defaults(run=run)


def _add_server(add: Callable[..., Any]) -> None:
    add("--base-url", default="http://127.0.0.1:8000", help="OPENAI_API_KEY in the environment is its key")
    add("--model", help="name under which it is served; default: the first one of /v1/models")
    add("--endpoint", choices=(COMPLETIONS, CHAT), default=COMPLETIONS)
    add(
        "--backend",
        choices=("auto", *BACKENDS),
        default="auto",
        help="default: what /v1/models says owns the model",
    )
    add(
        "--tokenizer",
        help=f"makes prompts of exact length: a name, a folder or {NO_TOKENIZER}; default: the model's",
    )
    add(
        "--max-model-len",
        type=_positive(int),
        metavar="N",
        help="cut longer requests; default: the server's own limit",
    )
    add(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        help="send ignore_eos and min_tokens, so that answers are as long as planned; default: unless openai",
    )
    add("--extra-body", type=_json_object, default={}, metavar="JSON", help="fields added to each request")
    add(
        "--request-timeout",
        type=_positive(float),
        default=600.0,
        metavar="S",
        help="from the intended arrival",
    )
    add("--ready-check-timeout-sec", type=_at_least_0(float), default=60.0, metavar="S", help="0: one try")
    add("--num-warmups", type=_at_least_0(int), default=0, metavar="N", help="requests before, not measured")
    add("--seed", type=int, default=0)


def _add_chats(add: Callable[..., Any]) -> None:
    add("--dataset-name", choices=DATASETS, default="random")
    add(
        "--dataset-path",
        type=Path,
        metavar="FILE",
        help="azure and sharegpt: without one, what comes with the package",
    )
    add("--num-prompts", type=_at_least_0(int), default=1000, metavar="N", help="0: best-effort work alone")
    add("--duration", type=_positive(float), metavar="S", help="arrivals from then on are left out")
    add(
        "--request-rate",
        type=_positive_or_inf,
        default=math.inf,
        metavar="R",
        help="per second; default: inf, all at once",
    )
    add(
        "--burstiness",
        type=_positive_or_inf,
        default=1.0,
        help="shape of the gamma gaps: 1 Poisson, below 1 in bursts, inf constant",
    )
    add(
        "--self-timed",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a trace's own times, stretched to --request-rate if given; no: only its lengths",
    )
    add("--max-concurrency", type=_positive(int), metavar="N", help="requests under way at most")
    add("--random-input-len", type=_positive(int), default=1024, metavar="N")
    add("--random-output-len", type=_positive(int), default=128, metavar="N")
    add(
        "--random-range-ratio",
        type=_share,
        default=0.0,
        metavar="X",
        help="lengths from (1 - X) to (1 + X) times those",
    )
    add(
        "--length-scale",
        type=_positive(float),
        default=1.0,
        metavar="X",
        help="times the lengths of the dataset",
    )
    add(
        "--probe-request-rate",
        type=_at_least_0(float),
        default=0.0,
        metavar="R",
        help="one-token requests per second beside all others",
    )
    add("--service-tier", metavar="TIER", help="default: not sent")
    add("--goodput", nargs="+", default=[], metavar="METRIC:MS", help="targets: ttft:MS tpot:MS")
    add("--slo-headers", action="store_true", help="send the targets as x-slo-ttft-ms and x-slo-tpot-ms")


def _add_best_effort(group: argparse._ArgumentGroup) -> None:
    how = group.add_mutually_exclusive_group().add_argument
    how("--be-request-rate", type=_positive(float), metavar="R", help="open loop: requests per second")
    how(
        "--be-backlog",
        type=_positive(int),
        metavar="N",
        help="closed loop: N requests under way at all times",
    )
    how("--be-batch-lines", type=_positive(int), metavar="N", help="a batch of N lines through /v1/batches")
    add = group.add_argument
    add("--be-burstiness", type=_positive_or_inf, default=1.0, help="of --be-request-rate")
    add(
        "--be-context",
        type=_positive(int),
        nargs=2,
        default=[256, 4096],
        metavar=("LOW", "HIGH"),
        help="tokens at the end of a request, drawn log-uniformly",
    )
    add("--be-output-share", type=float, default=0.75, help="of that context that is generated")
    add("--be-service-tier", type=_tier, default="flex", metavar="TIER", help="default: flex; none: not sent")
    add("--be-extra-body", type=_json_object, default={}, metavar="JSON")
    add("--be-goodput", nargs="+", default=[], metavar="METRIC:MS", help="targets, if they have any")


def _add_report(add: Callable[..., Any]) -> None:
    add(
        "--percentile-metrics",
        type=_metrics,
        default=METRICS[:3],
        metavar="NAMES",
        help=f"of {','.join(METRICS)}; default: ttft,tpot,itl",
    )
    add(
        "--metric-percentiles",
        type=_percentiles,
        default=[99.0],
        metavar="PS",
        help="default: 99; for instance 50,90,99",
    )
    add("--save-result", action="store_true", help="write a JSON file")
    add("--save-detailed", action="store_true", help="with every request in it")
    add("--result-dir", type=Path, default=Path("."), metavar="FOLDER")
    add("--result-filename", metavar="NAME", help="default: omniserve-RATEqps-MODEL-DATE.json")
    add("--plot", type=Path, metavar="FILE", help=".png or .svg; needs matplotlib")


# ---------------------------------------------------------------- values of flags


def _number(
    kind: Callable[[str], float], is_allowed: Callable[[float], bool], what: str
) -> Callable[[str], Any]:
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not is_allowed(value):
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
        return value

    return read


def _positive(kind: Callable[[str], float]) -> Callable[[str], Any]:
    return _number(kind, lambda v: 0 < v < math.inf, "a number above 0")


def _at_least_0(kind: Callable[[str], float]) -> Callable[[str], Any]:
    return _number(kind, lambda v: 0 <= v < math.inf, "a number of at least 0")


_positive_or_inf = _number(float, lambda v: v > 0, "a number above 0 or inf")
_share = _number(float, lambda v: 0 <= v < 1, "a number in [0, 1)")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value


def _tier(text: str) -> str | None:
    return None if text == "none" else text


def _metrics(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(METRICS):
        raise argparse.ArgumentTypeError(f"must be of {','.join(METRICS)}, got {text!r}")
    return names


def _percentiles(text: str) -> list[float]:
    read = _number(float, lambda v: 0 <= v <= 100, "numbers from 0 to 100")
    return [read(word) for word in text.split(",")]


# ---------------------------------------------------------------- run


def run(options: argparse.Namespace) -> int:
    """Exit status 1 when not one latency-sensitive, best-effort or batch request was finished."""
    from rich.console import Console

    from omniserve.bench.http_report import definitions, tables
    from omniserve.bench.http_run import run_bench
    from omniserve.bench.measure import write_json

    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, MIN_WIDTH))
    if options.plot and find_spec("matplotlib") is None:
        raise ConfigError("plot: matplotlib is not installed (pip install 'omniserve[plots]')")
    # asyncio's own loop, not uvloop: that one's clock counts whole milliseconds.
    finished = asyncio.run(run_bench(options, console))
    report = finished.report
    for table in tables(report, options.percentile_metrics, options.metric_percentiles):
        console.print(table)
    _print_reasons(report, console)
    console.print(definitions(), markup=False)
    if options.save_result or options.save_detailed:
        path = options.result_dir / (options.result_filename or _file_name(options, report))
        write_json(path, report | {"options": _as_json(vars(options))})
        console.print(f"written to {path}", markup=False)
    if options.plot:
        from omniserve.bench.http_plot import plot_run

        plot_run(finished.sender.records, finished.goals, options.plot)
        console.print(f"plotted to {options.plot}", markup=False)
    return 0 if _has_finished(report) else 1


def _print_reasons(report: Report, console: Any) -> None:
    for name, figures in report["classes"].items():
        for reason, count in figures["reasons"].items():
            console.print(f"{name}: {count} x {reason}", markup=False, highlight=False)
        off = figures["prompts_of_other_length"]
        if off:
            counted = figures["prompts_counted_by_server"]
            console.print(
                f"{name}: {off} of {counted} prompts had another length for the server", markup=False
            )


def _has_finished(report: Report) -> bool:
    in_batch = report.get("batch", {}).get("counts", {}).get("completed", 0)
    return bool(in_batch or any(figures["completed"] for figures in report["classes"].values()))


def _file_name(options: argparse.Namespace, report: Report) -> str:
    model = report["server"]["model"].rsplit("/", 1)[-1]
    return f"omniserve-{options.request_rate:g}qps-{model}-{datetime.now():%Y%m%d-%H%M%S}.json"


def _as_json(options: dict[str, Any]) -> dict[str, Any]:
    """Flags as a file takes them; JSON has no infinity."""
    shown = {k: v for k, v in options.items() if k != "run"}
    return {
        k: str(v) if isinstance(v, Path) or (isinstance(v, float) and math.isinf(v)) else v
        for k, v in shown.items()
    }
