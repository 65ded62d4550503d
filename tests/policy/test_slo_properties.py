"""What holds of plans made from targets, whatever the state."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from omniserve.policy.budget import Rules
from omniserve.policy.host_outlook import HostOutlook
from omniserve.policy.latency import Prediction, WalkLoad
from omniserve.policy.latency_model import KINDS, LatencyModel
from omniserve.policy.plan import CancelSwapIn, CopyOut, Displace, Drop, Plan, Reserve, SwapIn
from omniserve.policy.request import Phase, Request
from omniserve.policy.scheduler import schedule
from omniserve.policy.slo import SloPolicy
from omniserve.policy.state import State
from omniserve.types import SLO
from policy.exact import ExactModel, Scene, make_policy, make_terms, roomy
from policy.latency_fits import small_fit
from policy.scripted import World, make_limits

MILLI = 1e-3
EPSILON = 1e-9

exact_models = st.builds(
    ExactModel,
    walk=st.floats(0.1 * MILLI, 30 * MILLI),
    row=st.floats(0.01 * MILLI, 3 * MILLI),
    context=st.floats(0.0, 0.01 * MILLI),
    prefill=st.floats(0.0, 0.01 * MILLI),
    lane_row=st.floats(0.01 * MILLI, 2 * MILLI),
    copied=st.floats(0.0, 0.1 * MILLI),
    margin=st.floats(0.0, 0.5),
    host_row=st.floats(0.01 * MILLI, 20 * MILLI),
    sample=st.floats(0.0, 1 * MILLI),
    host_share=st.floats(0.0, 1.0),
)
# The engine's own: staircases, and another margin for each kind of walk.
learned_models = st.builds(
    lambda residuals: LatencyModel(small_fit(residuals=residuals, num_layers=2)),
    st.dictionaries(st.sampled_from(KINDS), st.lists(st.floats(-0.3, 0.6), min_size=1, max_size=3)),
)
models = exact_models | learned_models
slos = st.builds(SLO, st.floats(0.05, 3.0), st.floats(0.01, 0.3))


@st.composite
def scenes(draw: st.DrawFn, **limits: Any) -> Scene:
    """Up to a dozen requests of either class in any phase, some of them late; maybe more chats are likely to
    come, for some came lately."""
    scene = Scene(roomy(**({"num_device_pages": 400, "num_host_pages": 100, "max_lanes": 16} | limits)))
    sizes = st.integers(2, 60)

    def is_nearly_full() -> bool:
        """No room for the longest prompt."""
        return scene.state.device.num_free < scene.state.device.pages_for(301)

    for _ in range(draw(st.integers(0, 5), label="chats decoding")):
        last_s = draw(st.floats(-0.2, 0.0))
        first_s = last_s - draw(st.floats(0.0, 0.5))
        scene.decoding(
            draw(sizes), out=3, slo=draw(slos | st.none()), last_token_s=last_s, first_token_s=first_s
        )
    for _ in range(draw(st.integers(0, 3), label="chats with a prompt")):
        arrival_s = draw(st.floats(-2.0, 0.0))
        if draw(st.booleans()) or is_nearly_full():
            scene.waiting(draw(st.integers(2, 300)), slo=draw(slos), arrival_s=arrival_s)
        else:
            prompt = draw(st.integers(2, 300))
            scene.prefilling(prompt, draw(st.integers(0, prompt - 1)), slo=draw(slos), arrival_s=arrival_s)
    for _ in range(draw(st.integers(0, 4), label="batch")):
        where = draw(st.sampled_from(["waiting", "prefilling", "decoding"]))
        match "waiting" if is_nearly_full() else where:
            case "waiting":
                scene.waiting(draw(st.integers(2, 300)), best_effort=True)
            case "prefilling":
                scene.prefilling(100, draw(st.integers(0, 99)), best_effort=True)
            case "decoding":
                decoding = draw(st.sampled_from([scene.decoding, scene.mirrored]))
                decoding(draw(sizes), best_effort=True, last_token_s=draw(st.floats(-1.0, 0.0)))
    for age_s in sorted(
        draw(st.lists(st.floats(0.0, 90.0), max_size=5), label="arrivals before"), reverse=True
    ):
        gone = scene.newcomer(draw(st.integers(2, 300)), draw(slos), arrival_s=-age_s)
        scene.state.note_arrival(gone, -age_s)
    num_in_flight = 0
    for _ in range(draw(st.integers(0, 6), label="lanes")):
        in_flight = draw(st.booleans())
        scene.lane(draw(sizes), in_flight=in_flight)
        num_in_flight += in_flight
    low = draw(st.integers(0, num_in_flight))
    scene.state.lanes_waiting = (low, num_in_flight - low)
    return scene


def near_capacity(num_chats: int) -> Scene:
    """Chats that leave a batch prompt more time than likely newcomers can spare."""
    scene = Scene()
    for _ in range(num_chats):
        scene.decoding(20)
    scene.waiting(300, best_effort=True)
    scene.state.note_arrival(Scene().newcomer(250), -1.0)
    return scene


def load_of(plan: Plan, state: State) -> WalkLoad:
    """What a plan asks of the device, counted from its rows alone."""
    load = WalkLoad()
    for request_id in plan.decodes:
        load.add_decode(state.requests[request_id].kv_tokens + 1)
    for chunk in plan.chunks:
        load.add_chunk(chunk.start, chunk.num_tokens)
        load.num_samples += chunk.start + chunk.num_tokens == state.requests[chunk.request_id].num_tokens
    load.add_lane_rows(len(plan.lane_starts) + sum(plan.lane_cap), state.limits.num_layers)
    load.copied_tokens = sum(m.num_tokens for m in plan.moves if isinstance(m, CopyOut))
    return load


def with_rows(plan: Plan) -> list[int]:
    """Requests with device rows."""
    return [*plan.decodes, *(chunk.request_id for chunk in plan.chunks)]


@given(scene=scenes(), model=models, share=st.sampled_from([0.0, 0.0, 0.1]), debt=st.floats(0.0, 0.05))
@example(scene=near_capacity(62), model=ExactModel(), share=0.0, debt=0.0)
@example(scene=near_capacity(70), model=ExactModel(), share=0.0, debt=0.0)
def test_a_plan_never_exceeds_its_budget_by_its_own_model(
    scene: Scene, model: Prediction, share: float, debt: float
) -> None:
    state = scene.state
    state.best_effort_debt_s = debt if share else 0.0
    plan = schedule(state, 0.0, make_policy(model, best_effort_share=share))
    why = plan.why
    assert why is not None
    if plan.kind == "passes":
        assert plan.budget_s <= make_terms().walk_bound_s
        return
    bound_s = model.bound_s(load_of(plan, state), why.host_is_busy)
    assert why.budget_s is None or bound_s <= why.budget_s + EPSILON
    if any(state.requests[i].best_effort for i in with_rows(plan)):
        assert why.budget_s is not None, "batch work is always bounded"
        most_s = [make_terms().walk_bound_s]
        most_s += [why.slack_s] if why.slack_s is not None else []
        if why.newcomers_spare_s is not None:
            most_s.append(why.latency_sensitive_s + why.newcomers_spare_s)
        owed_s = why.latency_sensitive_s + state.best_effort_debt_s
        assert why.best_effort_s <= max(min(most_s), owed_s) + EPSILON
    if why.slack_s is not None and why.budget_s is not None and why.budget_s > why.slack_s + EPSILON:
        chats = tuple(i for i in plan.decodes if not state.requests[i].best_effort)
        least_s = model.bound_s(load_of(Plan("walk", decodes=chats), state), why.host_is_busy)
        assert least_s > why.slack_s or state.best_effort_debt_s, "only what must be done exceeds the slack"


@given(scene=scenes(num_device_pages=60, watermark_pages=2), model=models)
def test_a_plan_can_be_carried_out(scene: Scene, model: Prediction) -> None:
    scene.state.check()
    scene.state.commit(schedule(scene.state, 0.0, make_policy(model)), 0.0)
    scene.state.check()


@given(scene=scenes(), model=models)
def test_best_effort_work_takes_no_row_and_no_token_from_chat(scene: Scene, model: Prediction) -> None:
    """No class inversion: without any best-effort request chat is served the same."""
    state, policy = scene.state, make_policy(model)
    beside = schedule(state, 0.0, policy)
    batch = {r.id for r in state.requests.values() if r.best_effort}
    for request_id in batch:
        state.abort(request_id)
    alone = schedule(state, 0.0, policy)
    assert [i for i in beside.decodes if i not in batch] == list(alone.decodes)
    assert [c for c in beside.chunks if c.request_id not in batch] == list(alone.chunks)


GIVING_WAY = (Displace, Drop, CancelSwapIn)
CHAT_ALONE = Rules("omniserve", stages=("ls_decode", "ls_prefill"))


@st.composite
def full_scenes(draw: st.DrawFn) -> Scene:
    """Batch work has nearly all the pages that the others left; the host has copies of some."""
    scene = draw(scenes(num_device_pages=50, watermark_pages=2))
    left_free = draw(st.integers(0, 3))
    while (num_pages := scene.state.device.num_free - left_free) > 0:
        num_tokens = 16 * draw(st.integers(1, min(6, num_pages))) - draw(st.integers(0, 13))
        add = draw(st.sampled_from([scene.decoding, scene.mirrored]))
        add(num_tokens, best_effort=True, last_token_s=draw(st.floats(-1.0, 0.0)))
    return scene


@given(scene=full_scenes(), model=models, rules=st.sampled_from([None, CHAT_ALONE]))
def test_nobody_gives_way_for_a_request_that_is_not_served(
    scene: Scene, model: Prediction, rules: Rules | None
) -> None:
    """Who is dropped makes room for one ahead in line, which has a row.

    Where only chat asks for pages, so does who moves or stays away, and there were too few free ones: batch
    work also moves for its own sake.
    """
    policy = make_policy(model)
    plan = schedule(scene.state, 0.0, replace(policy, rules=rules) if rules else policy)
    if not plan.decodes and not plan.chunks and len(plan.moves) == 1:
        return  # a standstill, broken
    requests = scene.state.requests
    gainers = []
    reserved = sum(
        m.num_pages for m in plan.moves if isinstance(m, Reserve) and m.request_id in with_rows(plan)
    )
    if rules and any(isinstance(move, GIVING_WAY) for move in plan.moves):
        assert reserved > scene.state.device.num_free
    for move in reversed(plan.moves):
        request = requests[move.request_id]
        if isinstance(move, Reserve) and request.id in with_rows(plan):
            gainers.append(request)
        elif isinstance(move, Drop) or (rules and isinstance(move, GIVING_WAY)):
            assert any(gainer.order < request.order for gainer in gainers), move
    displaced = [requests[m.request_id] for m in plan.moves if isinstance(m, Displace)]
    assert all(request.best_effort for request in displaced)


@given(scene=scenes(), model=models, earlier_s=st.floats(0.0, 0.2))
def test_more_slack_never_means_fewer_prompt_tokens_for_chat(
    scene: Scene, model: Prediction, earlier_s: float
) -> None:
    def chunks_at(now: float) -> tuple[int, bool, float]:
        """Prompt tokens of chat, whether its decodes alone were late (a small chunk rides then), and the
        slack, more of which may have been lent to a later prompt."""
        plan = schedule(scene.state, now, make_policy(model))
        requests = scene.state.requests
        chats = [c.num_tokens for c in plan.chunks if not requests[c.request_id].best_effort]
        why = plan.why
        assert why is not None
        slack_s = math.inf if why.slack_s is None else why.slack_s
        return sum(chats), why.budget_s is not None and why.budget_s > slack_s, slack_s

    late, is_lost, late_slack_s = chunks_at(0.0)
    early, _, early_slack_s = chunks_at(-earlier_s)
    assert early >= late or is_lost or late_slack_s > early_slack_s


@given(model=models, slack_s=st.floats(0.0, 0.2), more_s=st.floats(0.0, 0.2))
def test_more_slack_never_means_less_for_best_effort_work(
    model: Prediction, slack_s: float, more_s: float
) -> None:
    scene = Scene()
    scene.decoding(20, slo=SLO(4.0, 0.4), last_token_s=0.0)
    scene.waiting(300, best_effort=True)

    def seconds(left_s: float) -> float:
        plan = schedule(scene.state, 0.4 - left_s, make_policy(model))
        assert plan.why is not None
        return plan.why.bound_s

    assert seconds(slack_s + more_s) >= seconds(slack_s) - EPSILON


@settings(max_examples=40, deadline=None)
@given(model=exact_models, share=st.floats(0.02, 0.5), num_chats=st.integers(1, 4))
def test_the_guaranteed_share_of_best_effort_work_is_kept(
    model: ExactModel, share: float, num_chats: int
) -> None:
    """Chat that has lost its targets for good leaves no slack; batch has its share of the device's time, but
    for what is owed at the end: less than a token, and the share of the last walk, unless rows ran out."""
    scene = Scene()
    for _ in range(num_chats):
        scene.decoding(20, last_token_s=-100.0)
    scene.waiting(60_000, best_effort=True)  # the device has pages for it
    policy = make_policy(model, best_effort_share=share, walk_bound_s=100.0)
    total_s = had_s = owed_s = 0.0
    for _ in range(60):
        scene.state.requests[num_chats].kv_tokens = 0
        plan = schedule(scene.state, 0.0, policy)
        why = plan.why
        assert why is not None
        alone = load_of(replace(plan, chunks=(), lane_cap=(), lane_starts=()), scene.state)
        total_s += why.bound_s
        had_s += why.bound_s - model.bound_s(alone, why.host_is_busy)
        scene.state.best_effort_debt_s = owed_s = plan.best_effort_debt_s
        given = sum(c.num_tokens for c in plan.chunks)
        if num_chats + given < policy.terms.max_num_batched_tokens:
            more_s = model.bound_s(alone.with_chunk(0, given + 1, False), why.host_is_busy)
            assert owed_s <= more_s - why.bound_s + share * why.bound_s + EPSILON
    assert had_s + owed_s >= share * total_s - EPSILON
    assert had_s > 0


@settings(max_examples=60, deadline=None)
@given(data=st.data(), model=models, mode=st.sampled_from(["auto", "always", "never"]))
def test_every_request_finishes_whatever_targets_it_has(
    data: st.DataObject, model: Prediction, mode: str
) -> None:
    """Targets that nobody can hold, too: no budget ever stops an engine that could go on."""
    host_pages = 0 if mode == "never" else 14
    limits = make_limits(
        num_host_pages=host_pages, num_device_pages=data.draw(st.integers(4, 14)), host_offload=mode
    )
    world = World(limits, policy=make_policy(model, max_num_batched_tokens=9, max_lane_rows=3))
    wanted = {}
    longest = min(limits.num_device_pages, 14) * limits.page_size
    for _ in range(data.draw(st.integers(1, 8), label="requests")):
        total = data.draw(st.integers(2, longest), label="total tokens")
        prompt = data.draw(st.integers(1, total - 1), label="prompt")
        best_effort = data.draw(st.booleans(), label="best effort")
        slo = None if best_effort else data.draw(slos | st.none(), label="slo")
        wanted[world.add(prompt, total - prompt, best_effort, slo=slo)] = total - prompt
        for _ in range(data.draw(st.integers(0, 4), label="steps between")):
            world.step(lambda kind, key: data.draw(st.booleans(), label="served"))
    world.run()
    assert world.produced == wanted


def is_short_of_pages(state: State, plan: Plan) -> bool:
    """Whether best-effort decodes lack pages above the watermark, what this plan reserves for prompts taken
    off."""
    reserved = sum(
        m.num_pages + len(m.cached)
        for m in plan.moves
        if isinstance(m, Reserve) and state.requests[m.request_id].phase is Phase.WAITING
    )
    staying = state.in_class(Phase.DEVICE, best_effort=True)
    missing = sum(max(0, state.device.pages_for(r.kv_tokens + 1) - len(r.device_pages)) for r in staying)
    return state.device.num_free - reserved - missing < state.limits.watermark_pages


@settings(max_examples=40, deadline=None)
@given(data=st.data(), model=models)
def test_nobody_goes_to_and_fro(data: st.DataObject, model: Prediction) -> None:
    """Chat comes and goes, and prompts of batch; a batch request comes back once in so many tokens, and goes
    sooner only where chat takes pages, or where it could not go on: without a row as long as moving takes,
    or short of pages with nobody behind the first in line who has stayed longer."""
    policy = make_policy(model, max_num_batched_tokens=16)
    world = World(make_limits(num_device_pages=16, num_host_pages=100, max_lanes=8), policy=policy)
    for _ in range(3):
        world.add(8, 30, best_effort=True)
    for _ in range(120):
        arrival = data.draw(st.integers(0, 49), label="arrival")
        if arrival == 49:
            world.add(data.draw(st.integers(4, 30)), 6, best_effort=False, slo=data.draw(slos))
        elif arrival > 43:
            world.add(data.draw(st.integers(4, 30)), data.draw(st.integers(2, 30)), best_effort=True)
        state = world.state
        has_stayed = {
            r.id: r.moved_at is None or r.num_tokens - r.moved_at >= 8 for r in state.requests.values()
        }
        coming = {r.id for r in state.active.values() if r.incoming_pages}
        plan = schedule(state, world.now, policy)
        displaced = {m.request_id for m in plan.moves if isinstance(m, Displace)}
        for_chat = any(
            not state.requests[m.request_id].best_effort for m in plan.moves if isinstance(m, Reserve)
        )
        others = [r for r in state.in_class(Phase.DEVICE, best_effort=True) if r.id not in displaced][1:]
        is_short = is_short_of_pages(state, plan) and not any(has_stayed[r.id] for r in others)
        for request_id in displaced:
            request = state.requests[request_id]
            is_allowed = has_stayed[request_id] or for_chat or is_short
            assert is_allowed or waits_for_a_row(request, plan, state, policy, world.now)
        for move in plan.moves:
            if isinstance(move, SwapIn) and move.request_id not in coming:
                assert has_stayed[move.request_id], "it has just come"
        if not world.step():
            break


def waits_for_a_row(request: Request, plan: Plan, state: State, policy: SloPolicy, now: float) -> bool:
    """Whether it has waited as long as moving takes."""
    assert plan.why is not None
    assert request.last_token_s is not None
    host = HostOutlook(state, policy.model, policy.terms)
    return now - request.last_token_s > host.move_s(request, plan.why.latency_sensitive_s)


@given(scene=scenes(), model=models, slo=slos, share=st.sampled_from([0.0, 0.2]), data=st.data())
def test_what_is_refused_of_the_least_prompt_is_refused_of_every_longer_one(
    scene: Scene, model: Prediction, slo: SLO, share: float, data: st.DataObject
) -> None:
    policy = make_policy(model, best_effort_share=share)
    arrival_s = data.draw(st.floats(-2.0, 0.0))
    is_cached = data.draw(st.booleans(), label="some of it may be cached")
    least = 1 if is_cached else data.draw(st.integers(1, 50), label="tokens at least")
    early = policy.admit(scene.state, scene.newcomer(least, slo, arrival_s), 0.0)
    longer = scene.newcomer(data.draw(st.integers(least, 400), label="tokens"), slo, arrival_s)
    if is_cached:
        device = scene.state.device
        count = data.draw(st.integers(0, min(longer.num_prompt // device.page_size, device.num_free)))
        longer.device_hashes = [b"%d" % number for number in range(count)]
        pages = device.allocate(count)
        for page, page_hash in zip(pages, longer.device_hashes, strict=True):
            device.register(page, page_hash)
        device.release(pages)
    exact = policy.admit(scene.state, longer, 0.0)
    if early.refuses_longer:
        assert exact.obstacle is not None
