"""The tables that `omniserve bench-host` prints, drawn from the report that goes into the JSON file."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from rich.table import Table

from omniserve.bench.host_memory import short_name

Report = dict[str, Any]


def tables(report: Report) -> Iterator[Table]:
    yield _streams(report["stream_check"])
    yield _kernel(report)
    yield _lanes(report["host_workers"])
    yield _prefix(report["shared_prefix"])
    if report["scaling"]:
        yield _scaling(report["scaling"])
    yield _slots(report["slots"])
    yield _trip(report["trip"])
    yield _verdicts(report["targets"])


def _streams(streams: list[Report]) -> Table:
    table = _table("streaming read, GB/s", "threads", "ours", "torch.sum", "ratio (at least 0.95)")
    for s in streams:
        verdict = "" if s["holds"] else " TOO SLOW"
        table.add_row(
            str(s["threads"]),
            f"{s['stream_gbps']['median']:.1f}",
            f"{s['torch_sum_gbps']['median']:.1f}",
            f"{s['ratio']['median']:.2f} ({s['ratio']['low']:.2f} to {s['ratio']['high']:.2f}){verdict}",
        )
    return table


def _kernel(report: Report) -> Table:
    """One row per shape, all cores: the share by context, each for the lane counts in their order."""
    sweep = report["sweep"]
    threads, lanes = max(sweep["threads"]), " / ".join(map(str, sweep["lanes"]))
    table = _table(
        f"attention, {threads} threads: share of streaming at {lanes} lanes by context; SDPA at the last",
        "dtype", "head", "group", "cached, GB/s", *map(str, sweep["contexts"]), "over SDPA", "grouped",
        "stream / SDPA", "over bf16",
    )  # fmt: skip
    cases = [c for c in report["cases"] if c["threads"] == threads]
    for first in [c for c in cases if c["cached"]]:
        row = [c for c in cases if all(c[k] == first[k] for k in ("dtype", "head_dim", "group"))]
        last = [c for c in row if not c["cached"] and c["context"] == sweep["contexts"][-1]]
        table.add_row(
            short_name(first["dtype"]),
            str(first["head_dim"]),
            str(first["group"]),
            f"{first['gbps']['ours']['median']:.0f}",
            *(_shares(c for c in row if c["context"] == n and not c["cached"]) for n in sweep["contexts"]),
            *(
                _middle(last, key)
                for key in ("over_sdpa", "over_sdpa_grouped", "stream_over_sdpa", "over_bf16")
            ),
        )
    return table


def _shares(cases: Iterable[Report]) -> str:
    """Whatever some cache held is in brackets."""
    texts = [(f"{c['share_of_stream']['median']:.0%}", c["counts"]) for c in cases]
    return " / ".join(text if counts else f"({text})" for text, counts in texts)


def _middle(cases: list[Report], key: str) -> str:
    values = [c[key]["median"] for c in cases if c.get(key)]
    return f"{statistics.median(values):.1f}x" if values else ""


def _lanes(results: list[Report]) -> Table:
    table = _table(
        "through host workers, GB/s of KV",
        "dtype", "head", "group", "threads", "context", "lanes", "view", "stream", "lanes' rate", "share",
        "busy",
    )  # fmt: skip
    for r in results:
        table.add_row(
            *_shape(r),
            r["view"],
            f"{r['stream_gbps']['median']:.1f}",
            f"{r['gbps']['median']:.1f} ({r['gbps']['low']:.1f} to {r['gbps']['high']:.1f})",
            _percent(r["share_of_stream"]),
            f"{r['busy_share']['median']:.0%}",
        )
    return table


def _prefix(results: list[Report]) -> Table:
    table = _table(
        "a common prefix of 2048 tokens and 256 of one's own, 1e6 tokens of KV per second",
        "dtype", "head", "group", "threads", "context", "lanes", "shared pages", "a copy each", "ratio",
    )  # fmt: skip
    for r in results:
        rates = r["mtokens_per_s"]
        table.add_row(
            *_shape(r),
            *(f"{rates[name]['median']:.2f}" for name in ("shared", "private")),
            _ranged(r["shared_over_private"]),
        )
    return table


def _scaling(results: list[Report]) -> Table:
    table = _table(
        "all cores over one thread",
        "dtype", "head", "group", "threads", "context", "lanes", "ours", "streaming", "ours over streaming",
    )  # fmt: skip
    for r in results:
        table.add_row(*_shape(r), _ranged(r["ours"]), _ranged(r["stream"]), _ranged(r["ours_over_stream"]))
    return table


def _slots(results: list[Report]) -> Table:
    table = _table(
        f"slots: {results[0]['rows']} rows on one thread",
        "model", "dtype", "way", "us", "MB moved", "GB/s", "memcpy of as much, us", "GB/s", "beyond it, us",
    )  # fmt: skip
    for r in results:
        for way in ("exit", "take"):
            m = r[way]
            table.add_row(
                r["name"],
                short_name(r["act_dtype"]),
                way,
                f"{m['us']['median']:.0f} ({m['us']['low']:.0f} to {m['us']['high']:.0f})",
                f"{m['bytes'] / 1e6:.1f}",
                f"{m['gbps']:.1f}",
                f"{m['copy_us']['median']:.0f}",
                f"{m['copy_gbps']:.1f}",
                f"{m['over_copy_us']:.0f}",
            )
    return table


def _trip(trip: Report) -> Table:
    table = _table("one row with one token, exit to result, us", "worker", "median", "p99", "of it served")
    for name, text in (("spinning_us", "spinning"), ("parked_us", "asleep")):
        served = f"{trip['served_us']:.1f}" if name == "spinning_us" else ""
        table.add_row(text, f"{trip[name]['median']:.1f}", f"{trip[name]['p99']:.1f}", served)
    return table


def _verdicts(verdicts: list[Report]) -> Table:
    table = _table(
        "targets: the worst case and where", "target", "wanted", "measured", "at", "kept in", "met"
    )
    for v in verdicts:
        sign = "at most" if v["at_most"] else "at least"
        wanted = f"{sign} {_value(v['limit'], v['unit'])}"
        if v["met"] is None:
            table.add_row(v["target"], wanted, "not measured", "", "", "")
            continue
        worst = v["worst"]
        measured = (
            f"{_value(worst['median'], v['unit'])} "
            f"({_value(worst['low'], v['unit'])} to {_value(worst['high'], v['unit'])})"
        )
        note = f" ({v['note']})" if v["note"] else ""
        kept = f"{v['cases_met']} of {v['cases']}"
        table.add_row(v["target"] + note, wanted, measured, v["worst_at"], kept, "yes" if v["met"] else "NO")
    return table


def _value(value: float, unit: str) -> str:
    if unit == "of streaming":
        return f"{value:.0%}"
    return f"{value:.1f} us" if unit == "us" else f"{value:.2f}x"


def _shape(r: Report) -> tuple[str, ...]:
    keys = ("head_dim", "group", "threads", "context", "lanes")
    return (short_name(r["dtype"]), *(str(r[k]) for k in keys))


def _percent(spread: dict[str, float]) -> str:
    return f"{spread['median']:.0%} ({spread['low']:.0%} to {spread['high']:.0%})"


def _ranged(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['low']:.2f} to {spread['high']:.2f})"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table
