"""What the live page remembers: the ring, rates, answers of those who are slow, refusals."""

from __future__ import annotations

import asyncio

import pytest

from omniserve.server.dashboard.history import History, Rates
from omniserve.server.dashboard.latest import Latest
from omniserve.server.dashboard.watch import Pace, pace_of
from omniserve.server.refusals import MAX_KEPT, Refusal, RefusalLog


def filled(count: int, span_s: float = 100.0, max_rows: int = 50) -> History:
    """Rows at 2, 4, 6, ... seconds with a = the number of the row."""
    history = History(["a", "b"], span_s, max_rows)
    for number in range(1, count + 1):
        history.add(2.0 * number, {"a": float(number)})
    return history


def test_rows_come_back_as_columns_oldest_first() -> None:
    assert filled(2).since(0.0) == {"at_s": [2.0, 4.0], "columns": {"a": [1.0, 2.0], "b": [None, None]}}


def test_an_empty_history_has_its_columns() -> None:
    assert filled(0).since(0.0) == {"at_s": [], "columns": {"a": [], "b": []}}


def test_only_what_is_later_is_told_again() -> None:
    history = filled(5)
    assert history.since(6.0)["at_s"] == [8.0, 10.0]
    assert history.since(10.0)["at_s"] == []
    assert history.since(-1.0)["at_s"] == history.since(0.0)["at_s"]


def test_rows_older_than_the_span_are_forgotten() -> None:
    assert filled(80).since(0.0)["at_s"] == [2.0 * n for n in range(31, 81)]
    history = filled(3, span_s=5.0)
    assert history.since(0.0)["at_s"] == [2.0, 4.0, 6.0]
    history.add(9.5, {})
    assert history.since(0.0)["at_s"] == [6.0, 9.5]


def test_however_often_it_is_fed_it_keeps_so_many_rows_at_most() -> None:
    history = History(["a"], span_s=1e9, max_rows=7)
    for number in range(1000):
        history.add(number * 1e-3, {"a": 1.0})
    assert len(history.since(-1.0)["at_s"]) == 7


def test_on_a_clock_that_was_set_back_it_begins_anew() -> None:
    history = filled(5)
    history.add(4.0, {"a": 9.0})
    assert history.since(0.0) == {"at_s": [4.0], "columns": {"a": [9.0], "b": [None]}}
    history.add(6.0, {"a": 10.0})
    assert history.since(0.0)["at_s"] == [4.0, 6.0]


def test_values_have_the_digits_that_a_chart_can_show() -> None:
    history = History(["a"], 10.0, 10)
    for at_s, value in ((1.0, 0.123456789), (2.0, 123456.789), (3.0, 0.0)):
        history.add(at_s, {"a": value})
    assert history.since(0.0)["columns"]["a"] == [0.1235, 123500.0, 0.0]


def test_a_rate_is_what_a_counter_gained_between_two_looks() -> None:
    rates = Rates()
    assert rates.per_s("a", 10.0, 100.0) is None
    assert rates.per_s("b", 10.0, 1.0) is None
    assert rates.per_s("a", 12.0, 150.0) == pytest.approx(25.0)
    assert rates.per_s("a", 16.0, 150.0) == 0.0
    assert rates.per_s("b", 11.0, 4.0) == pytest.approx(3.0)


def test_a_counter_that_began_anew_has_no_rate_until_the_look_after() -> None:
    rates = Rates()
    rates.per_s("a", 10.0, 100.0)
    assert rates.per_s("a", 12.0, 3.0) is None
    assert rates.per_s("a", 14.0, 7.0) == pytest.approx(2.0)
    assert rates.per_s("a", 1.0, 9.0) is None, "its own clock began anew, as an engine's uptime does"


def test_tokens_of_either_class_and_the_hosts_work_are_of_late_not_since_the_start() -> None:
    def stats(uptime_s: float, device: int, best_effort: int, in_lanes: int, busy: float) -> dict[str, float]:
        counted = {"device_tokens": device, "harvested_device_tokens": best_effort}
        return counted | {"harvested_lane_tokens": in_lanes, "host_busy_share": busy, "uptime_s": uptime_s}

    rates = Rates()
    assert pace_of(stats(2.0, 20, 4, 6, 0.25), rates) == Pace()
    assert pace_of(stats(4.0, 50, 14, 36, 0.5), rates) == Pace(10.0, 20.0, 0.75)
    assert pace_of(stats(1.0, 0, 0, 0, 0.0), rates) == Pace(), "another engine"


def test_who_is_silent_is_asked_once_and_shown_as_before() -> None:
    async def story() -> None:
        answers: asyncio.Queue[int] = asyncio.Queue()
        asked = 0

        async def ask() -> int:
            nonlocal asked
            asked += 1
            return await answers.get()

        latest = Latest(ask, (ValueError,))
        answers.put_nowait(1)
        await latest.refresh(60.0)
        assert (latest.value, latest.is_open, asked) == (1, False, 1)
        for _ in range(3):
            await latest.refresh(0.0)
        assert (latest.value, latest.is_open, asked) == (1, True, 2)
        answers.put_nowait(2)
        await latest.refresh(60.0)
        assert (latest.value, latest.is_open, asked) == (2, False, 2)

    asyncio.run(story())


def test_a_failure_that_is_foreseen_is_told_and_forgotten_with_the_next_answer() -> None:
    async def story() -> None:
        trouble: list[Exception] = [ValueError("the disk is full")]

        async def ask() -> int:
            if trouble:
                raise trouble.pop()
            return 3

        latest = Latest(ask, (ValueError,))
        await latest.refresh(60.0)
        assert (latest.value, latest.trouble) == (None, "the disk is full")
        await latest.refresh(60.0)
        assert (latest.value, latest.trouble) == (3, None)
        trouble.append(KeyError("x"))
        with pytest.raises(KeyError):
            await latest.refresh(60.0)
        await latest.refresh(60.0)
        assert latest.value == 3

    asyncio.run(story())


def refusal(number: int, code: str = "slo_unattainable") -> Refusal:
    return Refusal(float(number), f"req_{number}", "latency_sensitive", code, "too late", 2.0, 1.0)


def test_the_newest_refusals_are_kept_and_all_are_counted() -> None:
    log = RefusalLog()
    for number in range(MAX_KEPT + 5):
        log.note(refusal(number))
    log.note(refusal(99, "resource_unavailable"))
    told = log.as_plain()
    assert [one["at_s"] for one in told["last"]][:2] == [99.0, MAX_KEPT + 4]
    assert len(told["last"]) == MAX_KEPT
    assert [(one["code"], one["count"]) for one in told["counts"]] == [
        ("slo_unattainable", MAX_KEPT + 5),
        ("resource_unavailable", 1),
    ]
