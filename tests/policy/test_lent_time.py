"""What chats ahead of their mean lend, to whom, and how far. The model: 9.5 ms a walk, 1 ms a row."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniserve.policy.latency import WalkLoad
from omniserve.policy.plan import Plan
from omniserve.policy.request import Request
from omniserve.policy.scheduler import schedule
from omniserve.types import SLO
from policy.exact import ExactModel, Scene, make_policy

NOW = 0.5
IN_TIME, LATE = SLO(9.0, 0.1), SLO(0.01, 0.1)
WIDE = {"max_num_batched_tokens": 1024}
# Half a row is over, so that no rounding decides.
EXACT = ExactModel(walk=0.0095)
BOUNDED = ExactModel(walk=0.0095, margin=0.25)


def chunks(plan: Plan) -> dict[int, int]:
    return {chunk.request_id: chunk.num_tokens for chunk in plan.chunks}


def chat(scene: Scene, in_hand_s: float, last_token_s: float = NOW) -> Request:
    """Decodes at 0.1 s a token, and could wait `in_hand_s` longer than that once: so says its mean."""
    first_s = last_token_s + in_hand_s - 9 * 0.1
    return scene.decoding(20, out=10, first_token_s=first_s, last_token_s=last_token_s)


def tokens_beside(in_hand_s: float, prompt: SLO, model: ExactModel) -> int:
    """Of a prompt, beside one chat that has so much in hand."""
    scene = Scene()
    chat(scene, in_hand_s)
    waiting = scene.waiting(500, slo=prompt, arrival_s=NOW)
    return chunks(schedule(scene.state, NOW, make_policy(model, **WIDE))).get(waiting.id, 0)


def test_a_chat_ahead_of_its_mean_has_walks_that_are_expected_to_take_its_gap() -> None:
    scene = Scene()
    chat(scene, in_hand_s=0.5)
    prompt = scene.waiting(500, slo=IN_TIME, arrival_s=NOW)
    plan = schedule(scene.state, NOW, make_policy(BOUNDED))
    assert chunks(plan) == {prompt.id: 89}
    assert plan.why is not None
    assert plan.why.predicted_s == pytest.approx(0.0995)
    assert plan.why.bound_s > 0.1, "the margin is lent"


def test_the_margin_is_lent_only_as_far_as_the_mean_allows() -> None:
    assert tokens_beside(0.01, IN_TIME, BOUNDED) == 77, "1.25 x 87.5 ms, of 110"


@pytest.mark.parametrize("prompt", [IN_TIME, LATE])
def test_a_chat_with_nothing_in_hand_lends_nothing(prompt: SLO) -> None:
    assert tokens_beside(0.0, prompt, BOUNDED) == 69, "1.25 x 79.5 ms, of its gap"


def test_a_prompt_that_would_be_late_has_up_to_four_gaps() -> None:
    assert tokens_beside(0.5, IN_TIME, EXACT) == 89
    assert tokens_beside(0.5, LATE, EXACT) == 389
    assert tokens_beside(0.2, LATE, EXACT) == 289, "no further than the mean allows"


@pytest.mark.parametrize(("in_hand_s", "walks"), [(0.0, 5), (0.3, 2)])
def test_admission_counts_on_what_is_lent(in_hand_s: float, walks: int) -> None:
    """400 tokens beside one chat, 89 of them in a gap of 0.1 s; with 0.3 s more for the first walk, two."""
    scene = Scene()
    chat(scene, in_hand_s)
    policy = make_policy(EXACT, **WIDE)
    late = policy.admit(scene.state, scene.newcomer(400, slo=SLO(0.01, 0.1), arrival_s=NOW), NOW)
    assert late.obstacle == "ttft"
    assert late.predicted_ttft_s == pytest.approx(walks * 0.0105 + 0.4, abs=walks * 0.001)
    target = SLO(0.44, 0.1)
    verdict = policy.admit(scene.state, scene.newcomer(400, slo=target, arrival_s=NOW), NOW)
    assert verdict.is_accepted == (in_hand_s > 0)


def test_what_a_late_prompt_is_lent_is_not_for_best_effort_work() -> None:
    scene = Scene()
    chat(scene, in_hand_s=0.5)
    prompt = scene.waiting(120, slo=LATE, arrival_s=NOW)
    scene.waiting(500, best_effort=True)
    plan = schedule(scene.state, NOW, make_policy(**WIDE))
    assert chunks(plan) == {prompt.id: 120}


def test_the_least_chunk_is_not_forced_on_a_chat_whose_mean_still_holds() -> None:
    """Decodes alone take longer than a gap, and no longer than what is in hand: a token more would."""
    slow = ExactModel(walk=0.15)
    assert tokens_beside(0.0515, LATE, slow) == 0
    assert tokens_beside(0.0525, LATE, slow) == 1
    assert tokens_beside(0.0505, LATE, slow) == 16, "the mean is lost already"


def test_a_plan_names_the_chat_that_ends_what_is_lent() -> None:
    scene = Scene()
    rich, poor = chat(scene, in_hand_s=1.0, last_token_s=NOW - 0.05), chat(scene, in_hand_s=0.0)
    in_time = schedule(scene.state, NOW, make_policy())
    scene.waiting(500, slo=LATE, arrival_s=NOW)
    late = schedule(scene.state, NOW, make_policy())
    assert in_time.why is not None
    assert late.why is not None
    assert (in_time.why.tightest, late.why.tightest) == (rich.id, poor.id)
    assert (in_time.why.slack_s, late.why.slack_s) == (pytest.approx(0.05), pytest.approx(0.1))


@given(
    chats=st.lists(st.tuples(st.floats(0.0, 0.3), st.floats(0.0, 0.15)), min_size=1, max_size=4),
    prompt=st.sampled_from([IN_TIME, LATE]),
    model=st.builds(
        ExactModel, walk=st.floats(0.001, 0.2), row=st.floats(0.0001, 0.002), margin=st.floats(0.0, 0.5)
    ),
)
def test_no_chunk_breaks_a_mean_that_decodes_alone_would_keep(
    chats: list[tuple[float, float]], prompt: SLO, model: ExactModel
) -> None:
    """chats: seconds in hand, and since the last token."""
    scene = Scene()
    decoding = [chat(scene, in_hand_s, NOW - since_s) for in_hand_s, since_s in chats]
    scene.waiting(500, slo=prompt, arrival_s=NOW)
    plan = schedule(scene.state, NOW, make_policy(model))
    why, alone = plan.why, WalkLoad()
    assert why is not None
    assert why.slack_s is not None
    for request in decoding:
        alone.add_decode(request.kv_tokens + 1)
    if model.bound_s(alone, 0.0) > why.slack_s:
        return
    ends_s = NOW + why.bound_s
    for request in decoding:
        assert request.first_token_s is not None
        assert ends_s <= request.first_token_s + request.num_out * 0.1 + 1e-9
