"""What metrics make of an engine's statistics: counters that never fall, gauges of the engine that runs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniserve.server.engine_series import EngineSeries
from server.scripted import STATS


def values(series: EngineSeries, name: str) -> dict[tuple[str, ...], float]:
    """Samples of one series by the values of its labels."""
    samples = [s for family in series.collect() for s in family.samples if s.name == f"omniserve:{name}"]
    return {tuple(s.labels.values()): s.value for s in samples}


def value(series: EngineSeries, name: str) -> float | None:
    return values(series, name).get(())


def after(*answers: tuple[int, dict[str, Any]]) -> EngineSeries:
    """Series after answers of engines, by their number, each with what differs from STATS."""
    series = EngineSeries()
    for engine, counted in answers:
        series.note(engine, STATS | counted)
    return series


def test_counters_go_on_where_the_engine_before_ended() -> None:
    series = after((0, {"walks": 10, "swap_out_bytes": 500}), (1, {"walks": 3, "swap_out_bytes": 20}))
    assert value(series, "walks_total") == 13
    assert values(series, "swap_bytes_total")[("out",)] == 520
    series.note(2, STATS | {"walks": 50})
    assert value(series, "walks_total") == 63, "also where the new engine has counted more than the old one"


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 100)), min_size=1, max_size=30))
def test_no_counter_ever_falls(story: list[tuple[bool, int]]) -> None:
    """Each answer: whether it is the first of a new engine, and by how much the engine has counted on."""
    series, engine, walks, last = EngineSeries(), 0, 0, 0.0
    total = 0
    for is_new, more in story:
        engine, walks = (engine + 1, more) if is_new else (engine, walks + more)
        total += more
        series.note(engine, STATS | {"walks": walks})
        now = value(series, "walks_total")
        assert now is not None
        assert now >= last
        last = now
    assert last == total


def test_an_answer_that_comes_too_late_changes_nothing() -> None:
    series = after((1, {"walks": 5, "oldest_lane_s": 2.0}), (0, {"walks": 900, "oldest_lane_s": 9.0}))
    assert value(series, "walks_total") == 5
    assert value(series, "oldest_lane_seconds") == 2.0
    series.note(1, STATS | {"walks": 4})
    assert value(series, "walks_total") == 5


def test_without_an_engine_there_are_counters_and_no_gauges() -> None:
    series = after((0, {}))
    series.gone()
    kinds = {family.type for family in series.collect() if family.samples}
    assert kinds == {"counter"}
    assert series.kv_usage == 0


def test_an_engine_without_a_host_says_nothing_of_one() -> None:
    series = after((0, {"host_state": "none"}))
    assert values(series, "host_up") == values(series, "host_busy_ratio") == {}


@pytest.mark.parametrize("state", ["starting", "failed"])
def test_a_host_that_does_not_serve_is_not_up(state: str) -> None:
    assert value(after((0, {"host_state": state})), "host_up") == 0


def test_the_host_is_as_busy_as_it_was_since_the_scrape_before() -> None:
    series = after((0, {"uptime_s": 10.0, "host_busy_share": 0.9}))
    assert value(series, "host_busy_ratio") == pytest.approx(0.9)
    series.note(0, STATS | {"uptime_s": 20.0, "host_busy_share": 0.55})
    assert value(series, "host_busy_ratio") == pytest.approx(0.2)
    series.note(1, STATS | {"uptime_s": 4.0, "host_busy_share": 0.5})
    assert value(series, "host_busy_ratio") == pytest.approx(0.5), "a new engine's host begins anew"


def test_errors_of_predictions_are_what_accuracy_leaves() -> None:
    found = values(after((0, {})), "prediction_error_ratio")
    assert found == pytest.approx({("decode", "busy", "mean"): 0.05, ("decode", "busy", "p90"): 0.2})
    assert values(after((0, {})), "predicted_walks") == {("decode", "busy"): 9}


def test_what_chats_paid_is_not_told_by_an_engine_that_cannot_know() -> None:
    series = after((0, {"latency_sensitive_paid_s": None, "slack_s": None}))
    assert values(series, "latency_sensitive_paid_seconds_total") == {}
    assert values(series, "slack_seconds") == {}
