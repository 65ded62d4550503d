"""Attainment, goodput and percentiles on requests that can be counted by hand."""

from __future__ import annotations

import pytest

from omniserve.bench.attainment import (
    Outcome,
    Record,
    attained,
    class_report,
    harvest_share,
    latency,
    mean_context,
    spread_over,
    tokens_between,
)
from omniserve.types import SLO

LS, BE = "latency_sensitive", "best_effort"
TARGETS = SLO(ttft_s=1.0, tpot_s=0.125)


def record(due_s: float, token_s: list[float], outcome: Outcome = "finished", kind: str = LS) -> Record:
    return Record(kind, due_s, 10, len(token_s), due_s, token_s, outcome)


GOOD = record(0.0, [1.0, 1.125, 1.25])  # at both limits exactly
LATE = record(1.0, [2.5, 2.6])  # TTFT 1.5
SLOW = record(2.0, [2.5, 2.75])  # TPOT 0.25
SHORT = record(3.0, [3.5])  # one token: there is no TPOT to miss
REFUSED = record(4.0, [], "refused")
TIMED_OUT = record(5.0, [5.1, 5.2], "timed_out")
CANCELLED = record(6.0, [6.1], "cancelled")
FAILED = record(7.0, [], "failed")
ALL = [GOOD, LATE, SLOW, SHORT, REFUSED, TIMED_OUT, CANCELLED, FAILED]


def test_tpot_leaves_the_first_token_out() -> None:
    assert record(0.0, [4.0, 4.5, 5.5]).tpot_s == 0.75
    assert SHORT.tpot_s is None


def test_ttft_counts_from_the_intended_arrival_not_from_the_sending() -> None:
    sent_late = Record(LS, 1.0, 10, 1, sent_s=3.0, token_s=[3.25])
    assert sent_late.ttft_s == 2.25


def test_gaps_are_between_moments_and_the_end_is_that_of_finished_requests() -> None:
    lumpy = record(1.0, [2.0, 2.0, 2.5, 4.0])
    assert (lumpy.itl_s, lumpy.e2el_s) == ([0.5, 1.5], 3.0)
    assert TIMED_OUT.e2el_s is None


@pytest.mark.parametrize(
    ("seen", "count", "spread"),
    [
        ([1.0, 2.0, 4.0], 3, [1.0, 2.0, 4.0]),
        ([1.0, 2.0, 4.0], 5, [1.0, 1.0, 2.0, 4.0, 4.0]),  # moments that brought several
        ([1.0, 2.0, 4.0], 2, [1.0, 4.0]),  # one that brought none
        ([1.0, 2.0, 4.0], 1, [1.0]),
        ([1.0], 3, [1.0, 1.0, 1.0]),
        ([], 3, []),  # nothing was seen: there is no time to give
    ],
)
def test_a_count_from_elsewhere_keeps_first_and_last_token(
    seen: list[float], count: int, spread: list[float]
) -> None:
    assert spread_over(seen, count) == spread


def test_over_offered_requests_everything_unserved_is_a_miss() -> None:
    found = attained(ALL, TARGETS, "offered")
    assert (found.requests, found.ttft, found.tpot, found.both) == (8, 3 / 8, 3 / 8, 2 / 8)


def test_over_admitted_requests_only_refusals_do_not_count() -> None:
    found = attained(ALL, TARGETS, "admitted")
    assert (found.requests, found.ttft, found.tpot, found.both) == (7, 3 / 7, 3 / 7, 2 / 7)


def test_nothing_offered_is_no_attainment_at_all() -> None:
    assert attained([], TARGETS, "offered").both is None
    assert attained([REFUSED], TARGETS, "admitted").both is None
    assert attained([REFUSED], TARGETS, "offered").both == 0.0


def test_what_the_end_of_the_run_cut_off_is_neither_hit_nor_miss() -> None:
    cut = record(8.0, [8.5], "unfinished")
    assert attained([GOOD, cut], TARGETS, "offered") == attained([GOOD], TARGETS, "offered")
    assert attained([GOOD, cut], TARGETS, "admitted") == attained([GOOD], TARGETS, "admitted")


def test_percentiles_are_over_the_requests_that_have_the_value() -> None:
    found = latency([None, *(float(i) for i in range(100))])
    assert (found.count, found.p50, found.p90, found.p95, found.p99) == (100, 50.0, 90.0, 95.0, 99.0)
    assert latency([None]).p50 is None


def test_a_report_counts_requests_by_arrival_and_tokens_by_their_time() -> None:
    window = (1.0, 5.0)
    found = class_report([*ALL, record(1.0, [1.5, 4.9, 5.0], kind=BE)], LS, window, TARGETS)
    assert found.outcomes == {"finished": 3, "refused": 1}  # those due at 1, 2, 3 and 4 s
    # GOOD was due before the window, yet its tokens at 1.0, 1.125 and 1.25 s came in it.
    assert found.tokens_per_s == (3 + 2 + 2 + 1) / 4
    assert found.offered is not None
    assert found.offered.both == 1 / 4
    assert found.goodput == 1 / 4  # SHORT alone, in 4 s
    batch = class_report([*ALL, record(1.0, [1.5, 4.9, 5.0], kind=BE)], BE, window)
    assert batch.tokens_per_s == 2 / 4
    assert batch.offered is None


def test_the_mean_context_counts_prompt_and_tokens_before_each_token_of_the_window() -> None:
    one = Record(BE, 0.0, 100, 3, 0.0, [0.5, 1.5, 2.5])
    other = Record(BE, 0.0, 200, 1, 0.0, [1.0])
    assert mean_context([one, other], 1.0, 3.0) == (101 + 102 + 200) / 3
    assert mean_context([one], 5.0, 6.0) is None


def test_windows_are_open_at_their_end() -> None:
    assert tokens_between([GOOD], 1.0, 1.25) == 2


def test_the_harvest_share_is_the_mixed_rate_over_the_rate_alone() -> None:
    assert harvest_share(30.0, 40.0) == pytest.approx(0.75)
    assert harvest_share(30.0, 0.0) is None
