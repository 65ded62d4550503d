"""`service_tier` and the SLO headers of a request: its service class, its targets, and the tier to answer."""

from __future__ import annotations

from dataclasses import dataclass

from omniserve.server.errors import invalid
from omniserve.types import BEST_EFFORT, LATENCY_SENSITIVE, SLO, ServiceClass

FLEX, DEFAULT, AUTO = "flex", "default", "auto"
# All of them are served alike, as the one that the answer then states.
LATENCY_SENSITIVE_TIERS = (DEFAULT, AUTO, "priority", "fast", "scale")
TIERS = (*LATENCY_SENSITIVE_TIERS, FLEX)


@dataclass(frozen=True, slots=True)
class Tier:
    """The service class of a request, the tier it asked for, and the one it got, which its answer states."""

    service_class: str
    asked: str
    stated: str

    @property
    def is_best_effort(self) -> bool:
        return self.service_class == BEST_EFFORT.name


BATCH_TIER = Tier(BEST_EFFORT.name, FLEX, FLEX)


def tier_of(asked: object) -> Tier:
    """ApiError 400 naming the tiers when it is none of them."""
    if asked == FLEX:
        return BATCH_TIER
    name = DEFAULT if asked is None else asked
    if not isinstance(name, str) or name not in LATENCY_SENSITIVE_TIERS:
        raise invalid("service_tier", f"service_tier: {asked!r:.80} is none of {', '.join(TIERS)}")
    return Tier(LATENCY_SENSITIVE.name, name, DEFAULT)


@dataclass(frozen=True, slots=True)
class Clamp:
    """Bounds of what a client may ask for, targets in seconds; None: no bound. Lower priorities go first."""

    tightest_ttft_s: float | None = None
    tightest_tpot_s: float | None = None
    loosest_ttft_s: float | None = None
    loosest_tpot_s: float | None = None
    lowest_priority: int | None = None


def priority_within(asked: int, clamps: tuple[Clamp, ...]) -> int:
    """The priority that a request brings, no lower than any clamp allows."""
    return max((asked, *(c.lowest_priority for c in clamps if c.lowest_priority is not None)))


def targets(
    kind: ServiceClass, ttft_ms: str | None, tpot_ms: str | None, clamps: tuple[Clamp, ...]
) -> SLO | None:
    """Targets that a request brings in headers (milliseconds), brought within its class's and every clamp.

    One header alone leaves the other target to the class. None: those of its class, which a request without
    headers has unless its key's bounds are others: to leave them out is no way around a clamp.
    """
    if ttft_ms is None and tpot_ms is None:
        if kind.slo is None:
            return None
        bounded = _clamped(kind.slo, (*clamps, _of_class(kind)))
        return None if bounded == kind.slo else bounded
    if kind.slo is None:
        raise invalid(
            "x-slo-ttft-ms" if ttft_ms is not None else "x-slo-tpot-ms",
            "this server promises no targets, so that a request can have none of its own; "
            "leave the header out, or start the server with --slo-ttft-s and --slo-tpot-s",
        )
    asked = SLO(
        kind.slo.ttft_s if ttft_ms is None else _seconds("x-slo-ttft-ms", ttft_ms),
        kind.slo.tpot_s if tpot_ms is None else _seconds("x-slo-tpot-ms", tpot_ms),
    )
    # The class's own clamp is the last word: the engine refuses what is outside it.
    return _clamped(asked, (*clamps, _of_class(kind)))


def _of_class(kind: ServiceClass) -> Clamp:
    tightest, loosest = kind.tightest or kind.slo, kind.loosest
    return Clamp(
        None if tightest is None else tightest.ttft_s,
        None if tightest is None else tightest.tpot_s,
        None if loosest is None else loosest.ttft_s,
        None if loosest is None else loosest.tpot_s,
    )


def _clamped(asked: SLO, clamps: tuple[Clamp, ...]) -> SLO:
    for clamp in clamps:
        asked = SLO(
            _within(asked.ttft_s, clamp.tightest_ttft_s, clamp.loosest_ttft_s),
            _within(asked.tpot_s, clamp.tightest_tpot_s, clamp.loosest_tpot_s),
        )
    return asked


def _seconds(header: str, text: str) -> float:
    try:
        value = float(text) / 1000
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise invalid(header, f"{header}: must be a number of milliseconds above 0, got {text!r:.80}")
    return value


def _within(value: float, low: float | None, high: float | None) -> float:
    value = value if high is None else min(value, high)
    return value if low is None else max(value, low)
