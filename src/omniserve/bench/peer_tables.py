"""The report of a comparison with peers as a table: a row for each engine, a column for each case."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from omniserve.bench.peer_rounds import OURS

Report = dict[str, Any]
NOTHING = "-"


def table(report: Report) -> Table:
    """Tokens/s as median (low to high) over rounds, and below it ours over the peer's of the same round."""
    cases = report["cases"]
    rounds, threads = report["rounds"], report["threads"]
    made = Table(
        title=f"tokens/s on {threads} threads, median (range) of {rounds} rounds; below: ours over theirs",
        caption=_legend(cases),
    )
    made.add_column("engine")
    for heading in ("start-up, s", *(case["case"] for case in cases)):
        made.add_column(heading, justify="right")
    for name, peer in report["peers"].items():
        label = name if peer["version"] is None else f"{name}\n{peer['version']}"
        startup = report["startup_s"].get(name)
        first = _spread(startup) if startup else "missing" if peer["failure"] else NOTHING
        made.add_row(label, first, *(_cell(case, name) for case in cases))
    return made


def failures(report: Report) -> list[str]:
    """A line for each peer that was not measured to the end."""
    return [f"{name}: {peer['failure']}" for name, peer in report["peers"].items() if peer["failure"]]


def checks(report: Report) -> list[str]:
    """Lines that say whether the comparison was fair: was the machine quiet, is it the same model."""
    busy = ", ".join(f"{name} {s['median']:.2f}" for name, s in report["others_busy_cores"].items())
    lines = [f"cores that others kept busy while it computed: {busy}"]
    shares: dict[str, list[float]] = {}
    for case in report["cases"]:
        for name, share in case["same_first_tokens"].items():
            shares.setdefault(name, []).append(share)
    if shares:
        same = ", ".join(f"{name} {sum(values) / len(values):.0%}" for name, values in shares.items())
        lines.append(f"first tokens like ours, mean of cases: {same}")
    return lines


def _legend(cases: list[Report]) -> str:
    texts = []
    for is_prefill in (False, True):
        chosen = [case for case in cases if (case["output_tokens"] == 1) is is_prefill]
        if chosen and is_prefill:
            texts.append("prompt of n: prompt tokens/s of one prompt with one output token")
        elif chosen:
            first = chosen[0]
            texts.append(
                f"n at once: output tokens/s of n requests of {first['prompt_tokens']} prompt and "
                f"{first['output_tokens']} output tokens"
            )
    return "; ".join(texts)


def _cell(case: Report, name: str) -> str:
    if name not in case["tokens_per_s"]:
        return NOTHING
    rate = _spread(case["tokens_per_s"][name])
    ratio = case["ours_over"].get(name)
    return rate if name == OURS or ratio is None else f"{rate}\n{ratio['median']:.2f}x"


def _spread(spread: dict[str, float]) -> str:
    return f"{spread['median']:.3g} ({spread['low']:.3g} to {spread['high']:.3g})"
