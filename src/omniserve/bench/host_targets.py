"""What the project promises of host attention, held against a report. Unmet is said, and fails nothing."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

from omniserve.bench.host_lanes import FULL, LAYERWISE
from omniserve.bench.host_memory import TORCH_DTYPES, short_name

Report = dict[str, Any]
Measured = tuple[str, dict[str, float]]  # what was measured, its spread


@dataclass(frozen=True, slots=True)
class Target:
    """`limit` is a lower limit (an upper one with `at_most`) that every case has to keep, by its median."""

    name: str
    limit: float
    unit: str
    cases: tuple[Measured, ...]
    at_most: bool = False
    note: str = ""

    def keeps(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit

    def as_dict(self) -> dict[str, Any]:
        """The worst case stands for all; `met` is None when nothing was measured that counts."""
        base = {"target": self.name, "limit": self.limit, "at_most": self.at_most, "unit": self.unit}
        if not self.cases:
            return {**base, "met": None, "cases": 0, "cases_met": 0}
        pick = max if self.at_most else min
        at, worst = pick(self.cases, key=lambda case: case[1]["median"])
        met = sum(self.keeps(spread["median"]) for _, spread in self.cases)
        return {
            **base,
            "met": met == len(self.cases),
            "cases": len(self.cases),
            "cases_met": met,
            "worst": worst,
            "worst_at": at,
            "best": (min if self.at_most else max)(spread["median"] for _, spread in self.cases),
            "note": self.note,
        }


def verdicts(report: Report) -> list[dict[str, Any]]:
    targets = [*_kernel(report), *_lanes(report), *_slots(report), *_scaling(report)]
    return [target.as_dict() for target in targets]


def _chosen(cases: Iterable[Report], value: str, **wanted: Any) -> tuple[Measured, ...]:
    """Cases that count, have `value`, and match: a field equals the value, or satisfies the function."""

    def matches(case: Report) -> bool:
        return all(want(case[k]) if callable(want) else case[k] == want for k, want in wanted.items())

    return tuple((_text(c), c[value]) for c in cases if matches(c) and c.get(value) and c.get("counts", True))


def _text(case: Report) -> str:
    return f"group {case['group']} head {case['head_dim']} context {case['context']} lanes {case['lanes']}"


def _at_least(limit: int) -> Callable[[int], bool]:
    return lambda value: value >= limit


def _kernel(report: Report) -> Iterable[Target]:
    cases = report["cases"]
    all_cores: Report = {"threads": max(report["sweep"]["threads"])}
    many: Report = {**all_cores, "context": _at_least(1024), "lanes": _at_least(8)}
    share = "share_of_stream"
    for dtype in ("bfloat16", "float16"):
        for name, limit, shape in (
            ("head 128, groups 1 to 4", 0.80, {"head_dim": 128, "group": lambda g: g <= 4}),
            ("head 128, group 8", 0.65, {"head_dim": 128, "group": 8}),
            ("head 64, group 3", 0.70, {"head_dim": 64, "group": 3}),
        ):
            chosen = _chosen(cases, share, dtype=dtype, **shape, **many)
            yield Target(
                f"{short_name(dtype)}, {name}, 8 lanes and 1k or more", limit, "of streaming", chosen
            )
    for dtype, limit in (("bfloat16", 10.0), ("float32", 2.0)):
        where: Report = {"dtype": dtype, "context": 4096, "lanes": 8, **all_cores}
        ceilings = [spread["median"] for _, spread in _chosen(cases, "stream_over_sdpa", **where)]
        note = f"streaming itself: {min(ceilings):.1f} to {max(ceilings):.1f}" if ceilings else ""
        chosen = _chosen(cases, "over_sdpa", **where)
        yield Target(f"{short_name(dtype)} over torch SDPA, 4k, 8 lanes", limit, "times", chosen, note=note)
    narrow = [d for d, torch_dtype in TORCH_DTYPES.items() if torch_dtype is None] or ["int8"]
    for dtype in narrow:
        chosen = _chosen(cases, "over_bf16", dtype=dtype, context=4096, lanes=_at_least(8), **all_cores)
        yield Target(f"{short_name(dtype)} over bf16 in tokens/s, 4k, 8 lanes or more", 1.6, "times", chosen)


def _lanes(report: Report) -> Iterable[Target]:
    cases = report["host_workers"]
    all_cores: Report = {"threads": max(report["sweep"]["threads"])}
    share = "share_of_stream"
    chosen = _chosen(cases, share, view=FULL, lanes=_at_least(8), context=_at_least(1024), **all_cores)
    yield Target(
        "through host workers, queue kept full, 8 lanes and 1k or more", 0.80, "of streaming", chosen
    )
    chosen = _chosen(cases, share, view=LAYERWISE, lanes=1, context=4096, **all_cores)
    yield Target("through host workers, one lane alone at 4k, all cores", 0.60, "of streaming", chosen)


def _slots(report: Report) -> Iterable[Target]:
    for shape, way in product(report["slots"], ("exit", "take")):
        name = f"{way} of {shape['rows']} rows, {shape['name']} {short_name(shape['act_dtype'])}"
        note = f"memcpy of as much: {shape[way]['copy_us']['median']:.0f} us"
        yield Target(name, 75.0, "us", ((way, shape[way]["us"]),), at_most=True, note=note)
    trip = report["trip"]["spinning_us"]
    yield Target(
        "submit to result of one row, both sides spinning", 5.0, "us", (("context 1", trip),), at_most=True
    )


def _scaling(report: Report) -> Iterable[Target]:
    chosen = _chosen(report["scaling"], "ours_over_stream")
    yield Target("gain from all cores over streaming's own, 4k, 8 lanes", 1.0, "times", chosen)


def add_over_bf16(cases: list[Report]) -> None:
    """Adds `over_bf16` to cases of types torch cannot read: tokens/s over those of bf16 in the same shape.

    Both are taken at the same streaming rate, each from its own rounds: the two cases are minutes apart.
    """
    shape = operator.itemgetter("group", "head_dim", "context", "lanes", "threads", "cached")
    bf16 = {shape(c): c for c in cases if c["dtype"] == "bfloat16"}
    for case in cases:
        other = bf16.get(shape(case))
        if TORCH_DTYPES.get(case["dtype"]) is not None or other is None:
            continue
        factor = other["token_bytes"] / case["token_bytes"] / other["share_of_stream"]["median"]
        case["over_bf16"] = {k: v * factor for k, v in case["share_of_stream"].items()}
