"""Budgets from targets, as stories. The model: 10 ms a walk, 1 ms a row, unless said otherwise."""

from __future__ import annotations

import pytest

from omniserve.policy.explanation import LeftOut
from omniserve.policy.plan import CopyOut, Displace, Plan, Step, StepResult, SwapIn
from omniserve.policy.request import Phase, Request
from omniserve.policy.residence import Room
from omniserve.policy.scheduler import schedule
from omniserve.policy.slack import token_due_s
from omniserve.types import SLO
from policy.exact import ExactModel, Scene, make_policy, roomy


def chunks(plan: Plan) -> dict[int, int]:
    return {chunk.request_id: chunk.num_tokens for chunk in plan.chunks}


# ---------------------------------------------------------------- slack


def test_the_first_token_is_due_by_ttft_after_arrival() -> None:
    request = Scene().newcomer(10, arrival_s=5.0)
    assert token_due_s(request) == 6.0


def test_a_later_token_is_due_one_tpot_after_the_last() -> None:
    chat = Scene().decoding(10, out=3, first_token_s=0.0, last_token_s=0.12)
    assert token_due_s(chat) == pytest.approx(0.22), "ahead of its mean: the gap counts"


def test_a_request_behind_its_pace_is_due_earlier_but_never_more_than_twice_as_fast() -> None:
    scene = Scene()
    late = scene.decoding(10, out=3, first_token_s=0.0, last_token_s=0.24)
    assert token_due_s(late) == pytest.approx(0.30), "the mean over three gaps allows no more"
    hopeless = scene.decoding(10, out=3, first_token_s=0.0, last_token_s=9.0)
    assert token_due_s(hopeless) == pytest.approx(9.05)


# ---------------------------------------------------------------- latency-sensitive work


def test_a_chunk_fills_what_the_decodes_tpot_leaves() -> None:
    scene = Scene()
    scene.decoding(20)
    prompt = scene.waiting(500)
    plan = schedule(scene.state, 0.0, make_policy())
    # 100 ms of target, 10 ms of walk, 1 ms for the decode row: 89 tokens.
    assert chunks(plan) == {prompt.id: 89}
    assert plan.why is not None
    assert plan.why.bound_s == pytest.approx(0.1)


def test_time_already_gone_since_the_last_token_is_not_spent_again() -> None:
    scene = Scene()
    scene.decoding(20, last_token_s=0.0)
    prompt = scene.waiting(500)
    plan = schedule(scene.state, 0.04, make_policy())
    assert chunks(plan) == {prompt.id: 49}


def test_the_margin_that_the_model_has_learned_is_kept_free() -> None:
    scene = Scene()
    scene.decoding(20)
    prompt = scene.waiting(500)
    plan = schedule(scene.state, 0.0, make_policy(ExactModel(margin=0.25)))
    assert chunks(plan) == {prompt.id: 69}, "80 ms by the model, 100 ms by its bound"


def test_prompts_are_served_in_the_order_in_which_they_are_due() -> None:
    scene = Scene()
    scene.decoding(20)
    patient = scene.waiting(80, slo=SLO(9.0, 0.1))
    urgent = scene.waiting(80, slo=SLO(0.5, 0.1), arrival_s=0.2)
    plan = schedule(scene.state, 0.3, make_policy(ExactModel(row=0.0005)))
    assert next(iter(chunks(plan))) == urgent.id
    assert patient.order > urgent.order


def test_priority_goes_before_the_time_that_is_left_and_after_the_class() -> None:
    scene = Scene()
    urgent = scene.waiting(80, slo=SLO(0.5, 0.1))
    preferred = scene.waiting(80, slo=SLO(9.0, 0.1), priority=-1)
    batch = scene.waiting(80, best_effort=True, priority=-9)
    plan = schedule(scene.state, 0.0, make_policy(ExactModel(row=0.0005)))
    assert next(iter(chunks(plan))) == preferred.id
    assert preferred.order < urgent.order < batch.order


def test_decodes_that_miss_their_target_anyway_hold_no_prompt_back() -> None:
    scene = Scene()
    for _ in range(120):
        scene.decoding(20)
    prompt = scene.waiting(500)
    plan = schedule(scene.state, 0.0, make_policy())
    assert len(plan.decodes) == 120, "latency-sensitive decodes always ride"
    assert chunks(plan) == {prompt.id: 16}


# ---------------------------------------------------------------- best-effort work


def test_best_effort_work_fills_the_slack_that_chat_leaves() -> None:
    scene = Scene()
    scene.decoding(20)
    batch = scene.waiting(500, best_effort=True)
    plan = schedule(scene.state, 0.0, make_policy())
    assert chunks(plan) == {batch.id: 89}


def test_without_chat_a_walk_is_bounded_by_a_quarter_of_the_tightest_ttft() -> None:
    scene = Scene()
    batch = scene.waiting(1000, best_effort=True)
    plan = schedule(scene.state, 0.0, make_policy(walk_bound_s=0.05))
    assert chunks(plan) == {batch.id: 40}


def test_best_effort_work_takes_only_what_a_waiting_prompt_can_spare() -> None:
    scene = Scene()
    prompt = scene.prefilling(250, 50, arrival_s=0.0)
    prompt.started_s = 0.0
    batch = scene.waiting(500, best_effort=True)
    # The prompt needs 210 ms; of its second, 779.5 ms are gone: 10.5 ms are left to spare.
    plan = schedule(scene.state, 0.7795, make_policy())
    assert chunks(plan) == {prompt.id: 200, batch.id: 10}


def test_chat_that_is_late_leaves_nothing_to_batch() -> None:
    scene = Scene()
    scene.decoding(20, last_token_s=0.0)
    batch = scene.waiting(500, best_effort=True)
    plan = schedule(scene.state, 0.2, make_policy())
    assert chunks(plan) == {}
    assert plan.why is not None
    assert LeftOut(batch.id, "slack") in plan.why.left_out


def test_an_idle_engine_serves_best_effort_work_however_slow_it_is() -> None:
    scene = Scene()
    batch = scene.waiting(500, best_effort=True)
    plan = schedule(scene.state, 0.0, make_policy(ExactModel(walk=5.0)))
    assert chunks(plan) == {batch.id: 16}


def test_a_guaranteed_share_is_paid_though_chat_has_no_slack() -> None:
    scene = Scene()
    scene.decoding(20, last_token_s=0.0)
    scene.waiting(500, best_effort=True)
    policy = make_policy(best_effort_share=0.2)
    state, given = scene.state, 0
    for _ in range(20):  # the decode is late every time
        plan = schedule(state, 0.5, policy)
        state.best_effort_debt_s = plan.best_effort_debt_s
        given += sum(chunks(plan).values())
    # A walk with the decode alone takes 11 ms: a fifth of all time is 2.75 ms beside each of them.
    assert 20 * 2 <= given <= 20 * 3


def test_lanes_that_seldom_come_do_not_pay_off_what_is_owed() -> None:
    """Caps take all of what is given, for whoever may come; then batch prompts would wait for ever."""
    scene = Scene()
    scene.decoding(20, last_token_s=0.0)
    scene.lane(20, in_flight=True)
    scene.waiting(500, best_effort=True)
    policy = make_policy(best_effort_share=0.05)
    state, given = scene.state, 0
    state.lane_rows_per_walk = 0.2
    for _ in range(40):
        plan = schedule(state, 0.5, policy)
        state.best_effort_debt_s = plan.best_effort_debt_s
        given += sum(chunks(plan).values())
    # A twentieth of 40 walks of 11 ms is 22 ms: a row takes 1 ms, and the lane is foreseen to bring one.
    assert given > 0


@pytest.mark.parametrize(("waited_s", "tokens"), [(0.0, 150), (0.15, 100), (0.25, 0)])
def test_what_a_chat_has_waited_is_no_more_given_to_the_batch_rows_of_its_walk(
    waited_s: float, tokens: int
) -> None:
    """Together with the walk under way when it came they take no longer than the bound of one, 0.25 s."""
    scene = Scene()
    chat = scene.waiting(90, slo=SLO(10.0, 1.0), arrival_s=-waited_s)
    batch = scene.waiting(500, best_effort=True)
    found = chunks(schedule(scene.state, 0.0, make_policy()))
    assert found[chat.id] == 90
    assert found.get(batch.id, 0) == tokens


def test_where_rows_are_short_a_chat_prompt_leaves_some_for_what_is_owed() -> None:
    scene = Scene()
    chat = scene.waiting(1000, slo=SLO(100.0, 10.0))
    batch = scene.waiting(500, best_effort=True)
    policy = make_policy(best_effort_share=0.2)
    assert chunks(schedule(scene.state, 0.0, policy))[chat.id] == 256
    scene.state.best_effort_debt_s = 0.02
    assert chunks(schedule(scene.state, 0.0, policy)) == {chat.id: 240, batch.id: 16}


# ---------------------------------------------------------------- lanes


def test_the_host_is_taken_for_as_busy_as_it_lately_was_while_there_are_lanes() -> None:
    """Twice as slow beside a host that streams all the time: a chunk gets 39 rows instead of 89."""
    model = ExactModel(host_slowdown=1.0, host_share=1.0)
    scene = Scene()
    scene.decoding(20)
    prompt = scene.waiting(500)
    assert chunks(schedule(scene.state, 0.0, make_policy(model))) == {prompt.id: 89}
    scene.lane(20, in_flight=True)
    assert chunks(schedule(scene.state, 0.0, make_policy(model))) == {prompt.id: 39}
    found = make_policy(model).admit(scene.state, scene.newcomer(100), 0.0)
    why = "600 tokens in 7 walks: lanes get no rows then, and the host has nothing to do"
    assert found.predicted_ttft_s == pytest.approx(7 * 0.098), why


def test_lanes_with_many_rows_a_walk_have_as_many_kept_for_them() -> None:
    def prefilled(lane_rows_per_walk: float) -> int:
        scene = Scene()
        scene.decoding(20)
        for _ in range(2):
            scene.lane(20)
        scene.waiting(2000, best_effort=True)
        scene.state.lane_rows_per_walk = lane_rows_per_walk
        return sum(chunks(schedule(scene.state, 0.0, make_policy())).values())

    assert prefilled(0.0) == 88, "one row of each lane, half a millisecond each"
    assert prefilled(9.5) == 84


def test_lane_rows_are_remembered_from_walk_to_walk() -> None:
    state = Scene().state
    for _ in range(40):
        state.apply(Step("walk"), StepResult(lane_rows=12), 0.0)
        state.apply(Step("passes"), StepResult(), 0.0)
    assert state.lane_rows_per_walk == pytest.approx(12, abs=0.1)
    state.host_lost()
    assert state.lane_rows_per_walk == 0


def test_tokens_of_lanes_need_logits_too() -> None:
    """Rows through both layers: for every second one a token is chosen."""
    scene = Scene()
    scene.decoding(20, last_token_s=0.0)
    for _ in range(12):
        scene.lane(20, in_flight=True)
    scene.state.lanes_waiting = (6, 6)
    # 18 ms left, 11 + 1 of them for the chat: a pair of rows takes 1 ms and its logits 1 ms.
    plan = schedule(scene.state, 0.08199, make_policy(ExactModel(sample=0.001)))
    assert sum(plan.lane_cap) == 6
    assert plan.why is not None
    assert plan.why.load.num_samples == 1 + 3


def test_passes_leave_time_for_the_one_that_begins_last() -> None:
    scene = Scene()
    scene.lane(20)
    plan = schedule(scene.state, 0.0, make_policy(ExactModel(lane_row=0.002)))
    assert (plan.kind, plan.budget_s) == ("passes", pytest.approx(0.05 - 8 * 0.002))
    plan = schedule(scene.state, 0.0, make_policy(ExactModel(lane_row=1.0)))
    assert plan.budget_s > 0, "one pass at least"


def test_passes_do_not_settle_what_is_owed() -> None:
    scene = Scene()
    scene.lane(20)
    scene.state.best_effort_debt_s = 0.01
    plan = schedule(scene.state, 0.0, make_policy(best_effort_share=0.1))
    assert (plan.kind, plan.best_effort_debt_s) == ("passes", 0.01)


def test_all_layers_share_one_slack() -> None:
    scene = Scene()
    scene.decoding(20, last_token_s=0.0)
    for _ in range(12):
        scene.lane(20, in_flight=True)
    scene.state.lanes_waiting = (6, 6)
    plan = schedule(scene.state, 0.087, make_policy())
    # 13 ms left, 11 of them for the chat: 4 lane rows of half a millisecond.
    assert sum(plan.lane_cap) == 4
    assert plan.lane_cap == (2, 2), "in proportion to who waits where"


def test_without_slack_no_lane_enters() -> None:
    scene = Scene()
    scene.decoding(20, last_token_s=0.0)
    scene.lane(20, in_flight=True)
    plan = schedule(scene.state, 0.5, make_policy())
    assert sum(plan.lane_cap) == 0


def test_rows_are_kept_for_lanes_that_wait_at_high_layers() -> None:
    scene = Scene()
    scene.decoding(20, last_token_s=0.0)
    for _ in range(12):
        scene.lane(20, in_flight=True)
    scene.state.lanes_waiting = (2, 10)
    # 14 ms left, 11 of them for the chat: 6 lane rows.
    plan = schedule(scene.state, 0.08599, make_policy())
    assert plan.lane_cap == (1, 5)


def test_copies_keep_to_the_budget_and_lanes_get_the_rest() -> None:
    scene = Scene(roomy(num_frames=8, max_copies_per_step=8))
    scene.decoding(20, last_token_s=0.0)
    scene.decoding(100, best_effort=True)  # six full pages to mirror
    for _ in range(4):
        scene.lane(20, in_flight=True)
    # 25 ms left, 12 for both rows. A page takes 4 ms: three pages; lanes get 1 ms, two rows.
    plan = schedule(scene.state, 0.07499, make_policy(ExactModel(copied=0.00025, host_row=1e-6)))
    assert sum(isinstance(move, CopyOut) for move in plan.moves) == 3
    assert sum(plan.lane_cap) == 2


# ---------------------------------------------------------------- placement


def waits_on_device(scene: Scene, last_token_s: float) -> Request:
    return scene.decoding(40, best_effort=True, last_token_s=last_token_s)


def test_a_short_squeeze_moves_nobody() -> None:
    scene = Scene()
    scene.decoding(20, last_token_s=0.0)
    batch = waits_on_device(scene, last_token_s=0.49)
    plan = schedule(scene.state, 0.5, make_policy())
    assert batch.id not in plan.decodes
    assert not any(isinstance(move, Displace) for move in plan.moves)


def test_one_that_waited_as_long_as_moving_takes_becomes_a_lane() -> None:
    scene = Scene()
    scene.decoding(20, last_token_s=0.0)
    batch = waits_on_device(scene, last_token_s=0.0)
    plan = schedule(scene.state, 0.5, make_policy())
    assert Displace(batch.id) in plan.moves


def test_nobody_moves_to_a_host_without_bandwidth_and_the_plan_says_so() -> None:
    scene = Scene()
    scene.decoding(20, last_token_s=0.0)
    for _ in range(4):
        scene.lane(20, in_flight=True)
    batch = waits_on_device(scene, last_token_s=0.0)
    plan = schedule(scene.state, 0.5, make_policy(ExactModel(host_row=0.1)))
    assert not any(isinstance(move, Displace) for move in plan.moves)
    assert plan.why is not None
    assert plan.why.left_out == (LeftOut(batch.id, "host_gains_nothing"),)


@pytest.mark.parametrize("host_offload", ["auto", "never"])
def test_what_the_host_could_not_take_anyway_waits_for_slack(host_offload: str) -> None:
    """None is set up, or it has no memory left: more bandwidth would not help."""
    scene = Scene(roomy(host_offload=host_offload, num_host_pages=8))
    scene.decoding(20, last_token_s=0.0)
    if host_offload == "auto":
        for _ in range(4):
            scene.lane(20, in_flight=True)
    batch = waits_on_device(scene, last_token_s=0.0)
    plan = schedule(scene.state, 0.5, make_policy(ExactModel(host_row=0.1)))
    assert plan.why is not None
    assert plan.why.left_out == (LeftOut(batch.id, "slack"),)


def test_a_lane_that_has_just_moved_stays() -> None:
    scene = Scene()
    scene.decoding(20, last_token_s=0.0)
    lane = scene.lane(20, out=9)
    lane.moved_at = lane.num_tokens - 1
    plan = schedule(scene.state, 0.0, make_policy())
    assert not any(isinstance(move, SwapIn) for move in plan.moves)
    lane.moved_at = lane.num_tokens - 8
    plan = schedule(scene.state, 0.0, make_policy())
    assert any(isinstance(move, SwapIn) for move in plan.moves)


def test_a_lane_comes_back_only_where_a_row_like_it_fits_twice() -> None:
    scene = Scene()
    scene.decoding(20, last_token_s=0.0)
    scene.lane(20)
    plan = schedule(scene.state, 0.088, make_policy())
    assert not any(isinstance(move, SwapIn) for move in plan.moves)


def displaced(plan: Plan) -> list[int]:
    return [move.request_id for move in plan.moves if isinstance(move, Displace)]


def test_what_has_just_come_back_makes_no_room_for_a_prompt() -> None:
    scene = Scene(roomy(num_device_pages=20))
    scene.decoding(40, out=9, best_effort=True)
    back = scene.decoding(40, out=9, best_effort=True)
    scene.waiting(180, best_effort=True)  # twelve pages: above the watermark there are eight
    back.moved_at = back.num_tokens - 7
    assert displaced(schedule(scene.state, 0.0, make_policy())) == [], "not the first in line for it either"
    back.moved_at = back.num_tokens - 8
    assert displaced(schedule(scene.state, 0.0, make_policy())) == [back.id]


def test_short_of_pages_those_go_first_that_have_stayed() -> None:
    scene = Scene(roomy(num_device_pages=12))
    scene.decoding(40, best_effort=True)
    stayed = scene.decoding(40, best_effort=True)
    back = scene.decoding(40, out=9, best_effort=True)  # 9 or 10 pages in all; the watermark is at 4
    back.moved_at = back.num_tokens - 7
    assert displaced(schedule(scene.state, 0.0, make_policy())) == [stayed.id]
    stayed.moved_at = stayed.num_tokens
    assert displaced(schedule(scene.state, 0.0, make_policy())) == [back.id], "the last in line"


def test_for_chat_whoever_is_last_in_line_goes_and_for_batch_who_has_stayed() -> None:
    def gives_way(best_effort: bool) -> int:
        scene = Scene(roomy(num_device_pages=11))
        asking = scene.decoding(48, best_effort=best_effort)
        stayed, back = (scene.mirrored(64, best_effort=True) for _ in range(2))
        back.moved_at = back.num_tokens - 7
        room = Room(scene.state)
        assert room.make_room(1, asking, only_best_effort=True)
        (request,) = room.displaced()
        return [stayed.id, back.id].index(request.id)

    assert gives_way(best_effort=False) == 1
    assert gives_way(best_effort=True) == 0


# ---------------------------------------------------------------- explanations


def test_a_plan_says_whose_target_is_the_tightest_and_what_it_expects() -> None:
    scene = Scene()
    scene.decoding(20, slo=SLO(1.0, 0.5))
    tight = scene.decoding(20, slo=SLO(1.0, 0.1))
    plan = schedule(scene.state, 0.02, make_policy())
    why = plan.why
    assert why is not None
    assert (why.tightest, why.slack_s) == (tight.id, pytest.approx(0.08))
    assert why.predicted_s == pytest.approx(0.012)
    assert why.budget_s == pytest.approx(0.08)


def test_nobody_with_targets_means_no_slack_to_tell() -> None:
    scene = Scene()
    scene.decoding(20, slo=None)
    plan = schedule(scene.state, 0.0, make_policy())
    assert plan.why is not None
    assert plan.why.slack_s is None


def test_scheduling_with_targets_changes_nothing() -> None:
    scene = Scene()
    scene.decoding(20)
    scene.prefilling(100, 40)
    scene.lane(20)
    scene.waiting(50, best_effort=True)
    policy = make_policy()
    assert schedule(scene.state, 0.01, policy) == schedule(scene.state, 0.01, policy)
    assert scene.state.in_phase(Phase.WAITING), "nobody started yet"
