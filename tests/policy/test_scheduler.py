"""The policy as stories: small pages, few requests, a list of what happened."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from omniserve.policy.budget import FixedBudget
from omniserve.policy.plan import Drop, SwapIn
from omniserve.policy.request import Phase
from omniserve.policy.scheduler import schedule
from omniserve.policy.state import State
from policy.scripted import World, make_limits

# Prompts are the beginnings of few texts, of which some begin alike.
TREE = [
    [0] * 60,
    [0, 0, 0, 0, 0, 0, 1] + [0, 1] * 30,
    [0, 0, 0, 1] + [1] * 60,
    [0, 0, 0, 1, 1, 1, 1, 1, 1, 0] + [1, 1, 0] * 20,
]


def test_policy_imports_no_torch() -> None:
    code = (
        "import sys, omniserve.policy.scheduler; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_latency_sensitive_rows_come_before_best_effort_rows() -> None:
    world = World(make_limits(), chunk_tokens=6)
    batch = world.add(6, 4, best_effort=True)
    chat = world.add(5, 4, best_effort=False)
    plan = schedule(world.state, 0.0, world.cost)
    assert [(c.request_id, c.num_tokens) for c in plan.chunks] == [(chat, 5), (batch, 1)]


def test_a_prompt_longer_than_the_budget_is_prefilled_in_chunks() -> None:
    world = World(make_limits(), chunk_tokens=4)
    world.add(10, 1, best_effort=False)
    chunks = []
    while not world.state.is_idle:
        chunks += [c.num_tokens for c in schedule(world.state, 0.0, world.cost).chunks]
        world.step()
    assert chunks == [4, 4, 2]


def test_scheduling_changes_nothing() -> None:
    world = World(make_limits())
    for i in range(6):
        world.add(6, 5, best_effort=i % 2 == 0)
    for _ in range(10):
        first = schedule(world.state, 0.0, world.cost)
        assert schedule(world.state, 0.0, world.cost) == first
        world.step()


def test_always_decodes_best_effort_in_lanes_only() -> None:
    world = World(make_limits(host_offload="always"))
    world.add(5, 6, best_effort=True)
    decodes = 0
    while not world.state.is_idle:
        decodes += len(schedule(world.state, 0.0, world.cost).decodes)
        world.step()
    assert decodes == 0
    assert world.produced == {0: 6}


def test_never_keeps_everything_on_the_device() -> None:
    world = World(make_limits(host_offload="never", num_host_pages=0))
    world.add(5, 6, best_effort=True)
    seen = set()
    while not world.state.is_idle:
        world.step()
        seen |= set(world.phases().values())
    assert seen <= {Phase.PREFILL, Phase.DEVICE}


def test_auto_decodes_on_the_device_while_pages_exceed_the_watermark() -> None:
    roomy = World(make_limits(num_device_pages=40, watermark_pages=2))
    roomy.add(8, 8, best_effort=True)
    roomy.run()
    assert roomy.state.num_displaced == 0
    tight = World(make_limits(num_device_pages=8, watermark_pages=3))
    for _ in range(3):
        tight.add(8, 8, best_effort=True)
    tight.run()
    assert tight.state.num_displaced > 0


def test_chat_displaces_batch_and_clean_pages_are_free_at_once() -> None:
    world = World(make_limits(num_device_pages=8, watermark_pages=1, num_host_pages=16))
    batch = world.add(16, 8, best_effort=True)
    while world.phases()[batch] is not Phase.DEVICE:
        world.step()
    for _ in range(3):
        world.step()
    chat = world.add(12, 4, best_effort=False)
    world.step()
    assert world.phases()[chat] is not Phase.WAITING
    assert world.state.num_dropped == 0
    world.run()
    assert world.produced == {batch: 8, chat: 4}


def test_nobody_is_evicted_for_a_request_that_then_is_not_admitted() -> None:
    world = World(make_limits(num_device_pages=8, host_offload="never", num_host_pages=0))
    chat = world.add(20, 8, best_effort=False)
    batch = world.add(4, 4, best_effort=True)
    for _ in range(6):
        world.step()
    too_big = world.add(24, 4, best_effort=False)
    plan = schedule(world.state, 0.0, world.cost)
    assert world.phases()[too_big] is Phase.WAITING
    assert not any(isinstance(m, Drop) for m in plan.moves)
    world.run()
    assert set(world.finished) == {chat, batch, too_big}


def test_two_equal_requests_never_evict_each_other_for_ever() -> None:
    world = World(make_limits(num_device_pages=6, host_offload="never", num_host_pages=0, watermark_pages=1))
    world.add(8, 12, best_effort=True)
    world.add(8, 12, best_effort=True)
    world.run(max_steps=200)
    assert world.state.num_dropped <= 2


def test_a_dropped_request_keeps_its_place_in_line() -> None:
    world = World(make_limits(num_device_pages=8, host_offload="never", num_host_pages=0))
    first = world.add(8, 6, best_effort=True)
    for _ in range(2):
        world.step()
    second = world.add(4, 2, best_effort=True)
    world.state.commit(_drop_plan(first), 0.0)
    assert [r.id for r in world.state.first_waiting()] == [first, second]


def test_a_prefill_starts_anew_after_a_drop_until_there_is_a_first_token() -> None:
    limits = make_limits(num_device_pages=8, host_offload="never", num_host_pages=0)
    world = World(limits, chunk_tokens=8, caches_prefixes=False)
    chat = world.add(20, 4, best_effort=False)
    request = world.state.requests[chat]
    assert request.started_s is None
    for now in (1.0, 2.0):
        world.now = now
        world.step()
        assert request.started_s == now
        world.step()
        assert request.started_s == now, "a chunk more is no new start"
        world.state.commit(_drop_plan(chat), now)
    world.now = 3.0
    while not world.produced[chat]:
        world.step()
    world.state.commit(_drop_plan(chat), 4.0)
    world.now = 5.0
    world.step()
    assert request.phase is not Phase.WAITING
    assert request.started_s == 3.0


def _drop_plan(request_id: int) -> object:
    from omniserve.policy.plan import Plan

    return Plan("passes", moves=(Drop(request_id),))


def test_a_lane_comes_back_when_the_device_has_room_again() -> None:
    world = World(make_limits(num_device_pages=16, watermark_pages=2, max_lanes=4))
    batch = [world.add(8, 30, best_effort=True) for _ in range(2)]
    chat = world.add(36, 4, best_effort=False)
    swaps = 0
    for _ in range(400):
        if world.state.is_idle:
            break
        swaps += sum(isinstance(m, SwapIn) for m in schedule(world.state, 0.0, world.cost).moves)
        world.step()
    assert world.state.num_displaced > 0, "the chat pushes a batch request out"
    assert world.state.num_swapped_in > 0, "and it comes back"
    assert world.produced == {batch[0]: 30, batch[1]: 30, chat: 4}


def test_no_lane_comes_back_from_lossy_kv_and_everybody_finishes() -> None:
    """The story above, in which a lane would come back; it ends its text on the host instead."""
    limits = make_limits(num_device_pages=16, watermark_pages=2, max_lanes=4, host_kv_is_lossy=True)
    world = World(limits)
    batch = [world.add(8, 30, best_effort=True) for _ in range(2)]
    chat = world.add(36, 4, best_effort=False)
    seen = set()
    while not world.state.is_idle:
        assert not any(isinstance(m, SwapIn) for m in schedule(world.state, 0.0, world.cost).moves)
        world.step()
        seen |= set(world.phases().values())
    assert Phase.LANE in seen
    assert Phase.MOVING_IN not in seen
    assert world.state.num_displaced > 0
    assert world.state.num_dropped == 0
    assert world.produced == {batch[0]: 30, batch[1]: 30, chat: 4}


def test_batch_prompts_wait_while_ready_lanes_are_left_out() -> None:
    world = World(make_limits(host_offload="always", num_device_pages=40, num_host_pages=40))
    world.add(4, 12, best_effort=True)
    world.add(4, 60, best_effort=False)
    while Phase.LANE not in world.phases().values():
        world.step()
    world.lanes_unserved = 2
    world.step()
    newcomer = world.add(4, 3, best_effort=True)
    for _ in range(4):
        world.step(host_serves=lambda kind, key: False)
    assert world.phases()[newcomer] is Phase.WAITING
    world.lanes_unserved = 0
    for _ in range(2):
        world.step(host_serves=lambda kind, key: False)
    assert world.phases()[newcomer] is not Phase.WAITING


def test_a_batch_request_without_a_row_goes_on_as_a_lane() -> None:
    world = World(make_limits(num_device_pages=40), chunk_tokens=3)
    batch = world.add(3, 20, best_effort=True)
    while world.phases()[batch] is not Phase.DEVICE:
        world.step()
    for _ in range(3):
        world.add(1, 80, best_effort=False)
    for _ in range(30):
        world.step()
    assert world.phases()[batch] is Phase.LANE, (
        "chat fills the token budget; the host takes the batch request"
    )
    assert world.produced[batch] > 2


def test_a_lane_grows_in_the_partition_it_began_in_and_the_next_lane_takes_another() -> None:
    world = World(make_limits(num_host_pages=16, num_host_partitions=2, host_offload="always"))
    lanes = [world.add(8, 12, best_effort=True) for _ in range(2)]
    homes: dict[int, set[int]] = {}
    pool = world.state.host
    while not world.state.is_idle:
        for request in world.state.in_phase(Phase.LANE):
            homes.setdefault(request.id, set()).update(map(pool.partition_of, request.hold.pages))
        world.step()
    assert sorted(homes[lane] for lane in lanes) == [{0}, {1}]


def test_a_frozen_host_never_holds_latency_sensitive_work() -> None:
    world = World(make_limits(num_device_pages=10))
    for _ in range(4):
        world.add(8, 20, best_effort=True)
    for _ in range(12):
        world.step()
    chat = [world.add(8, 6, best_effort=False) for _ in range(3)]
    for _ in range(80):
        world.step(host_serves=lambda kind, key: False)
    assert set(chat) <= set(world.finished)
    world.run()
    assert all(count in (6, 20) for count in world.produced.values())


def test_host_loss_costs_lanes_a_prefill_and_chat_nothing() -> None:
    world = World(make_limits(host_offload="always"))
    batch = [world.add(6, 8, best_effort=True) for _ in range(3)]
    chat = world.add(6, 30, best_effort=False)
    for _ in range(8):
        world.step()
    dropped_before = world.state.num_dropped
    world.lose_host()
    world.state.check()
    assert world.phases()[chat] is Phase.DEVICE
    assert world.state.num_dropped > dropped_before
    world.state.host_started()
    world.run()
    assert world.produced == {**dict.fromkeys(batch, 8), chat: 30}


def test_latency_sensitive_overcommit_is_counted_as_a_broken_promise() -> None:
    world = World(make_limits(num_device_pages=6, host_offload="never", num_host_pages=0))
    world.add(8, 14, best_effort=False)
    world.add(8, 14, best_effort=False)
    world.run()
    assert world.state.num_broken_promises > 0
    assert world.produced == {0: 14, 1: 14}


@pytest.mark.parametrize(
    ("mode", "is_lossy"),
    [("auto", False), ("always", False), ("never", False), ("auto", True), ("always", True)],
)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_request_finishes_with_its_tokens_in_any_memory(
    mode: str, is_lossy: bool, data: st.DataObject
) -> None:
    page_size = data.draw(st.sampled_from([1, 2, 4]), label="page size")
    device_pages = data.draw(st.integers(4, 14), label="device pages")
    host_pages = 0 if mode == "never" else data.draw(st.integers(4, 14), label="host pages")
    host_page_size = data.draw(st.sampled_from([1, 2, 3, 4]), label="host page size")
    limits = make_limits(
        page_size=page_size,
        host_page_size=host_page_size,
        num_device_pages=device_pages,
        num_host_pages=host_pages,
        watermark_pages=data.draw(st.integers(1, 3), label="watermark"),
        max_lanes=data.draw(st.integers(1, 4), label="lanes"),
        max_num_seqs=data.draw(st.integers(1, 6), label="seqs"),
        host_offload=mode,
        num_host_partitions=data.draw(st.integers(1, max(1, min(3, host_pages))), label="partitions"),
        host_kv_is_lossy=is_lossy,
        prefix_reserve_pages=data.draw(st.integers(0, device_pages), label="reserve"),
    )
    world = World(limits, chunk_tokens=data.draw(st.integers(1, 9), label="budget"))
    longest = device_pages * page_size
    if mode == "always":
        longest = min(longest, host_pages * host_page_size)
    wanted = {}
    for _ in range(data.draw(st.integers(1, 8), label="requests")):
        total = data.draw(st.integers(2, longest), label="total tokens")
        prompt = data.draw(st.integers(1, total - 1), label="prompt")
        text = data.draw(st.sampled_from(TREE), label="text")[:prompt]
        request_id = world.add(text, total - prompt, data.draw(st.booleans(), label="best effort"))
        wanted[request_id] = total - prompt
        for _ in range(data.draw(st.integers(0, 4), label="steps between")):
            world.step(lambda kind, key: data.draw(st.booleans(), label="served"))
    world.run()
    assert world.produced == wanted
    assert world.state.device.num_free == device_pages
    assert world.state.host.num_free == host_pages
    assert not (is_lossy and world.state.num_swapped_in)


class PolicyMachine(RuleBasedStateMachine):
    """Arrivals, aborts, host deaths and a host that serves what it likes, at every point."""

    @initialize(
        mode=st.sampled_from(["auto", "always"]),
        device_pages=st.integers(4, 12),
        host_pages=st.integers(4, 12),
        partitions=st.integers(1, 4),
        is_lossy=st.booleans(),
        reserve=st.integers(0, 12),
        page_size=st.sampled_from([1, 2, 4]),
        host_page_size=st.sampled_from([2, 3, 4]),
        caches_prefixes=st.sampled_from([True, True, True, False]),
    )
    def build(
        self,
        mode: str,
        device_pages: int,
        host_pages: int,
        partitions: int,
        is_lossy: bool,
        reserve: int,
        page_size: int,
        host_page_size: int,
        caches_prefixes: bool,
    ) -> None:
        limits = make_limits(
            num_device_pages=device_pages,
            num_host_pages=host_pages,
            page_size=page_size,
            host_page_size=host_page_size,
            host_offload=mode,
            num_host_partitions=partitions,
            host_kv_is_lossy=is_lossy,
            prefix_reserve_pages=reserve,
        )
        self.world = World(limits, caches_prefixes=caches_prefixes)
        self.longest = min(device_pages * page_size, host_pages * host_page_size)
        self.wanted: dict[int, int] = {}

    @rule(
        text=st.sampled_from(TREE),
        prompt=st.integers(1, 20),
        output=st.integers(1, 12),
        best_effort=st.booleans(),
        salt=st.sampled_from([None, None, None, "another tenant"]),
    )
    def arrive(self, text: list[int], prompt: int, output: int, best_effort: bool, salt: str | None) -> None:
        if prompt + output <= self.longest:
            self.wanted[self.world.add(text[:prompt], output, best_effort, salt)] = output

    @rule(data=st.data(), turn=st.integers(1, 4), output=st.integers(1, 6), best_effort=st.booleans())
    def go_on(self, data: st.DataObject, turn: int, output: int, best_effort: bool) -> None:
        """The next turn of a chat: what was said so far, and a little more."""
        if not self.world.finished:
            return
        earlier = data.draw(st.sampled_from(self.world.finished))
        text = self.world.texts[earlier] + [1] * turn
        if len(text) + output <= self.longest:
            self.wanted[self.world.add(text, output, best_effort, self.world.salts[earlier])] = output

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        self.world.step(lambda kind, key: data.draw(st.booleans()))

    @rule(count=st.integers(0, 2))
    def leave_lanes_out(self, count: int) -> None:
        """From now on walks report this many ready lanes that a cap left out."""
        self.world.lanes_unserved = count

    @rule(count=st.integers(1, 5))
    def steps_of_a_frozen_host(self, count: int) -> None:
        for _ in range(count):
            self.world.step(lambda kind, key: False)

    @rule(data=st.data())
    @precondition(lambda self: bool(self.world.state.requests))
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.world.state.requests)))
        self.world.abort(request_id)
        del self.wanted[request_id]

    @rule()
    def host_dies(self) -> None:
        self.world.lose_host()
        self.world.state.host_started()

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "world"):
            self.world.state.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.lanes_unserved = 0
            self.world.run()
            done = {i: self.world.produced[i] for i in self.wanted}
            assert done == self.wanted


TestPolicyMachine = PolicyMachine.TestCase
TestPolicyMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_an_unknown_abort_is_harmless() -> None:
    state = State(make_limits())
    assert state.abort(3) is False
    assert schedule(state, 0.0, FixedBudget(8, 2)).is_empty
