"""PagePool: ids are owned once, shared by count, and free when nobody refers to them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniserve.policy.pages import PagePool


def test_pages_hold_whole_tokens() -> None:
    pool = PagePool(4, page_size=16)
    assert [pool.pages_for(n) for n in (0, 1, 16, 17, 64)] == [0, 1, 1, 2, 4]


def test_a_shared_page_is_free_when_its_last_reference_goes() -> None:
    pool = PagePool(2, page_size=4)
    (page,) = pool.allocate(1)
    pool.share([page])
    pool.release([page])
    assert pool.num_free == 1
    pool.release([page])
    assert pool.num_free == 2


def test_releasing_twice_and_overdrawing_are_our_own_mistakes() -> None:
    pool = PagePool(2, page_size=4)
    ids = pool.allocate(2)
    with pytest.raises(AssertionError, match="0 pages free"):
        pool.allocate(1)
    pool.release(ids)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(ids)


def test_the_check_notices_a_leak_and_a_double_owner() -> None:
    pool = PagePool(3, page_size=4)
    ids = pool.allocate(2)
    pool.check([ids])
    with pytest.raises(AssertionError):
        pool.check([ids[:1]])
    with pytest.raises(AssertionError):
        pool.check([ids, ids])


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=60))
def test_no_page_is_ever_owned_twice(script: list[tuple[bool, int]]) -> None:
    pool = PagePool(12, page_size=2)
    owners: list[list[int]] = []
    for takes, count in script:
        if takes and count <= pool.num_free:
            owners.append(pool.allocate(count))
        elif not takes and owners:
            pool.release(owners.pop(count % len(owners)))
        pool.check(owners)
    assert pool.num_used == sum(len(ids) for ids in owners)
