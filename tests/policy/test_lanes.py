"""Which pass runs next, and caps that carry over. (The entry rule is tested beside the native one.)"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from omniserve.policy.division import split_rows
from omniserve.policy.lanes import carried_cap, next_pass
from omniserve.policy.latency import WalkLoad


def test_the_fullest_pass_runs_next_and_the_oldest_on_a_tie() -> None:
    assert next_pass([0, 2, 3, 0], [9, 1, 5, 9]) == 2
    assert next_pass([2, 0, 2, 2], [7, 0, 4, 6]) == 2
    assert next_pass([0, 0], [0, 0]) is None


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 50)), max_size=12))
def test_the_next_pass_has_rows_and_none_has_more(layers: list[tuple[int, int]]) -> None:
    counts, ages = [c for c, _ in layers], [a for _, a in layers]
    layer = next_pass(counts, ages)
    if layer is None:
        assert not any(counts)
    else:
        assert counts[layer] == max(counts) > 0


def test_what_a_layer_leaves_carries_over_within_the_row_buffers() -> None:
    assert carried_cap(4, 0, max_rows=16) == 4
    assert carried_cap(4, 3, max_rows=16) == 7
    assert carried_cap(4, 30, max_rows=16) == 16


def test_walk_load_follows_the_papers_sums() -> None:
    load = WalkLoad()
    load.add_decode(context=10)
    load.add_chunk(start=4, num_tokens=3)
    assert (load.num_tokens, load.num_decodes, load.decode_context) == (4, 1, 10)
    assert load.prefill_load == 5 + 6 + 7


@given(
    total=st.integers(0, 60),
    places=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 8)), min_size=1, max_size=6),
)
def test_rows_are_split_to_the_last_one(total: int, places: list[tuple[int, int]]) -> None:
    """All rows are given away or every place is full; who asks for more than another gets no less."""
    demands, most = zip(*places, strict=True)
    shares = split_rows(total, demands, most)
    assert sum(shares) == min(total, sum(most))
    assert all(share <= limit for share, limit in zip(shares, most, strict=True))


def test_short_rows_are_split_in_proportion_and_spare_ones_evenly() -> None:
    assert split_rows(6, (2, 10), (8, 8)) == [1, 5]
    assert split_rows(10, (2, 4), (8, 8)) == [4, 6]
