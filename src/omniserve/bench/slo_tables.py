"""The reports of bench-slo as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from omniserve.bench.measure import ms, percent
from omniserve.bench.slo_placement import CHOICES, WHOLE_BOX
from omniserve.bench.slo_verdict import HARD, KEPT, NEAR, POINT, mean

Report = dict[str, Any]


def setup_lines(setup: Report) -> Iterator[str]:
    yield (
        f"capacity {setup['capacity']:.2f} requests/s at {setup['device_threads']} device thread(s); rate "
        f"{setup['rate']:.2f}/s"
    )
    yield (
        f"ls_only: p95 TTFT {ms(setup['ttft_p95_s'])} ms, p95 TPOT {ms(setup['tpot_p95_s'])} ms, "
        f"P99 page use {setup['pages_p99']} pages ({setup['pages_p99'] * setup['page_size']} tokens)"
    )


def mixed_tables(report: Report) -> Iterator[Table | str]:
    for name, tuned in report["tuned"].items():
        held = "holds" if tuned["holds"] else "none holds, this one is nearest"
        yield (
            f"{name}: best of {len(tuned['tried'])} settings is {tuned['chosen']} ({held}; ls_only attains "
            f"{percent(tuned['reference_offered'])})"
        )
    for name, settings in report["untuned"].items():
        yield f"{name}: not tuned, {settings}"
    for table in report["tables"]:
        yield _mixed_table(table)
        yield verdict_line(table)


def _mixed_table(table: Report) -> Table:
    slo, alone = table["slo"], table["be_alone_tokens_per_s"]
    result = Table(
        title=f"SLO x{table['slo_factor']:g}: TTFT {ms(slo['ttft_s'])} ms, TPOT {ms(slo['tpot_s'])} ms; "
        f"device memory x{table['memory_factor']:g} ({table['device_tokens']} tokens); "
        f"{contexts_line(table['contexts'])}; BE alone {alone:.4g} tok/s",
        caption="* counts for its policy (better threads); ranges over seeds; P50, P99: means over seeds; "
        "rows: most device rows of a walk; BE context: tokens before each BE token, mean",
    )
    columns = (
        "policy",
        "rows",
        "requests",
        "attained, offered",
        "admitted",
        "TTFT ms P50, P99",
        "TPOT ms P50, P99",
    )
    for name in (*columns, "good/s", "BE tok/s", "BE context", "harvest", "BE over best"):
        result.add_column(name, justify="left" if name == "policy" else "right")
    for row in table["rows"]:
        result.add_row(*_mixed_row(row))
    return result


def _mixed_row(row: Report) -> Sequence[str]:
    ratio = row["be_over_best_baseline"]
    return (
        row["variant"] + (" *" if row["counts"] else ""),
        str(row["device_rows"]),
        str(row["requests"]),
        _shares(row["offered"]),
        _shares(row["admitted"]),
        f"{ms(row['ttft']['p50'])}, {ms(row['ttft']['p99'])}",
        f"{ms(row['tpot']['p50'])}, {ms(row['tpot']['p99'])}",
        f"{mean(row['goodput']):.3g}",
        _range(row["be_tokens_per_s"]),
        _tokens(row["be_context"]),
        percent(row["harvest_share"]),
        "-" if ratio is None else f"{ratio:.2f}x",
    )


def contexts_line(contexts: Report) -> str:
    """Contexts of batch jobs, and what the memory cap made of those asked for."""
    (low, high), (asked_low, asked_high) = contexts["used"], contexts["asked"]
    used = f"BE context {low} to {high}"
    if not contexts["share_too_long"]:
        return used
    return (
        f"{used}, CUT from {asked_low} to {asked_high}: {percent(contexts['share_too_long'])} of those "
        f"asked for exceed the device's {high} tokens"
    )


def verdict_line(table: Report) -> str:
    """What the table says, in one sentence each."""
    verdict = table["verdict"]
    held = "within" if verdict["within_point"] else "NOT within"
    parts = [f"omniserve is {held} {100 * POINT:g} point of ls_only ({100 * verdict['gap']:+.1f} points)"]
    if verdict["hardest"] is None:
        return f"{parts[0]}; THE LOAD PROVES NOTHING: no baseline ran"
    if verdict["best_baseline"] is None:
        parts.append("no baseline holds the targets")
    elif verdict["be_ratio"] is None:
        parts.append(f"{verdict['best_baseline']} holds the targets and makes no batch tokens")
    else:
        parts.append(f"{verdict['be_ratio']:.2f}x the BE tok/s of {verdict['best_baseline']}")
    if verdict["too_easy"]:
        parts.append(
            f"THE LOAD IS TOO EASY: every baseline attains {percent(verdict['hardest'])} or more, "
            f"one should fall below {HARD:.0%}"
        )
    return "; ".join(parts)


def arrival_tables(report: Report) -> Iterator[Table | str]:
    result = Table(
        title=f"A lone chat that comes to an engine full of batch work; {contexts_line(report['contexts'])}"
    )
    for name in ("chats", "TTFT ms alone", "wait ms P50, P99", "walk bound ms", "BE tok/s"):
        result.add_column(name, justify="right")
    wait = report["wait"]
    result.add_row(
        str(report["chats"]),
        ms(report["ttft_alone_s"]),
        f"{ms(wait['p50'])}, {ms(wait['p99'])}",
        ms(report["walk_bound_s"]),
        f"{report['be_tokens_per_s']:.4g}",
    )
    yield result
    verdict = "holds" if report["verdict"]["holds"] else "does NOT hold"
    yield (
        "the P99 wait, rest of the walk under way and batch rows of the chat's own, is "
        f"{report['verdict']['p99_over_bound']:.2f}x the walk bound; at most once that bound: {verdict}"
    )


def overload_tables(report: Report) -> Iterator[Table | str]:
    slo = report["slo"]
    result = Table(
        title=f"Overload: {report['rate']:.2f} requests/s, twice the capacity; TTFT {ms(slo['ttft_s'])} ms, "
        f"TPOT {ms(slo['tpot_s'])} ms; {contexts_line(report['contexts'])}"
    )
    for name in (
        "",
        "requests",
        "TTFT met, admitted",
        "both, offered",
        "good/s",
        "TTFT ms P50, P99",
        "BE tok/s",
    ):
        result.add_column(name)
    for name, side in report["sides"].items():
        result.add_row(
            name,
            ", ".join(f"{count} {outcome}" for outcome, count in sorted(side["outcomes"].items())),
            percent(side["ttft_of_admitted"]),
            percent(side["both_of_offered"]),
            f"{side['goodput']:.3g}",
            f"{ms(side['ttft']['p50'])}, {ms(side['ttft']['p99'])}",
            f"{side['be_tokens_per_s']:.4g}",
        )
    yield result
    verdict = "holds" if report["verdict"]["holds"] else "does NOT hold"
    yield f"at least {KEPT:.0%} of the admitted requests meet TTFT: {verdict}"


def placement_tables(report: Report) -> Iterator[Table | str]:
    result = Table(
        title="BE tok/s by where batch work decodes, beside latency-sensitive traffic",
        caption=f"winner: most tokens of lanes and device at the same threads, where they are within "
        f"{100 * POINT:g} point of ls_only; good: auto is, too, and reaches {NEAR:.0%} of the winner; in "
        "brackets the mean context when tokens came, and the attainment of the latency-sensitive class; "
        "!: breaks targets",
    )
    for name in ("context", "memory", "ls_only", *CHOICES, WHOLE_BOX, "winner", "auto of winner", "good"):
        result.add_column(name)
    for spot in report["spots"]:
        result.add_row(
            str(spot["context"]),
            f"x{spot['memory_factor']:g}",
            percent(mean(spot["reference"])),
            *(_choice(spot, name) for name in (*CHOICES, WHOLE_BOX)),
            spot["winner"] or "neither holds",
            percent(spot["auto_share_of_winner"]),
            {True: "yes", False: "NO", None: "not known"}[spot["is_near"]],
        )
    yield result
    if report["spots"]:
        verdict = report["verdict"]
        yield (
            f"auto is good at {verdict['near']} of {verdict['spots']} spots, not known at "
            f"{verdict['not_known']}: {'holds' if verdict['holds'] else 'does NOT hold'}"
        )
    for spot in report["left_out"]:
        yield (
            f"left out: context {spot['context']} does not fit a device of {spot['device_tokens']} tokens "
            f"(memory x{spot['memory_factor']:g})"
        )


def _choice(spot: Report, name: str) -> str:
    """The device with all cores is measured only where another choice does not have them."""
    if name not in spot["rates"]:
        return "-"
    context, offered = spot["contexts"][name], mean(spot["offered"][name])
    broken = "" if spot["holds"].get(name, True) else " !"
    return f"{_range(spot['rates'][name])} [{_tokens(context)}, {percent(offered)}{broken}]"


def _tokens(count: float | None) -> str:
    return "-" if count is None else f"{count:.0f}"


def _shares(values: Sequence[float]) -> str:
    low, high = (100 * f(values) for f in (min, max))
    return f"{100 * mean(values):.1f} % ({low:.0f}-{high:.0f})"


def _range(values: Sequence[float]) -> str:
    return f"{mean(values):.4g} ({min(values):.4g}-{max(values):.4g})"
