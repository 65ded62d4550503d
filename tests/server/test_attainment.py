"""Live attainment: what counts, as what, and for how long. No clock: times are made up."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniserve.server.attainment import MAX_SAMPLES, Ended, LiveAttainment, Outcome, missed
from omniserve.types import BEST_EFFORT, SLO, ServiceClass

TARGETS = SLO(ttft_s=1.0, tpot_s=0.1)
CHAT = ServiceClass("chat", rank=0, best_effort=False, slo=TARGETS)
CLASSES = (CHAT, BEST_EFFORT)
WINDOW_S = 300.0


def finished(ttft_s: float = 0.5, tpot_s: float | None = 0.05) -> Ended:
    return Ended("chat", "finished", TARGETS, ttft_s, tpot_s)


def live() -> LiveAttainment:
    return LiveAttainment(CLASSES, started_s=0.0, window_s=WINDOW_S)


@pytest.mark.parametrize(
    ("ended", "what"),
    [
        (finished(1.0, 0.1), None),
        (finished(1.01, 0.05), "ttft"),
        (finished(0.5, 0.11), "tpot"),
        (finished(2.0, 2.0), "ttft"),
        (finished(0.5, None), None),
        (Ended("chat", "refused", TARGETS), "refused"),
        (Ended("chat", "failed", TARGETS, 0.5, 0.05), "failed"),
        (Ended("chat", "finished", TARGETS), "ttft"),
    ],
)
def test_a_request_attains_when_it_finishes_within_both_targets(ended: Ended, what: str | None) -> None:
    assert missed(ended, TARGETS) == what


def test_a_request_is_judged_by_its_own_targets() -> None:
    window = live()
    assert window.note(Ended("chat", "finished", SLO(5.0, 0.1), 4.0, 0.05), 1.0) is None
    assert window.note(Ended("chat", "finished", SLO(0.2, 0.1), 0.5, 0.05), 2.0) == "ttft"
    assert window.snapshot(2.0)["chat"].attainment == 0.5


def test_refused_and_failed_requests_are_offered_ones() -> None:
    window = live()
    for ended in (finished(), Ended("chat", "refused", TARGETS), Ended("chat", "failed", TARGETS)):
        window.note(ended, 10.0)
    chat = window.snapshot(10.0)["chat"]
    assert (chat.num_offered, chat.attainment, chat.goodput_per_s) == (3, 1 / 3, 0.1)


def test_no_attainment_is_invented_where_nothing_was_offered_or_promised() -> None:
    window = live()
    window.note(Ended("best_effort", "finished", None, 3.0, 0.2), 1.0)
    found = window.snapshot(1.0)
    assert (found["chat"].attainment, found["chat"].goodput_per_s) == (None, 0.0)
    jobs = found["best_effort"]
    assert (jobs.attainment, jobs.goodput_per_s, jobs.num_offered) == (None, None, 0)
    assert (jobs.ttft_p50_s, jobs.tpot_p99_s) == (3.0, 0.2)


def test_a_server_that_just_started_has_no_rate_yet() -> None:
    chat = live().snapshot(0.0)["chat"]
    assert (chat.goodput_per_s, chat.ttft_p50_s, chat.tpot_p99_s) == (0.0, None, None)


def test_percentiles_are_of_requests_that_finished() -> None:
    window = live()
    for n in range(1, 101):
        window.note(finished(ttft_s=n, tpot_s=n / 100), 1.0)
    window.note(Ended("chat", "failed", TARGETS, 900.0, 900.0), 1.0)
    chat = window.snapshot(1.0)["chat"]
    assert (chat.ttft_p50_s, chat.ttft_p99_s, chat.tpot_p50_s, chat.tpot_p99_s) == (50, 99, 0.5, 0.99)


def test_a_request_leaves_the_window_after_its_length() -> None:
    window = live()
    window.note(finished(ttft_s=9.0), 1.0)
    window.note(finished(), 100.0)
    assert window.snapshot(300.9)["chat"].attainment == 0.5
    late = window.snapshot(301.0)["chat"]
    assert (late.attainment, late.num_offered, late.ttft_p99_s) == (1.0, 1, 0.5)
    gone = window.snapshot(400.0)["chat"]
    assert (gone.attainment, gone.goodput_per_s, gone.ttft_p50_s) == (None, 0.0, None)


def test_any_number_of_requests_counts_and_percentiles_are_of_the_newest() -> None:
    window = live()
    for _ in range(MAX_SAMPLES):
        window.note(finished(ttft_s=7.0), 1.0)
    for _ in range(MAX_SAMPLES):
        window.note(finished(ttft_s=0.5), 2.0)
    chat = window.snapshot(2.0)["chat"]
    assert (chat.num_offered, chat.attainment, chat.ttft_p99_s) == (2 * MAX_SAMPLES, 0.5, 0.5)


def test_a_client_that_leaves_in_time_says_nothing_and_one_that_leaves_late_was_missed() -> None:
    window = live()
    assert window.note(Ended("chat", "left", TARGETS, TARGETS.ttft_s), 1.0) is None
    assert window.snapshot(1.0)["chat"].num_offered == 0
    assert window.note(Ended("chat", "left", TARGETS, TARGETS.ttft_s + 0.1), 1.0) == "ttft"
    assert window.note(Ended("chat", "left", TARGETS, 0.1, TARGETS.tpot_s + 0.1), 1.0) == "tpot"
    chat = window.snapshot(1.0)["chat"]
    assert (chat.num_offered, chat.attainment, chat.ttft_p50_s) == (2, 0.0, None)


OUTCOMES: tuple[Outcome, ...] = ("finished", "refused", "failed")
ENDED = st.builds(
    Ended,
    st.just("chat"),
    st.sampled_from(OUTCOMES),
    st.just(TARGETS),
    st.none() | st.floats(0, 3),
    st.none() | st.floats(0, 0.3),
)


@given(st.lists(st.tuples(st.floats(0, 200), ENDED), max_size=40), st.floats(0, 900))
def test_a_snapshot_is_what_a_count_over_the_window_gives(
    story: list[tuple[float, Ended]], later_s: float
) -> None:
    window, now_s, log = live(), 0.0, []
    for gap_s, ended in story:
        now_s += gap_s
        assert window.note(ended, now_s) == missed(ended, TARGETS)
        log.append((now_s, ended))
    now_s += later_s
    inside = [ended for at_s, ended in log if at_s > now_s - WINDOW_S]
    met = sum(missed(ended, TARGETS) is None for ended in inside)
    chat = window.snapshot(now_s)["chat"]
    assert chat.num_offered == len(inside)
    assert chat.attainment == (met / len(inside) if inside else None)
    if now_s > 0:
        assert chat.goodput_per_s == pytest.approx(met / min(WINDOW_S, now_s))
    ordered = [p for p in (0.0, chat.ttft_p50_s, chat.ttft_p99_s) if p is not None]
    assert all(low <= high for low, high in pairwise(ordered))
