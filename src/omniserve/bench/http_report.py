"""What a run against a server gave: vLLM's figures for each class, as JSON and as tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from omniserve.bench.attainment import (
    DEFINITIONS,
    Attained,
    Record,
    Targets,
    class_report,
    due_between,
    tokens_between,
)
from omniserve.bench.http_names import METRICS
from omniserve.bench.measure import percent, percentile
from omniserve.errors import ConfigError

NOTES = (
    "ITL: gaps between the moments at which tokens of a request came; E2EL: last token - intended arrival, "
    "of finished requests; TTFT, TPOT and ITL are over all requests that have the value; a percentile is a "
    "value that occurred, not interpolated; rates are over the seconds from the start of the load until its "
    "last latency-sensitive request was done; what was then cut off (unfinished) is neither hit nor miss; in "
    "a closed loop a request arrives when there is a place for it"
)

Report = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Goal:
    """Targets of `--goodput`; one that is not set is always met. Seconds."""

    ttft_s: float = math.inf
    tpot_s: float = math.inf


def read_goal(words: Sequence[str], flag: str = "goodput") -> Goal | None:
    """`["ttft:500", "tpot:50"]`, in milliseconds as vLLM writes it; None of no words."""
    if not words:
        return None
    found: dict[str, float] = {}
    for word in words:
        name, _, value = word.partition(":")
        if name not in ("ttft", "tpot") or name in found:
            raise ConfigError(f"{flag}: takes ttft:MS and tpot:MS, each once, got {word!r}")
        try:
            found[name] = float(value) / 1e3
        except ValueError:
            found[name] = math.nan
        if not found[name] > 0:
            raise ConfigError(f"{flag}: {name} must be a number of milliseconds above 0, got {value!r}")
    return Goal(found.get("ttft", math.inf), found.get("tpot", math.inf))


def class_figures(
    records: Sequence[Record],
    service_class: str,
    seconds: float,
    goal: Targets | None,
    percentiles: Sequence[float],
) -> Report:
    """One class in [0, seconds): names as in the result file of `vllm bench serve`, milliseconds as there.

    percentiles: in per cent. `attained_offered` and `attained_admitted` are None without targets.
    """
    window = (0.0, math.nextafter(seconds, math.inf))
    report = class_report(records, service_class, window, goal)
    own = [r for r in records if r.service_class == service_class]
    due = due_between(own, *window)
    finished = report.outcomes.get("finished", 0)
    prompt_tokens = sum(_prompt_tokens(r) for r in due if r.outcome == "finished")
    counted = [r for r in due if r.counted_prompt is not None]
    return {
        "num_prompts": len(due),
        "outcomes": report.outcomes,
        "completed": finished,
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": tokens_between(own, *window),
        "request_throughput": finished / seconds,
        "request_goodput": report.goodput,
        "output_throughput": report.tokens_per_s,
        "total_token_throughput": report.tokens_per_s + prompt_tokens / seconds,
        "attained_offered": _attained(report.offered),
        "attained_admitted": _attained(report.admitted),
        **_latencies(due, percentiles),
        "prompts_counted_by_server": len(counted),
        "prompts_of_other_length": sum(r.counted_prompt != r.num_prompt for r in counted),
        "reasons": _reasons(due),
    }


def _values(record: Record, metric: str) -> list[float]:
    """Of one request, in seconds; none where it has no such value."""
    if metric == "itl":
        return record.itl_s
    value: float | None = getattr(record, f"{metric}_s")
    return [] if value is None else [value]


def _prompt_tokens(record: Record) -> int:
    return record.num_prompt if record.counted_prompt is None else record.counted_prompt


def _attained(found: Attained | None) -> Report | None:
    return None if found is None else asdict(found)


def _latencies(records: Sequence[Record], percentiles: Sequence[float]) -> Report:
    result: Report = {}
    for name in METRICS:
        values = [1e3 * value for record in records for value in _values(record, name)]
        result[f"mean_{name}_ms"] = statistics.fmean(values) if values else None
        result[f"median_{name}_ms"] = statistics.median(values) if values else None
        result[f"std_{name}_ms"] = statistics.pstdev(values) if values else None
        for p in percentiles:
            result[f"p{p:g}_{name}_ms"] = percentile(values, p / 100) if values else None
    return result


def _reasons(records: Sequence[Record], most: int = 10) -> dict[str, int]:
    """Why requests were lost, the most frequent reasons first."""
    counts: dict[str, int] = {}
    for record in records:
        if record.reason:
            counts[record.reason] = counts.get(record.reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1])[:most])


def sender_late(records: Sequence[Record]) -> Report:
    """Seconds from the intended arrival until the request was sent: what the client itself lost, and where
    places were few, the wait for one."""
    late = [r.sent_s - r.due_s for r in records if r.outcome != "unfinished"]
    return {"late_p99_s": percentile(late, 0.99), "late_max_s": max(late)} if late else {}


def request_rows(records: Sequence[Record]) -> list[Report]:
    """Every request, for --save-detailed. Seconds since the load began."""
    return [asdict(r) for r in records]


# ---------------------------------------------------------------- tables


def definitions() -> str:
    return f"{DEFINITIONS}. {NOTES}."


def tables(report: Report, metrics: Sequence[str], percentiles: Sequence[float]) -> Iterator[Table]:
    yield _class_table(report["classes"])
    latencies = _latency_table(report["classes"], metrics, percentiles)
    if latencies.row_count:
        yield latencies
    if report.get("batch"):
        yield _batch_table(report["batch"])


def _class_table(classes: Mapping[str, Report]) -> Table:
    result = Table(title="Requests and rates")
    columns = ("class", "requests", "attained, offered", "admitted", "good/s", "req/s", "output tok/s")
    for name in columns:
        result.add_column(name, justify="left" if name in columns[:2] else "right")
    for name, figures in classes.items():
        outcomes = ", ".join(f"{n} {what}" for what, n in sorted(figures["outcomes"].items())) or "none"
        goodput = figures["request_goodput"]
        result.add_row(
            name,
            outcomes,
            _both(figures["attained_offered"]),
            _both(figures["attained_admitted"]),
            "-" if goodput is None else f"{goodput:.3g}",
            f"{figures['request_throughput']:.3g}",
            f"{figures['output_throughput']:.4g}",
        )
    return result


def _both(found: Report | None) -> str:
    return percent(found["both"] if found else None)


def _latency_table(
    classes: Mapping[str, Report], metrics: Sequence[str], percentiles: Sequence[float]
) -> Table:
    result = Table(title="Latencies, ms")
    statistics_shown = ("mean", "median", "std", *(f"p{p:g}" for p in percentiles))
    for name in ("class", "metric", *statistics_shown):
        result.add_column(name, justify="left" if name in ("class", "metric") else "right")
    for name, figures in classes.items():
        for metric in metrics:
            values = [figures[f"{which}_{metric}_ms"] for which in statistics_shown]
            if values[0] is not None:
                result.add_row(name, metric.upper(), *("-" if v is None else f"{v:.4g}" for v in values))
    return result


def _batch_table(batch: Report) -> Table:
    result = Table(title="Batch through /v1/batches")
    for name in ("status", "lines", "completed", "failed", "seconds", "output tok/s"):
        result.add_column(name, justify="right")
    counts, rate = batch["counts"], batch["tokens_per_s"]
    result.add_row(
        batch["status"],
        *(str(counts.get(name, "-")) for name in ("total", "completed", "failed")),
        f"{batch['seconds']:.4g}",
        "-" if rate is None else f"{rate:.4g}",
    )
    return result
