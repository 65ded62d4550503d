"""What best-effort uses are worth, and what follows from it. The model: 10 ms a walk, 1 ms a row."""

from __future__ import annotations

import pytest

from omniserve.policy.scheduler import schedule
from omniserve.policy.state import State
from policy.exact import ExactModel, Scene, make_policy, roomy

# Beside one chat a walk has room for 89.5 rows of 1 ms.
HALF_A_ROW_OVER = ExactModel(walk=0.0095)


def values(state: State, model: ExactModel | None = None, **terms: float) -> dict[str, float]:
    """Tokens per second of each use, the best first."""
    plan = schedule(state, 0.0, make_policy(model, **terms))
    assert plan.why is not None
    return dict(plan.why.values)


def test_long_answers_make_prefill_worth_more_than_decode() -> None:
    scene = Scene()
    scene.decoding(20)
    scene.decoding(20, best_effort=True)
    scene.waiting(100, best_effort=True)  # 200 tokens may follow from 100
    names = list(values(scene.state))
    assert names.index("prefill") < names.index("decode")


def test_long_prompts_with_short_answers_wait_behind_decode() -> None:
    scene = Scene()
    scene.decoding(20)
    batch = scene.decoding(20, best_effort=True)
    scene.waiting(2000, best_effort=True)
    plan = schedule(scene.state, 0.0, make_policy())
    assert plan.why is not None
    names = [name for name, _ in plan.why.values]
    assert names.index("decode") < names.index("prefill")
    assert batch.id in plan.decodes


def test_prefill_is_worth_nothing_once_host_and_device_are_full() -> None:
    scene = Scene(roomy(max_lanes=2, num_device_pages=15))
    scene.decoding(20)
    for _ in range(2):
        scene.lane(20, in_flight=True)
    scene.decoding(9 * 16, best_effort=True)
    scene.waiting(8, best_effort=True)
    assert values(scene.state)["prefill"] == 0.0


def test_room_on_the_device_is_no_room_for_batch_that_must_decode_on_the_host() -> None:
    for mode, is_worth_something in (("auto", True), ("always", False)):
        scene = Scene(roomy(max_lanes=2, host_offload=mode))
        scene.decoding(20)
        for _ in range(2):
            scene.lane(20, in_flight=True)
        scene.waiting(8, best_effort=True)
        assert (values(scene.state)["prefill"] > 0) == is_worth_something


def test_lanes_get_their_part_before_uses_worth_less() -> None:
    scene = Scene()
    scene.decoding(20)
    for _ in range(8):
        scene.lane(20)
    scene.waiting(2000, best_effort=True)
    plan = schedule(scene.state, 0.0, make_policy())
    assert sum(chunk.num_tokens for chunk in plan.chunks) < 89
    assert len(plan.lane_starts) + sum(plan.lane_cap) >= 8


# ---------------------------------------------------------------- rows for those who decode later


def test_prefill_is_worth_nothing_once_decoders_fill_the_rows_and_something_when_one_ends() -> None:
    scene = Scene()
    scene.decoding(20)
    decoders = [scene.decoding(20, best_effort=True) for _ in range(90)]
    scene.waiting(100, best_effort=True)
    assert values(scene.state, HALF_A_ROW_OVER)["prefill"] == 0.0
    scene.state.abort(decoders[0].id)
    assert values(scene.state, HALF_A_ROW_OVER)["prefill"] > 0.0


def test_prefill_is_worth_less_the_fewer_rows_its_decodes_will_find() -> None:
    worth = []
    for num_decoders in (40, 80):
        scene = Scene()
        scene.decoding(20)
        for _ in range(num_decoders):
            scene.decoding(20, best_effort=True)
        scene.waiting(100, best_effort=True)
        worth.append(values(scene.state, HALF_A_ROW_OVER)["prefill"])
    assert worth[1] / worth[0] == pytest.approx((89.5 - 80) / (89.5 - 40))


@pytest.mark.parametrize(("rows_per_walk", "is_worth_something"), [(170, True), (180, False)])
def test_tokens_of_lanes_fill_rows_as_decodes_do(rows_per_walk: int, is_worth_something: bool) -> None:
    """Two layers: two lane rows of half a millisecond each are a token."""
    scene = Scene()
    scene.decoding(20)
    scene.lane(20)
    scene.waiting(100, best_effort=True)
    scene.state.lane_rows_per_walk = rows_per_walk
    found = values(scene.state, HALF_A_ROW_OVER, max_lane_rows=100)
    assert (found["prefill"] > 0.0) == is_worth_something


def test_prefill_is_worth_nothing_in_a_walk_that_has_no_time_for_best_effort_work() -> None:
    scene = Scene()
    scene.decoding(20, last_token_s=-1.0)
    scene.waiting(100, best_effort=True)
    assert values(scene.state)["prefill"] == 0.0
