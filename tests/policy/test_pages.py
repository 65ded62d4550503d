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


def free_by_partition(pool: PagePool, owners: list[list[int]]) -> list[int]:
    used = {page for ids in owners for page in ids}
    counts = [0] * pool.num_partitions
    for page in range(pool.num_pages):
        counts[pool.partition_of(page)] += page not in used
    return counts


def test_a_new_holder_gets_the_partition_with_most_free_pages_and_grows_there() -> None:
    pool = PagePool(12, page_size=4, num_partitions=3)
    first, second = pool.allocate(2), pool.allocate(1)
    assert (first, second) == ([0, 1], [4])
    assert pool.allocate(2, near=pool.partition_of(second[0])) == [5, 6]
    assert pool.allocate(1) == [8]


def test_a_full_partition_spills_over_to_the_one_with_most_left() -> None:
    pool = PagePool(12, page_size=4, num_partitions=3)
    pool.allocate(1, near=1)
    assert pool.allocate(6, near=0) == [0, 1, 2, 3, 8, 9]
    assert pool.allocate(5, near=0) == [5, 6, 7, 10, 11]


@pytest.mark.parametrize("count", [0, 4])
def test_partitions_hold_a_page_each(count: int) -> None:
    with pytest.raises(ValueError, match="partitions"):
        PagePool(3, page_size=4, num_partitions=count)
    assert PagePool(0, page_size=4).num_free == 0


@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.none() | st.integers(0, 11)), max_size=60),
)
def test_no_page_is_ever_owned_twice(partitions: int, script: list[tuple[bool, int, int | None]]) -> None:
    pool = PagePool(12, page_size=2, num_partitions=partitions)
    owners: list[list[int]] = []
    for takes, count, wish in script:
        if takes and count <= pool.num_free:
            near = None if wish is None else wish % partitions
            free = free_by_partition(pool, owners)
            owners.append(pool.allocate(count, near))
            home = free.index(max(free)) if near is None or not free[near] else near
            at_home = sum(pool.partition_of(page) == home for page in owners[-1])
            assert at_home == min(count, free[home]), "together while there is room"
        elif not takes and owners:
            pool.release(owners.pop(count % len(owners)))
        pool.check(owners)
    assert pool.num_used == sum(len(ids) for ids in owners)


# ---------------------------------------------------------------- pages known by a hash


def hash_of(number: int) -> bytes:
    return bytes([number])


def known(pool: PagePool, numbers: list[int]) -> list[int]:
    """Pages just allocated, registered and released."""
    ids = pool.allocate(len(numbers))
    assert [pool.register(page, hash_of(n)) for page, n in zip(ids, numbers, strict=True)] == ids
    pool.release(ids)
    return ids


def test_a_released_page_is_free_and_still_found_by_its_hash() -> None:
    pool = PagePool(4, page_size=4)
    ids = known(pool, [1, 2])
    assert (pool.num_free, pool.num_cached) == (4, 2)
    assert pool.match([hash_of(1), hash_of(2), hash_of(3)]) == ids
    assert pool.match([hash_of(3), hash_of(1)]) == [], "a run ends at the first unknown page"
    pool.share(ids)
    assert (pool.num_free, pool.num_cached) == (2, 0)
    pool.check([ids])


def test_pages_without_content_go_first_then_the_least_recently_used_its_end_before_its_beginning() -> None:
    pool = PagePool(5, page_size=4)
    first, second = known(pool, [1, 2]), known(pool, [3, 4])
    pool.share(first)
    pool.release(first)
    assert pool.allocate(4)[1:] == [second[1], second[0], first[1]]
    assert pool.match([hash_of(1)]) == [first[0]]
    assert pool.num_evicted == 3


def test_a_referenced_page_is_never_evicted() -> None:
    pool = PagePool(3, page_size=4)
    ids = known(pool, [1, 2])
    pool.share(ids[:1])
    pool.allocate(2)
    assert pool.match([hash_of(1), hash_of(2)]) == ids[:1]
    with pytest.raises(AssertionError, match="0 pages free"):
        pool.allocate(1)


def test_a_second_page_of_the_same_content_stays_unknown() -> None:
    pool = PagePool(3, page_size=4)
    (one,) = known(pool, [1])
    (other,) = pool.allocate(1)
    assert pool.register(other, hash_of(1)) == one
    pool.release([other])
    assert (pool.num_free, pool.num_cached) == (3, 1)


def test_protected_pages_are_kept_down_to_the_number_asked_for() -> None:
    pool = PagePool(6, page_size=4)
    chat = pool.allocate(4)
    for page, number in zip(chat, range(4), strict=True):
        pool.register(page, hash_of(number))
    pool.release(chat, protect=True)
    pool.share(chat)
    pool.release(chat)
    assert pool.num_protected == 4, "protected until evicted"
    assert len(pool.allocate(3, keep=3)) == 3
    with pytest.raises(AssertionError, match="0 pages free"):
        pool.allocate(1, keep=3)
    assert len(pool.allocate(3)) == 3


def test_the_check_notices_a_wrong_hash() -> None:
    pool = PagePool(3, page_size=4)
    known(pool, [1])
    pool._page_of[hash_of(2)] = 2
    with pytest.raises(AssertionError, match="not its own"):
        pool.check([])


@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.booleans()), max_size=80),
)
def test_whatever_is_found_is_what_was_registered(
    partitions: int, script: list[tuple[int, int, bool]]
) -> None:
    """A model of contents: who allocates a page overwrites it; a page found holds what its hash says."""
    pool = PagePool(9, page_size=2, num_partitions=partitions)
    content: dict[int, int] = {}
    owners: list[list[int]] = []
    for action, number, protect in script:
        chain = [hash_of(10 * number + i) for i in range(3)]
        if action == 0 and pool.num_free - min(2, pool.num_protected) >= 3:
            ids = pool.allocate(3, keep=2)
            content |= {page: 10 * number + i for i, page in enumerate(ids)}
            owners.append(
                [pool.register(page, page_hash) for page, page_hash in zip(ids, chain, strict=True)]
            )
            pool.share(owners[-1])
            pool.release(ids)
        elif action == 1:
            owners.append(pool.match(chain))
            pool.share(owners[-1])
            assert [content[page] for page in owners[-1]] == [10 * number + i for i in range(len(owners[-1]))]
        elif owners:
            pool.release(owners.pop(number % len(owners)), protect)
        pool.check(owners)
