"""What a run achieved: attainment, goodput, latencies, tokens. Pure; definitions are those of the reports.

TTFT        first token - intended arrival: waiting counts, also in the sender
TPOT        (last token - first token) / (tokens - 1); none for one token, which then misses no target
ITL         every gap between two moments at which tokens of a request came
E2EL        last token - intended arrival, of finished requests
attainment  share of requests that finished and met their targets; over the *offered* ones a request that
            was refused, failed, timed out or was cancelled is a miss; over the *admitted* ones a refused
            request does not count at all. One that the end of the run cut off counts in neither: nobody knows
goodput     requests per second that met all their targets (vLLM's and DistServe's definition)
harvest     best-effort tokens/s beside latency-sensitive traffic over those with the box to itself
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, Protocol

from omniserve.bench.measure import percentile

Outcome = Literal["finished", "refused", "failed", "cancelled", "timed_out", "unfinished"]
DEFINITIONS = (
    "TTFT counts from the intended arrival; TPOT leaves the first token out; a request attains when it "
    "finishes within both targets; offered: refused, failed, timed out and cancelled requests are misses; "
    "admitted: without the refused ones; goodput: requests/s that attain"
)


@dataclass(slots=True)
class Record:
    """What became of one request. Seconds since the load began.

    due_s: intended arrival; sent_s: when the sender came to it. token_s: when each token came.
    num_prompt, num_output: tokens asked for; counted_prompt: tokens of the prompt as the target counted them,
    where it said so. outcome: "unfinished" when the run ended first (batch work; never for requests that have
    targets).
    """

    service_class: str
    due_s: float
    num_prompt: int
    num_output: int
    sent_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    outcome: Outcome = "unfinished"
    reason: str = ""
    counted_prompt: int | None = None

    @property
    def ttft_s(self) -> float | None:
        return self.token_s[0] - self.due_s if self.token_s else None

    @property
    def tpot_s(self) -> float | None:
        count = len(self.token_s)
        return (self.token_s[-1] - self.token_s[0]) / (count - 1) if count > 1 else None

    @property
    def e2el_s(self) -> float | None:
        return self.token_s[-1] - self.due_s if self.outcome == "finished" and self.token_s else None

    @property
    def itl_s(self) -> list[float]:
        """One for each time after the first that tokens came; several may come at once."""
        return [b - a for a, b in pairwise(self.token_s) if b > a]


def spread_over(token_s: Sequence[float], count: int) -> list[float]:
    """The times of `count` tokens that came at the times `token_s`, of which some brought several or none.

    First and last stay what they are, so TTFT and TPOT do not depend on who shared a moment with whom.
    """
    last = len(token_s) - 1
    if last < 0 or count == len(token_s):
        return list(token_s)
    return [token_s[round(i * last / max(1, count - 1))] for i in range(count)]


class Targets(Protocol):
    """An SLO, or what is like one: seconds to the first token and for each later one."""

    @property
    def ttft_s(self) -> float: ...

    @property
    def tpot_s(self) -> float: ...


def meets_ttft(record: Record, slo: Targets) -> bool:
    return record.outcome == "finished" and record.ttft_s is not None and record.ttft_s <= slo.ttft_s


def meets_tpot(record: Record, slo: Targets) -> bool:
    return record.outcome == "finished" and (record.tpot_s is None or record.tpot_s <= slo.tpot_s)


def meets(record: Record, slo: Targets) -> bool:
    return meets_ttft(record, slo) and meets_tpot(record, slo)


@dataclass(frozen=True, slots=True)
class Attained:
    """Shares (0 to 1) of some requests that met TTFT, TPOT, both; None of no requests."""

    requests: int
    ttft: float | None
    tpot: float | None
    both: float | None


def attained(records: Sequence[Record], slo: Targets, over: Literal["offered", "admitted"]) -> Attained:
    left_out = ("unfinished",) if over == "offered" else ("unfinished", "refused")
    counted = [r for r in records if r.outcome not in left_out]
    n = len(counted)
    if not n:
        return Attained(0, None, None, None)
    hits = [(meets_ttft(r, slo), meets_tpot(r, slo)) for r in counted]
    return Attained(
        n, sum(a for a, _ in hits) / n, sum(b for _, b in hits) / n, sum(a and b for a, b in hits) / n
    )


@dataclass(frozen=True, slots=True)
class Latency:
    """P50, P90, P95, P99 in seconds over those requests that have the value; None where none has."""

    count: int
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None


def latency(values: Sequence[float | None]) -> Latency:
    known = [v for v in values if v is not None]
    if not known:
        return Latency(0, None, None, None, None)
    return Latency(len(known), *(percentile(known, share) for share in (0.50, 0.90, 0.95, 0.99)))


def mean_context(records: Sequence[Record], begin_s: float, end_s: float) -> float | None:
    """Tokens before each token that came in the window, on average: what decode attention really read."""
    before = [
        record.num_prompt + i
        for record in records
        for i, at_s in enumerate(record.token_s)
        if begin_s <= at_s < end_s
    ]
    return sum(before) / len(before) if before else None


@dataclass(frozen=True, slots=True)
class ClassReport:
    """One service class in one window of `seconds`.

    Requests count when they were due in the window; tokens count when they came in it. outcomes: requests by
    outcome. context: tokens, see mean_context. goodput: requests/s. offered, admitted and goodput are None
    for a class without targets.
    """

    service_class: str
    seconds: float
    outcomes: dict[str, int]
    ttft: Latency
    tpot: Latency
    tokens_per_s: float
    context: float | None
    offered: Attained | None
    admitted: Attained | None
    goodput: float | None


def due_between(records: Sequence[Record], begin_s: float, end_s: float) -> list[Record]:
    return [r for r in records if begin_s <= r.due_s < end_s]


def tokens_between(records: Sequence[Record], begin_s: float, end_s: float) -> int:
    return sum(begin_s <= at_s < end_s for r in records for at_s in r.token_s)


def class_report(
    records: Sequence[Record], service_class: str, window: tuple[float, float], slo: Targets | None = None
) -> ClassReport:
    """Report on one class within [window[0], window[1]) seconds of the load."""
    seconds = window[1] - window[0]
    own = [r for r in records if r.service_class == service_class]
    due = due_between(own, *window)
    outcomes: dict[str, int] = {}
    for record in due:
        outcomes[record.outcome] = outcomes.get(record.outcome, 0) + 1
    return ClassReport(
        service_class,
        seconds,
        outcomes,
        latency([r.ttft_s for r in due]),
        latency([r.tpot_s for r in due]),
        tokens_between(own, *window) / seconds,
        mean_context(own, *window),
        attained(due, slo, "offered") if slo else None,
        attained(due, slo, "admitted") if slo else None,
        sum(meets(r, slo) for r in due) / seconds if slo else None,
    )


def harvest_share(mixed_tokens_per_s: float, alone_tokens_per_s: float) -> float | None:
    """None when batch work made nothing alone: there is no share of nothing."""
    return mixed_tokens_per_s / alone_tokens_per_s if alone_tokens_per_s > 0 else None
