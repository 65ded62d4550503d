"""Admission at arrival, as stories. The model: 10 ms a walk, 1 ms a row; targets: 1 s and 100 ms."""

from __future__ import annotations

from dataclasses import replace

import pytest

from omniserve.policy.admission import Admission, admit
from omniserve.policy.forecast import forecast, prompt_of
from omniserve.policy.latency import WalkLoad
from omniserve.policy.request import Request
from omniserve.types import SLO
from policy.exact import CHAT, ExactModel, Scene, make_terms, roomy


def verdict(scene: Scene, request: Request, now: float = 0.0, **terms: float) -> Admission:
    return admit(scene.state, request, now, ExactModel(), make_terms(**terms))


def test_an_idle_engine_admits_and_says_when_the_first_token_comes() -> None:
    scene = Scene()
    found = verdict(scene, scene.newcomer(200))
    assert found.is_accepted
    assert found.predicted_ttft_s == pytest.approx(0.21)
    assert found.target_ttft_s == 1.0


def test_a_request_without_targets_is_always_admitted() -> None:
    scene = Scene()
    assert verdict(scene, scene.newcomer(100_000, slo=None)) == Admission()


def test_time_already_waited_counts() -> None:
    scene = Scene()
    assert verdict(scene, scene.newcomer(200), now=0.7).is_accepted
    late = verdict(scene, scene.newcomer(200), now=0.8)
    assert late.obstacle == "ttft"
    assert late.predicted_ttft_s == pytest.approx(1.01)


def test_prefill_that_is_due_earlier_counts_and_later_due_does_not() -> None:
    scene = Scene()
    scene.waiting(240, slo=SLO(9.0, 0.1))
    assert verdict(scene, scene.newcomer(200)).is_accepted, "it goes first"
    scene.waiting(1000, arrival_s=-0.5)
    assert verdict(scene, scene.newcomer(200)).obstacle == "ttft"


def test_the_chunking_that_running_decodes_force_is_counted() -> None:
    scene = Scene()
    request = scene.newcomer(640)
    alone = verdict(scene, request)
    scene.decoding(20)
    beside = verdict(scene, request)
    # At most 256 rows a walk: 3 walks. Beside a decode, 89 tokens of 640 a walk: 8 walks.
    assert alone.predicted_ttft_s == pytest.approx(3 * 0.010 + 0.640, abs=0.003)
    assert beside.predicted_ttft_s == pytest.approx(8 * 0.011 + 0.640, abs=0.001)


def test_decodes_that_leave_no_room_for_prefill_mean_no() -> None:
    scene = Scene()
    for _ in range(90):
        scene.decoding(20)
    found = verdict(scene, scene.newcomer(10))
    assert found.obstacle == "tpot"
    assert found.predicted_ttft_s is not None


def test_the_walks_of_a_prompt_keep_the_targets_of_others_in_the_mean() -> None:
    """With a margin of a quarter: 90 rows a walk, not 70. What is given to best-effort work is bounded."""
    scene = Scene()
    scene.decoding(20)
    model = ExactModel(margin=0.25)
    found = admit(scene.state, scene.newcomer(445), 0.0, model, make_terms())
    assert found.predicted_ttft_s == pytest.approx(5 * 0.011 + 0.445 + 0.25 * 0.1, abs=0.001)
    prompts = [prompt_of(scene.state, scene.newcomer(445))]
    decodes = WalkLoad()
    decodes.add_decode(20)
    bounded = forecast(model, decodes, prompts, tpot_s=0.1, max_tokens=256)
    assert bounded.finish_s[0] == pytest.approx(7 * 0.011 + 0.445 + 0.25 * 0.0746, abs=0.004)


def test_one_more_decode_that_would_slow_down_all_of_them_is_refused() -> None:
    scene = Scene()
    for _ in range(88):
        scene.decoding(20)
    assert verdict(scene, scene.newcomer(1, slo=SLO(5.0, 0.1))).is_accepted
    scene.decoding(20)
    scene.decoding(20)
    assert verdict(scene, scene.newcomer(1, slo=SLO(5.0, 0.1))).obstacle == "tpot"


def test_a_newcomer_may_not_make_those_behind_it_late() -> None:
    scene = Scene()
    scene.waiting(700, slo=SLO(1.0, 0.1))
    urgent = scene.newcomer(250, slo=SLO(0.4, 0.1))
    found = verdict(scene, urgent)
    assert found.obstacle == "others"
    assert found.predicted_ttft_s is not None
    assert found.predicted_ttft_s < 0.4, "its own target would hold"


def test_who_is_late_anyway_keeps_nobody_out() -> None:
    scene = Scene()
    scene.waiting(5000, slo=SLO(1.0, 0.1))
    assert verdict(scene, scene.newcomer(250, slo=SLO(0.4, 0.1))).is_accepted


def test_memory_that_running_chats_will_need_is_counted() -> None:
    scene = Scene(roomy(num_device_pages=40))  # 640 tokens; every text may grow by 200
    scene.decoding(100)
    assert verdict(scene, scene.newcomer(100)).is_accepted
    scene.decoding(100)
    assert verdict(scene, scene.newcomer(100)).obstacle == "memory"


def test_memory_is_that_of_the_chats_that_are_there_at_the_same_time() -> None:
    """One chat ends soon; the newcomer will need its last pages only then."""
    scene = Scene(roomy(num_device_pages=40))  # 640 tokens
    scene.decoding(100, out=190)  # ten more tokens: 300
    scene.decoding(100)  # 300 at its end
    assert verdict(scene, scene.newcomer(100)).is_accepted, "600 when the first one ends, 600 at the end"


def test_a_chat_that_outlived_what_was_expected_is_not_taken_for_gone() -> None:
    """It may go on, for half a usual text as far as anybody knows."""
    scene = Scene(roomy(num_device_pages=40))
    done = scene.newcomer(20)
    done.num_tokens += 100  # usual: 100 tokens
    scene.state.lengths.add(done)
    scene.decoding(100, out=150)  # 250 tokens, 300 with half a usual text
    assert verdict(scene, scene.newcomer(240)).is_accepted, "590 tokens when the old one ends"
    assert verdict(scene, scene.newcomer(290)).obstacle == "memory"


def test_there_must_be_a_row_for_every_chat() -> None:
    for limits, terms in ((roomy(max_num_seqs=3), {}), (roomy(), {"max_num_batched_tokens": 3})):
        scene = Scene(limits)
        scene.decoding(20)
        scene.waiting(5)
        scene.decoding(20, best_effort=True)  # it would give way
        assert verdict(scene, scene.newcomer(5), **terms).is_accepted
        scene.prefilling(5, 2)
        assert verdict(scene, scene.newcomer(5), **terms).obstacle == "rows"


def test_what_is_cached_of_a_prompt_needs_no_time() -> None:
    scene = Scene()
    before = scene.decoding(160)
    for page, page_hash in zip(before.device_pages, range(10), strict=False):
        scene.state.device.register(page, bytes([page_hash]))
    request = scene.newcomer(200, slo=SLO(1.0, 1.0))
    cold = verdict(scene, request).predicted_ttft_s
    request.device_hashes = [bytes([page_hash]) for page_hash in range(12)]
    cached = verdict(scene, request).predicted_ttft_s
    assert cold is not None
    assert cached == pytest.approx(0.011 + 0.040), "ten pages of 16 tokens are there"
    assert cold > 0.2


def test_the_verdict_has_the_tpot_of_everybody_and_the_tightest_target() -> None:
    scene = Scene()
    for _ in range(95):
        scene.decoding(20)
    found = verdict(scene, scene.newcomer(1, slo=SLO(5.0, 0.2)))
    assert found.obstacle == "tpot"
    assert (found.predicted_tpot_s, found.target_tpot_s) == (pytest.approx(0.106), 0.1)


def test_batch_work_in_memory_keeps_no_chat_out() -> None:
    scene = Scene(roomy(num_device_pages=40))
    scene.decoding(500, best_effort=True)
    assert verdict(scene, scene.newcomer(100)).is_accepted


def test_a_busy_host_refuses_no_chat_that_an_idle_one_would_admit() -> None:
    """Lanes give way to chat, and then the host has nothing to do."""
    model = ExactModel(host_slowdown=1.0, host_share=1.0)
    beside_lanes, alone = Scene(), Scene()
    for _ in range(4):
        beside_lanes.lane(20, in_flight=True)
    found = []
    for scene in (beside_lanes, alone):
        for _ in range(50):
            scene.decoding(20)
        request = scene.newcomer(250, slo=SLO(0.9, 0.1))
        found.append(admit(scene.state, request, 0.0, model, make_terms()))
    assert found[0] == found[1]
    assert found[0].is_accepted


def test_a_share_kept_for_best_effort_work_stretches_the_forecast() -> None:
    scene = Scene()
    request = scene.newcomer(200)
    found = verdict(scene, request, best_effort_share=0.5)
    assert found.predicted_ttft_s == pytest.approx(0.42)


def test_a_forecast_tells_each_prompt_its_own_end() -> None:
    scene = Scene()
    pending = [scene.waiting(50), scene.waiting(50), scene.waiting(100)]
    prompts = [prompt_of(scene.state, request) for request in pending]
    ahead = forecast(ExactModel(), WalkLoad(), prompts, tpot_s=0.11, max_tokens=1000)
    # Two walks of 100 tokens.
    assert ahead.is_possible
    assert ahead.finish_s == pytest.approx((0.11, 0.11, 0.22))


def test_a_forecast_counts_chunks_logits_and_the_earlier_kv_of_prompts_that_go_on() -> None:
    scene = Scene()
    pending = [scene.prefilling(50, 20), scene.prefilling(60, 30), scene.waiting(100)]
    model = ExactModel(walk=0.0, row=0.0, sample=0.001, chunk=0.01, context_read=0.0001)
    prompts = [prompt_of(scene.state, request) for request in pending]
    ahead = forecast(model, WalkLoad(), prompts, tpot_s=9.0, max_tokens=1000)
    assert ahead.finish_s[-1] == pytest.approx(3 * 0.001 + 3 * 0.01 + (50 + 60) * 0.0001)


def test_a_tighter_target_is_never_admitted_where_a_looser_one_is_not() -> None:
    scene = Scene()
    for _ in range(30):
        scene.decoding(20)
    scene.waiting(300)
    answers = [
        verdict(scene, scene.newcomer(200, slo=replace(CHAT, ttft_s=ttft_s))).is_accepted
        for ttft_s in (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
    ]
    assert answers == sorted(answers)


@pytest.mark.parametrize("last_walk_s", [None, -11.0])
def test_an_idle_engine_tries_what_an_old_prediction_forbids(last_walk_s: float | None) -> None:
    """Refusals make no walks, and only walks correct predictions: it would refuse for ever."""
    by_ttft, by_tpot = SLO(0.2, 0.1), SLO(5.0, 0.006)
    for slo, within_doubt in ((by_ttft, 200), (by_tpot, 1)):
        scene = Scene()
        assert not verdict(scene, scene.newcomer(within_doubt, slo=slo)).is_accepted, "fresh"
        scene.state.last_walk_s = last_walk_s
        assert verdict(scene, scene.newcomer(within_doubt, slo=slo)).is_accepted
        scene.waiting(1, best_effort=True)
        assert not verdict(scene, scene.newcomer(within_doubt, slo=slo)).is_accepted, "batch work will tell"


def test_the_older_a_prediction_the_more_it_is_doubted() -> None:
    scene = Scene()
    slow = scene.newcomer(100, slo=SLO(0.03, 0.1))  # predicted: 0.11 s
    assert not verdict(scene, slow, now=0.0).is_accepted
    for idle_s, is_accepted in ((9.0, False), (11.0, False), (21.0, True)):
        late = scene.newcomer(100, slo=SLO(0.03, 0.1), arrival_s=idle_s)
        assert verdict(scene, late, now=idle_s).is_accepted == is_accepted


def test_what_is_far_from_its_target_is_refused_by_an_old_prediction_too() -> None:
    scene = Scene()
    scene.state.last_walk_s = None
    assert verdict(scene, scene.newcomer(500, slo=SLO(0.2, 0.1))).obstacle == "ttft"
    assert verdict(scene, scene.newcomer(1, slo=SLO(5.0, 0.005))).obstacle == "tpot"
