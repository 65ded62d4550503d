"""What is kept for chats that are not here yet.

The model: 10 ms a walk, 1 ms a row; targets: 1 s and 100 ms; no walk with batch work is longer than 250 ms.
"""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniserve.policy.arrivals import DEVIATIONS, MEMORY_S, Arrivals
from omniserve.policy.explanation import Explanation
from omniserve.policy.plan import Plan
from omniserve.policy.request import Request
from omniserve.policy.scheduler import schedule
from omniserve.types import SLO
from policy.exact import CHAT, Scene, make_policy, roomy


def chat(num_prompt: int, at_s: float, slo: SLO | None = CHAT, name: str = "chat", rank: int = 0) -> Request:
    return Request(0, rank, False, num_prompt, 200, num_prompt, service_class=name, slo=slo, arrival_s=at_s)


def seen(rate: float, num_prompt: int = 100, slo: SLO | None = CHAT, until_s: float = 0.0) -> Arrivals:
    """So many arrivals a second, all alike and evenly spread, for as long as anybody remembers."""
    arrivals = Arrivals()
    count = round(10 * MEMORY_S * rate)
    for i in range(count):
        at_s = until_s - (count - 1 - i) / rate
        arrivals.note(chat(num_prompt, at_s, slo), at_s, num_prompt)
    return arrivals


def scene_expecting(rate: float, num_prompt: int = 100, **limits: object) -> Scene:
    scene = Scene(roomy(**limits))
    scene.state.arrivals = seen(rate, num_prompt)
    return scene


def why(plan: Plan) -> Explanation:
    assert plan.why is not None
    return plan.why


# ---------------------------------------------------------------- what is likely to come


def test_what_comes_within_a_ttft_is_the_mean_and_deviations_of_a_poisson_stream() -> None:
    (group,) = seen(rate=4.0, num_prompt=100).newcomers(0.0)
    assert DEVIATIONS == 1.5
    assert group.num_tokens == pytest.approx(100 * (4 + 1.5 * math.sqrt(4)), rel=0.01)
    assert group.count == 8, "the last of them a part"
    assert (group.slo.ttft_s, group.slo.tpot_s) == pytest.approx((1.0, 0.1))


def test_unequal_prompts_ask_for_more_room_than_equal_ones() -> None:
    equal, unequal = Arrivals(), Arrivals()
    for i in range(2000):
        at_s = i * 0.25
        equal.note(chat(100, at_s), at_s, 100)
        unequal.note(chat(190 if i % 2 else 10, at_s), at_s, 190 if i % 2 else 10)
    (of_equal,), (of_unequal,) = equal.newcomers(500.0), unequal.newcomers(500.0)
    assert of_unequal.num_tokens > 1.1 * of_equal.num_tokens


@pytest.mark.parametrize("rate", [0.1, 0.5, 2.0, 10.0])
def test_a_burst_as_large_as_foreseen_is_seldom_exceeded(rate: float) -> None:
    """Real Poisson arrivals with prompts of very unequal lengths: what then comes within a TTFT."""
    rng, arrivals, now = random.Random(1), Arrivals(), 0.0
    came: list[tuple[float, int]] = []
    for _ in range(4000):
        now += rng.expovariate(rate)
        came.append((now, min(1000, round(rng.lognormvariate(4.0, 1.0)))))
    exceeded = windows = at = 0
    for start in range(0, 4000, 4):
        begin_s = came[start][0] + 0.001
        while at <= start:
            arrivals.note(chat(came[at][1], came[at][0]), *came[at])
            at += 1
        if start < 400:
            continue
        (group,) = arrivals.newcomers(begin_s)
        windows += 1
        exceeded += sum(n for t, n in came if begin_s < t <= begin_s + CHAT.ttft_s) > group.num_tokens
    assert exceeded / windows < 0.15, "deviations of a skewed sum"


def test_who_stays_away_is_no_longer_expected() -> None:
    arrivals = seen(rate=1.0)
    now, later = ((next(arrivals.newcomers(t), None)) for t in (0.0, MEMORY_S))
    assert now is not None
    assert later is not None
    assert later.num_tokens < now.num_tokens
    assert not list(arrivals.newcomers(20 * MEMORY_S))


def test_nobody_is_expected_at_first_and_without_targets() -> None:
    assert not list(Arrivals().newcomers(0.0))
    assert not list(seen(rate=4.0, slo=None).newcomers(0.0))


def test_a_refused_arrival_of_unknown_length_counts_as_a_usual_one() -> None:
    arrivals = seen(rate=1.0, num_prompt=100)
    (before,) = arrivals.newcomers(0.0)
    for _ in range(20):
        arrivals.note(chat(1, 0.0), 0.0, None)
    (after,) = arrivals.newcomers(0.0)
    assert after.num_tokens > before.num_tokens
    assert after.num_tokens <= 100 * after.count < after.num_tokens + 100, "the last of them a part"


def test_where_little_comes_the_next_prompt_is_expected_whole() -> None:
    (group,) = seen(rate=0.05, num_prompt=100).newcomers(0.0)
    assert (group.count, group.num_tokens) == (1, 100)


def test_each_class_is_expected_by_its_own_targets() -> None:
    arrivals = Arrivals()
    for i in range(2000):
        arrivals.note(chat(100, i * 0.25), i * 0.25, 100)
        arrivals.note(chat(50, i * 0.25, SLO(4.0, 0.4), "slow", 1), i * 0.25, 50)
    fast, slow = arrivals.newcomers(500.0)
    assert fast.service_class == "chat"
    assert fast.slo.ttft_s == pytest.approx(1.0)
    assert slow.slo.ttft_s == pytest.approx(4.0)
    assert slow.num_tokens > fast.num_tokens, "half as long, and four times the time for more to come"


# ---------------------------------------------------------------- what is kept for them


def batch_tokens(scene: Scene, **terms: float) -> tuple[int, Explanation]:
    """Of a batch prompt, beside what the scene holds."""
    batch = scene.waiting(500, best_effort=True)
    plan = schedule(scene.state, 0.0, make_policy(**terms))
    return sum(c.num_tokens for c in plan.chunks if c.request_id == batch.id), why(plan)


def test_with_time_for_all_who_may_come_batch_work_has_what_targets_leave() -> None:
    kept, free = scene_expecting(2.0), Scene()
    for scene in (kept, free):
        scene.decoding(20)
    assert batch_tokens(kept)[0] == batch_tokens(free)[0] == 89


def test_batch_work_stands_back_when_a_likely_burst_could_not_be_borne() -> None:
    """600 tokens may come, and beside 60 chats a walk has room for 25 of them: two seconds and more."""
    scene = scene_expecting(2.0, num_prompt=125)
    for _ in range(60):
        scene.decoding(20)
    tokens, explanation = batch_tokens(scene)
    assert tokens == 0
    assert explanation.newcomers_spare_s == 0.0
    assert [left.reason for left in explanation.left_out] == ["slack"]


def test_batch_work_has_no_more_of_a_walk_than_newcomers_can_spare() -> None:
    kept, free = scene_expecting(3.5), Scene()
    for scene in (kept, free):
        for _ in range(25):
            scene.decoding(20)
    (tokens, explanation), (unbounded, _) = batch_tokens(kept), batch_tokens(free)
    spare_s = explanation.newcomers_spare_s
    assert spare_s is not None
    assert 0 < tokens <= spare_s / 0.001 + 1e-6
    assert tokens < unbounded


def test_an_impossible_target_of_one_class_leaves_the_others_their_room() -> None:
    scene = scene_expecting(2.0, num_prompt=125)
    for _ in range(60):
        scene.decoding(20)
    for _ in range(10):
        scene.state.arrivals.note(chat(10, 0.0, SLO(1.0, 0.001), "hasty"), 0.0, 10)
    assert batch_tokens(scene)[1].newcomers_spare_s == 0.0


def test_room_in_memory_is_kept_too() -> None:
    """Two newcomers take 46 pages, to their ends; each of the chats that are here 14."""
    for num_pages, is_kept_free in ((60, True), (4000, False)):
        scene = scene_expecting(2.0, num_device_pages=num_pages)
        for _ in range(2):
            scene.decoding(20)
        spare_s = batch_tokens(scene)[1].newcomers_spare_s
        assert spare_s is not None
        assert (spare_s == 0.0) == is_kept_free


def test_the_guaranteed_share_is_had_whoever_may_come() -> None:
    scene = scene_expecting(2.0, num_prompt=125)
    for _ in range(60):
        scene.decoding(20)
    scene.state.best_effort_debt_s = 0.02
    assert batch_tokens(scene, best_effort_share=0.1)[0] == 20


def test_what_running_chats_have_in_hand_is_not_counted_on() -> None:
    """It stays for a prompt that is here and late."""
    spares = []
    for first_token_s in (-1.0, -0.1):  # behind their mean, and 0.9 s ahead of it
        scene = scene_expecting(3.0)
        for _ in range(25):
            scene.decoding(20, out=10, first_token_s=first_token_s, last_token_s=0.0)
        spares.append(batch_tokens(scene)[1].newcomers_spare_s)
    assert spares[0] == spares[1]
    assert spares[0] is not None


@given(rate=st.floats(0.01, 50.0), num_prompt=st.integers(1, 2000), is_known=st.booleans())
def test_an_idle_device_is_batch_works_whoever_may_come(rate: float, num_prompt: int, is_known: bool) -> None:
    """A burst that not even such a device could serve is no reason to leave it idle."""
    scene = scene_expecting(rate, num_prompt)
    if is_known:
        done = chat(num_prompt, 0.0)
        done.num_tokens += 50
        scene.state.lengths.add(done)
    assert batch_tokens(scene)[0] == batch_tokens(Scene())[0] == 240


@pytest.mark.parametrize("num_chats", [0, 10, 30])
def test_more_arrivals_never_give_batch_work_more(num_chats: int) -> None:
    """Nor does a storm of them, of which most would be refused."""
    tokens = []
    for rate in (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0):
        scene = scene_expecting(rate)
        for _ in range(num_chats):
            scene.decoding(20)
        tokens.append(batch_tokens(scene)[0])
    slack = 12  # what rounding to whole prompts and walks may give back
    assert all(later <= earlier + slack for earlier, later in pairwise(tokens))
