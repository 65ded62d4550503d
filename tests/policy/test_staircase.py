"""Staircases: what lies between points, and points that find every step."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniserve.policy.staircase import Staircase, find_steps, never_falling

numbers = st.lists(st.floats(0.001, 100), min_size=1, max_size=30)


def test_points_are_joined_by_lines_and_the_last_line_goes_on() -> None:
    stairs = Staircase((1, 10, 20), (3.0, 3.0, 5.0))
    assert [stairs.at(n) for n in (0, 0.5, 1, 5, 15, 20, 30)] == [0, 1.5, 3, 3, 4, 5, 7]


@given(numbers)
def test_what_never_falls_keeps_its_mean_and_never_falls(values: list[float]) -> None:
    found = never_falling(values)
    assert all(a <= b for a, b in pairwise(found))
    assert sum(found) == pytest.approx(sum(values))
    assert never_falling(found) == pytest.approx(found)


@pytest.mark.parametrize("tile", [8, 16, 32, 128])
def test_every_step_of_a_staircase_is_found(tile: int) -> None:
    """A product in tiles: equal within a tile, a jump at its end. The paper's own midpoints miss none either,
    but measure as many."""

    def seconds(n: int) -> float:
        return 1.0 + 0.5 * ((n - 1) // tile) + 0.001 * n

    points = find_steps(seconds, 4 * tile, tolerance=0.02)
    stairs = Staircase(tuple(points), tuple(points.values()))
    missed = [n for n in range(1, 4 * tile + 1) if abs(stairs.at(n) / seconds(n) - 1) > 0.02]
    assert missed == []
    assert tile <= 8 or len(points) < 2 * tile


def test_a_line_takes_few_points() -> None:
    points = find_steps(lambda n: 1.0 + 0.1 * n, 512, tolerance=0.02)
    stairs = Staircase(tuple(points), tuple(points.values()))
    assert len(points) < 24
    assert all(stairs.at(n) == pytest.approx(1.0 + 0.1 * n) for n in range(1, 513))


def test_the_search_stops_when_its_time_is_up_with_both_ends_measured() -> None:
    points = find_steps(lambda n: float(n), 1000, tolerance=0.001, may_go_on=lambda found: found < 5)
    assert len(points) == 5
    assert {1, 1000} <= points.keys()


def test_a_walk_of_one_row_has_one_point() -> None:
    assert find_steps(lambda n: 2.0, 1, tolerance=0.02) == {1: 2.0}
