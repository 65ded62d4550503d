"""What admission learns from those it admitted."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from omniserve.policy.admission import admit
from omniserve.policy.plan import NewToken, StepResult
from omniserve.policy.promises import LEAST_TPOT, LEAST_TTFT, MEMORY_S, MISSES, MOST, Caution, Promises
from omniserve.policy.scheduler import schedule
from omniserve.types import SLO
from policy.exact import ExactModel, Scene, make_policy, make_terms


def test_who_is_in_time_is_trusted_a_little_more_and_who_misses_much_less() -> None:
    caution = Caution(LEAST_TTFT)
    caution.note(False, 0.0)
    assert LEAST_TTFT < caution.factor(0.0) < 1.0
    caution.note(True, 0.0)
    assert caution.factor(0.0) > 1.04


@pytest.mark.parametrize(("is_missed", "limit"), [(True, MOST), (False, LEAST_TTFT)])
def test_doubt_and_trust_have_limits(is_missed: bool, limit: float) -> None:
    caution = Caution(LEAST_TTFT)
    for _ in range(1000):
        caution.note(is_missed, 0.0)
    assert caution.factor(0.0) == limit


def test_what_was_long_ago_is_forgotten() -> None:
    caution = Caution(LEAST_TTFT)
    for _ in range(4):
        caution.note(True, 0.0)
    assert caution.factor(0.0) == pytest.approx(1.196)
    assert caution.factor(MEMORY_S) == pytest.approx(1 + 0.196 / 2.718, abs=1e-3)
    assert caution.factor(30 * MEMORY_S) == pytest.approx(1.0)


def test_under_overload_few_of_those_admitted_are_late() -> None:
    """All who come are near their target, and predictions are off by a fifth either way: taken at their word
    a fifth of those admitted would miss."""
    rng, caution, now = random.Random(0), Caution(LEAST_TTFT), 0.0
    admitted = late = 0
    for _ in range(4000):
        now += 0.1
        predicted_s = rng.uniform(0.7, 1.1)
        if predicted_s * caution.factor(now) > 1.0:
            continue
        is_late = predicted_s * rng.uniform(0.8, 1.2) > 1.0
        caution.note(is_late, now)
        admitted, late = admitted + 1, late + is_late
    assert admitted > 1000
    assert MISSES / 2 < late / admitted < 2.5 * MISSES


def test_misses_of_those_admitted_make_the_next_forecast_longer() -> None:
    scene = Scene()
    request = scene.newcomer(200)
    before = admit(scene.state, request, 0.0, ExactModel(), make_terms())
    scene.state.promises.ttft.note(True, 0.0)
    after = admit(scene.state, request, 0.0, ExactModel(), make_terms())
    assert before.predicted_ttft_s == pytest.approx(0.21)
    assert after.predicted_ttft_s == pytest.approx(0.21 * 1.049)


def test_a_decode_at_its_expected_pace_is_admitted_until_others_have_missed_theirs() -> None:
    """A TPOT is a mean: the margin of a walk is no reason to refuse, what became of others is."""
    scene, model = Scene(), ExactModel(margin=0.5)
    for _ in range(80):
        scene.decoding(20)
    request = scene.newcomer(2, SLO(5.0, 0.1))
    assert admit(scene.state, request, 0.0, model, make_terms()).is_accepted, "91 ms expected, 136 at most"
    for _ in range(3):
        scene.state.promises.tpot.note(True, 0.0)
    assert admit(scene.state, request, 0.0, model, make_terms()).obstacle == "tpot"


def test_first_tokens_and_ends_of_chats_are_noted_when_they_come() -> None:
    scene = Scene()
    chat = scene.waiting(10)
    state, policy, now = scene.state, make_policy(), 2.0  # due at 1.0
    for step_s, is_last in ((0.05, False), (0.3, True)):
        step = state.commit(schedule(state, now, policy), now)
        now += step_s
        token = NewToken(chat.id, 1, False, "length" if is_last else None)
        state.apply(step, StepResult((token,), (), (), (), 0), now)
    assert state.promises.ttft.factor(now) > 1.0, "it was late"
    assert state.promises.tpot.factor(now) > 1.0, "300 ms, and 100 allowed"


def test_a_text_of_one_token_and_one_without_targets_tell_nothing() -> None:
    promises, scene = Promises(), Scene()
    single = scene.decoding(10, out=1)
    promises.note_end(single, 99.0)
    free = replace(single, slo=None)
    promises.note_first_token(free, 99.0)
    promises.note_end(free, 99.0)
    assert (promises.ttft.factor(99.0), promises.tpot.factor(99.0)) == (1.0, LEAST_TPOT)
