"""The prefix cache as stories: who finds whose pages, who evicts them, when a page is not there yet."""

from __future__ import annotations

import pytest

from omniserve.policy.plan import CopyIn, CopyOut, Drop, Plan, Reserve, ShareHost, SwapIn
from omniserve.policy.request import Phase
from omniserve.policy.scheduler import schedule
from policy.scripted import World, make_limits

# Limits of these stories: pages of 4 tokens on either side.
SYSTEM = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]


def finish(world: World, *requests: int) -> None:
    while not set(requests) <= set(world.finished):
        world.step()


def chunks_of(world: World) -> list[tuple[int, int, int]]:
    plan = schedule(world.state, 0.0, world.cost)
    return [(c.request_id, c.start, c.num_tokens) for c in plan.chunks]


def test_a_prefill_starts_after_the_full_pages_that_are_cached() -> None:
    world = World(make_limits(), chunk_tokens=32)
    finish(world, world.add([*SYSTEM, 20, 21], 2, best_effort=False))
    second = world.add([*SYSTEM, 30, 31, 32, 33, 34], 2, best_effort=True)
    assert chunks_of(world) == [(second, 12, 5)]
    world.run()
    assert world.state.best_effort_hits.hit_tokens == 12
    assert world.state.best_effort_hits.queried_tokens == 17


def test_without_hashes_nothing_is_cached() -> None:
    world = World(make_limits(), chunk_tokens=32, caches_prefixes=False)
    finish(world, world.add(SYSTEM, 2, best_effort=False))
    again = world.add(SYSTEM, 2, best_effort=False)
    assert chunks_of(world) == [(again, 0, 12)]
    assert world.state.device.num_cached == 0


def test_a_prompt_that_is_cached_as_a_whole_still_computes_its_last_token() -> None:
    world = World(make_limits(), chunk_tokens=32)
    finish(world, world.add([*SYSTEM, 20], 5, best_effort=False))
    same = world.add([*SYSTEM, 20], 1, best_effort=False)
    assert chunks_of(world) == [(same, 12, 1)]
    finish(world, same)
    full_pages = world.add(SYSTEM, 1, best_effort=False)
    assert chunks_of(world) == [(full_pages, 8, 4)]


def test_a_chat_finds_its_own_answers_too() -> None:
    world = World(make_limits(), chunk_tokens=32)
    first = world.add([1, 2, 3], 10, best_effort=False)
    finish(world, first)
    second = world.add([*world.texts[first], 50, 51], 2, best_effort=False)
    # The last token of an answer has no KV: 12 of 13 tokens do, three pages.
    assert chunks_of(world) == [(second, 12, 3)]


def test_tenants_of_different_salts_share_nothing() -> None:
    world = World(make_limits(num_device_pages=40), chunk_tokens=32)
    finish(world, *(world.add(SYSTEM, 2, False, salt) for salt in (None, "a")))
    asked = [world.add([*SYSTEM, 9], 2, False, salt) for salt in ("b", "a", None)]
    starts = {request: start for request, start, _ in chunks_of(world)}
    assert [starts.get(request) for request in asked] == [0, 12, 12]


def test_pages_of_a_chunk_that_is_not_computed_yet_are_not_found() -> None:
    world = World(make_limits(), chunk_tokens=4)
    world.add(SYSTEM, 2, best_effort=False)
    world.state.commit(schedule(world.state, 0.0, world.cost), 0.0)
    known = world.state.device.match(world.state.requests[0].device_hashes)
    assert known == []
    world.state.check()


def test_two_that_computed_the_same_at_the_same_time_go_on_with_one_page() -> None:
    world = World(make_limits(num_device_pages=20), chunk_tokens=64)
    first, second = (world.add([*SYSTEM, tail], 4, best_effort=False) for tail in (20, 30))
    world.step()
    pages = [world.state.active[i].device_pages for i in (first, second)]
    assert pages[0][:3] == pages[1][:3]
    assert pages[0][3] != pages[1][3]
    assert world.state.device.num_used == 5
    world.run()


def test_cached_pages_count_as_free_for_whoever_comes_next() -> None:
    world = World(make_limits(num_device_pages=8, host_offload="never", num_host_pages=0), chunk_tokens=64)
    finish(world, world.add(28, 4, best_effort=False))
    assert world.state.device.num_cached == 7
    assert world.state.device.num_free == 8
    finish(world, world.add(28, 4, best_effort=False))
    assert world.state.num_dropped == 0
    assert world.state.device.num_evicted == 7


def test_the_end_of_a_text_is_evicted_before_its_beginning() -> None:
    world = World(make_limits(num_device_pages=8, host_offload="never", num_host_pages=0), chunk_tokens=64)
    text = list(range(16))
    finish(world, world.add(text, 1, best_effort=False))
    finish(world, world.add(20, 2, best_effort=False))
    again = world.add([*text, 5], 1, best_effort=False)
    assert chunks_of(world) == [(again, 8, 9)], "two pages had to go: the last two"


@pytest.mark.parametrize(("reserve", "survives"), [(4, True), (0, False)])
def test_a_batch_job_cannot_evict_the_prefixes_of_the_chat(reserve: int, survives: bool) -> None:
    limits = make_limits(
        num_device_pages=16, prefix_reserve_pages=reserve, host_offload="never", num_host_pages=0
    )
    world = World(limits, chunk_tokens=64)
    finish(world, world.add([*SYSTEM, 1, 2, 3, 4], 2, best_effort=False))
    for _ in range(6):
        finish(world, *(world.add(18, 12, best_effort=True) for _ in range(2)))
    assert world.state.device.num_evicted > 10
    chat = world.add([*SYSTEM, 1, 2, 3, 4, 5], 2, best_effort=False)
    assert chunks_of(world) == [(chat, 16, 1) if survives else (chat, 0, 17)]


def test_beyond_the_reserve_batch_work_evicts_the_oldest_prefixes_of_the_chat() -> None:
    limits = make_limits(num_device_pages=13, prefix_reserve_pages=3, host_offload="never", num_host_pages=0)
    world = World(limits, chunk_tokens=64)
    texts = [[i] * 12 for i in range(4)]
    for text in texts:
        finish(world, world.add(text, 1, best_effort=False))
    assert world.state.device.num_protected == 12
    finish(world, world.add(32, 8, best_effort=True))
    found = [
        len(world.state.device.match(world.state.requests[world.add(t, 1, False)].device_hashes))
        for t in texts
    ]
    assert found == [0, 0, 0, 3]


def test_a_batch_job_that_shares_a_prefix_of_the_chat_does_not_take_its_protection() -> None:
    world = World(make_limits(num_device_pages=16, prefix_reserve_pages=4), chunk_tokens=64)
    finish(world, world.add(SYSTEM, 1, best_effort=False))
    finish(world, world.add([*SYSTEM, 1], 2, best_effort=True))
    assert world.state.device.num_protected == 3


def test_the_chat_may_evict_anything() -> None:
    limits = make_limits(num_device_pages=8, prefix_reserve_pages=8, host_offload="never", num_host_pages=0)
    world = World(limits, chunk_tokens=64)
    finish(world, world.add(24, 4, best_effort=False))
    finish(world, world.add(28, 4, best_effort=False))
    assert world.produced == {0: 4, 1: 4}


def test_a_batch_job_that_needs_the_whole_device_is_served_beside_any_reserve() -> None:
    limits = make_limits(num_device_pages=8, prefix_reserve_pages=8, host_offload="never", num_host_pages=0)
    world = World(limits, chunk_tokens=64)
    finish(world, world.add(28, 4, best_effort=False))
    finish(world, world.add(20, 12, best_effort=True))
    assert world.produced == {0: 4, 1: 12}


def test_a_dropped_request_finds_its_own_pages() -> None:
    world = World(make_limits(host_offload="never", num_host_pages=0), chunk_tokens=64)
    request = world.add([*SYSTEM, 1], 8, best_effort=True)
    for _ in range(5):
        world.step()
    num_tokens = world.state.requests[request].num_tokens
    world.state.commit(Plan("passes", moves=(Drop(request),)), 0.0)
    assert num_tokens == 18
    assert chunks_of(world) == [(request, 16, 2)]
    world.run()
    assert world.produced == {request: 8}
    assert world.state.requests == {}


def test_pages_of_an_aborted_request_stay_as_far_as_they_were_computed() -> None:
    world = World(make_limits(), chunk_tokens=6)
    first = world.add(SYSTEM, 4, best_effort=False)
    world.step()
    world.abort(first)
    second = world.add(SYSTEM, 4, best_effort=False)
    assert chunks_of(world) == [(second, 4, 6)]


def test_a_page_that_a_plan_refers_to_is_not_evicted_by_the_same_plan() -> None:
    """The chat comes first and needs pages; the batch request behind it finds the oldest ones cached."""
    world = World(make_limits(num_device_pages=9, host_offload="never", num_host_pages=0), chunk_tokens=64)
    finish(world, world.add([*SYSTEM, 1], 1, best_effort=True))
    finish(world, world.add(19, 1, best_effort=True))
    world.add(14, 1, best_effort=False)
    batch = world.add([*SYSTEM, 2], 1, best_effort=True)
    plan = schedule(world.state, 0.0, world.cost)
    assert [len(m.cached) for m in plan.moves if isinstance(m, Reserve) and m.request_id == batch] == [3]
    world.run()
    assert world.state.best_effort_hits.hit_tokens == 12


def test_a_page_that_the_plan_has_counted_as_free_is_not_found_later_in_it() -> None:
    """The first chat takes all that is free, cached pages too; the second one, for which a batch request is
    dropped, would find those.
    """
    world = World(make_limits(num_device_pages=8, host_offload="never", num_host_pages=0), chunk_tokens=64)
    finish(world, world.add(SYSTEM[:8], 1, best_effort=False))
    batch = world.add(12, 4, best_effort=True)
    world.step()
    assert (world.state.device.num_free, world.state.device.num_cached) == (4, 2)
    first = world.add(15, 1, best_effort=False)
    second = world.add([*SYSTEM[:8], 50, 51, 52], 1, best_effort=False)
    assert chunks_of(world) == [(first, 0, 15), (second, 0, 11)]
    world.run()
    assert world.produced[batch] == 4


def test_a_prefix_stays_when_its_holder_makes_room_for_whom_it_serves() -> None:
    """A chat whose prefix a batch request holds pushes that one out, and keeps the prefix."""
    world = World(make_limits(num_device_pages=8, host_offload="never", num_host_pages=0), chunk_tokens=64)
    batch = world.add([*SYSTEM, *range(60, 72)], 8, best_effort=True)
    world.step()
    chat = world.add([*SYSTEM, 1, 2, 3, 4, 5], 2, best_effort=False)
    plan = schedule(world.state, 0.0, world.cost)
    assert Drop(batch) in plan.moves
    assert [(c.request_id, c.start) for c in plan.chunks] == [(chat, 12)]
    world.run()
    assert world.produced == {batch: 8, chat: 2}


# ---------------------------------------------------------------- the host


def always(**changes: object) -> World:
    values: dict[str, object] = {"host_offload": "always", "num_host_pages": 32, "num_device_pages": 32}
    return World(make_limits(**(values | changes)), chunk_tokens=64)


def until_lane(world: World, request: int) -> None:
    while world.phases()[request] is not Phase.LANE:
        world.step()


@pytest.mark.parametrize("is_lossy", [False, True])
def test_pages_that_the_host_has_already_are_referenced_not_copied(is_lossy: bool) -> None:
    world = always(host_kv_is_lossy=is_lossy)
    first = world.add([*SYSTEM, 1, 2], 20, best_effort=True)
    until_lane(world, first)
    second = world.add([*SYSTEM, 3, 4], 20, best_effort=True)
    moves = []
    while world.phases()[second] is not Phase.LANE:
        moves += schedule(world.state, 0.0, world.cost).moves
        world.step()
    shared = world.state.active[first].hold.pages[:3]
    assert ShareHost(second, tuple(shared)) in moves
    assert [(m.start, m.num_tokens) for m in moves if isinstance(m, CopyOut)] == [(12, 2)]
    assert world.state.active[second].hold.pages[:3] == shared
    assert world.state.host_hits.hit_tokens == 12
    world.run()


def test_pages_of_lanes_that_have_ended_stay_on_the_host() -> None:
    world = always()
    first = world.add([*SYSTEM, 1, 2, 3, 4], 9, best_effort=True)
    finish(world, first)
    answer = world.texts[first]
    second = world.add([*answer, 5], 4, best_effort=True)
    until_lane(world, second)
    assert world.state.host_hits.hit_tokens == 24, "what the lane wrote itself is found too"
    world.run()


def test_a_host_page_is_not_found_before_its_copy_has_landed() -> None:
    world = always()
    first = world.add([*SYSTEM, 1], 8, best_effort=True)
    second = world.add([*SYSTEM, 2], 8, best_effort=True)
    for _ in range(6):
        world.step(lambda kind, key: False)
        assert world.state.host.match(world.state.requests[first].host_hashes) == []
    assert world.copies
    world.run()
    assert world.produced == {first: 8, second: 8}


def test_lanes_whose_copies_landed_side_by_side_end_up_with_the_same_pages() -> None:
    world = always(max_copies_per_step=8, num_frames=8)
    lanes = [world.add([*SYSTEM, tail], 8, best_effort=True) for tail in (1, 2)]
    for lane in lanes:
        until_lane(world, lane)
    pages = [world.state.active[lane].hold.pages for lane in lanes]
    assert pages[0][:3] == pages[1][:3]
    assert not set(pages[0][3:]) & set(pages[1][3:])
    world.run()


def test_a_page_of_another_partition_is_referenced_where_it_is() -> None:
    world = always(num_host_partitions=2)
    first = world.add([*SYSTEM, 1], 20, best_effort=True)
    until_lane(world, first)
    other = world.add(20, 20, best_effort=True)
    until_lane(world, other)
    home = {world.state.host.partition_of(p) for p in world.state.active[first].hold.pages}
    assert home != {world.state.host.partition_of(p) for p in world.state.active[other].hold.pages}
    follower = world.add([*SYSTEM, 2], 20, best_effort=True)
    until_lane(world, follower)
    assert {world.state.host.partition_of(p) for p in world.state.active[follower].hold.pages} == home
    world.run()


def test_host_pages_end_anywhere_in_a_device_page_and_no_shared_page_is_written() -> None:
    """Host pages of 3 tokens, device pages of 4: what is copied begins inside a device page."""
    world = always(host_page_size=3, num_host_pages=40)
    until_lane(world, world.add([*SYSTEM, 1, 2], 20, best_effort=True))
    second = world.add([*SYSTEM[:10], 3, 4, 5], 20, best_effort=True)
    copies = []
    while world.phases()[second] is not Phase.LANE:
        copies += [m for m in schedule(world.state, 0.0, world.cost).moves if isinstance(m, CopyOut)]
        world.step()
    assert [(m.start, m.num_tokens) for m in copies] == [(9, 3), (12, 1)]
    world.run()


def test_a_lost_host_takes_its_cache_along() -> None:
    world = always()
    lane = world.add([*SYSTEM, 1], 12, best_effort=True)
    until_lane(world, lane)
    assert world.state.host.num_used
    world.lose_host()
    assert world.state.host.num_cached == 0
    assert world.state.host.match(world.state.requests[lane].host_hashes) == []
    world.state.host_started()
    assert chunks_of(world) == [(lane, 12, 2)], "the device still has what it prefilled"
    world.run()
    assert world.produced == {lane: 12}


def test_a_returning_lane_does_not_fetch_what_the_device_still_has() -> None:
    world = World(make_limits(num_device_pages=21, watermark_pages=1), chunk_tokens=64)
    batch = world.add([*SYSTEM, *range(40, 48)], 30, best_effort=True)
    for _ in range(3):
        world.step()
    chat = world.add(60, 4, best_effort=False)
    moves = []
    while world.state.num_swapped_in == 0 and not world.state.is_idle:
        moves += schedule(world.state, 0.0, world.cost).moves
        world.step()
    assert world.state.num_displaced == 1
    (swap_in,) = (m for m in moves if isinstance(m, SwapIn) and m.cached)
    fetched = [m.start for m in moves if isinstance(m, CopyIn)]
    assert min(fetched) == 4 * len(swap_in.cached)
    world.run()
    assert world.produced == {batch: 30, chat: 4}


def test_a_plan_looks_up_the_pages_of_the_prompt_and_no_others() -> None:
    """However many pages are cached."""
    world = World(
        make_limits(num_device_pages=2000, host_offload="never", num_host_pages=0), chunk_tokens=8000
    )
    for _ in range(40):
        finish(world, world.add(160, 1, best_effort=False))
    assert world.state.device.num_cached > 1500

    class Counted(dict[bytes, int]):
        num_lookups = 0

        def get(self, key: bytes, default: object = None) -> object:  # type: ignore[override]
            self.num_lookups += 1
            return super().get(key, default)  # type: ignore[call-overload]

        def __iter__(self) -> object:  # type: ignore[override]
            raise AssertionError("a plan goes through all pages")

    world.add([*world.texts[0], 7], 1, best_effort=False)
    counted = Counted(world.state.device._page_of)
    world.state.device._page_of = counted  # type: ignore[assignment]
    schedule(world.state, 0.0, world.cost)
    assert counted.num_lookups <= 41
