"""Turns between owners of batches: equal in tokens while they wait, nothing saved up while they do not."""

from __future__ import annotations

import random
from collections import Counter, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniserve.batch.fair_share import FairShare, cost_of
from omniserve.batch.records import Usage


def serve(share: FairShare, owners: list[str], cost: float, turns: int) -> Counter[str]:
    """Lines that each got, one at a time, each with this cost."""
    got: Counter[str] = Counter()
    for _ in range(turns):
        share.set_waiting(owners)
        owner = min(owners, key=share.had)
        got[owner] += 1
        share.end(owner, share.begin(owner), cost)
    return got


@given(
    usual=st.fixed_dictionaries(
        {"a": st.integers(1, 100), "b": st.integers(1, 100), "c": st.integers(1, 100)}
    ),
    places=st.integers(1, 8),
    seed=st.integers(0, 10_000),
)
def test_owners_who_wait_get_the_same_tokens_within_what_is_in_flight(
    usual: dict[str, int], places: int, seed: int
) -> None:
    rng, share = random.Random(seed), FairShare()
    share.set_waiting(usual)
    flight: deque[tuple[str, float]] = deque()
    had = dict.fromkeys(usual, 0.0)
    for _ in range(300):
        while len(flight) < places:
            owner = min(usual, key=share.had)
            flight.append((owner, share.begin(owner)))
        flight.rotate(rng.randrange(places))
        owner, expected = flight.popleft()
        cost = usual[owner] * rng.uniform(0.5, 2.0)
        share.end(owner, expected, cost)
        had[owner] += cost
        # What a line is taken for at its start may be off by as much as it costs, in either direction.
        assert max(had.values()) - min(had.values()) <= 2 * (places + 1) * 2 * max(usual.values())


def test_one_who_comes_late_is_not_owed_the_time_before() -> None:
    share = FairShare()
    serve(share, ["anna"], 10.0, 50)
    got = serve(share, ["anna", "ben"], 10.0, 20)
    assert got["ben"] in (10, 11)


def test_one_who_had_much_long_ago_is_not_behind_for_it() -> None:
    share = FairShare()
    serve(share, ["anna"], 10.0, 50)
    serve(share, ["ben"], 10.0, 5)
    got = serve(share, ["anna", "ben"], 10.0, 20)
    assert abs(got["anna"] - got["ben"]) <= 2


@pytest.mark.parametrize("cost", [None, 0.0], ids=["turned_away", "failed"])
def test_a_line_that_took_nothing_counts_nothing(cost: float | None) -> None:
    share = FairShare()
    share.set_waiting(["anna"])
    expected = share.begin("anna")
    assert share.had("anna") == expected > 0
    share.end("anna", expected, cost)
    assert share.had("anna") == 0


def test_a_token_written_costs_two_and_one_that_was_cached_nothing() -> None:
    assert cost_of(Usage(input_tokens=10, cached_tokens=4, output_tokens=3)) == 12
