"""What the engine tells of sharing: harvested tokens, what chats paid, slack, swaps, the oldest lane."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from engine.conftest import TinySubject
from engine.driver import BE, LS
from engine.scripted import ScriptedEngine
from omniserve.engine.history import History
from omniserve.engine.sharing import paid_s
from omniserve.policy.explanation import Explanation
from omniserve.policy.latency import WalkLoad
from omniserve.policy.latency_model import LatencyModel, load_of
from omniserve.policy.plan import DeviceRows, PageCopy, Plan, Step
from policy.latency_fits import small_fit

PROMPT = tuple(range(1, 20))
DECODE = DeviceRows(1, start=50, num_tokens=1, samples=True, is_prefill=False, pages=())
CHUNK = DeviceRows(2, start=0, num_tokens=16, samples=False, is_prefill=True, pages=())
WALK = Step(kind="walk", rows=(DECODE,))


def paid(step: Step, chats: tuple[DeviceRows, ...], lane_rows: int = 0, host_is_busy: float = 0.0) -> float:
    model = LatencyModel(small_fit())
    return paid_s(model, step, load_of(step, lane_rows), host_is_busy, chats)


# ---------------------------------------------------------------- what a walk costs chats


def test_a_chat_by_itself_pays_nothing() -> None:
    assert paid(WALK, (DECODE,)) == 0


def test_a_walk_without_chats_costs_no_chat_anything() -> None:
    assert paid(replace(WALK, rows=(CHUNK,)), (), lane_rows=9, host_is_busy=1.0) == 0


def test_chats_pay_for_each_thing_that_rides_along() -> None:
    model = LatencyModel(small_fit())
    alone_s = model.walk_s(load_of(WALK), 0.0)
    with_chunk = replace(WALK, rows=(DECODE, CHUNK))
    assert paid(with_chunk, (DECODE,)) == pytest.approx(model.walk_s(load_of(with_chunk), 0.0) - alone_s)
    copying = replace(WALK, copies_out=(PageCopy(0, 0, 0, 16, 0, ()),))
    assert paid(copying, (DECODE,)) == pytest.approx(16 * 0.01e-3)
    assert paid(WALK, (DECODE,), lane_rows=8) > 0
    beside_a_host_s = model.walk_s(load_of(WALK), 0.5)
    assert paid(WALK, (DECODE,), host_is_busy=0.5) == pytest.approx(beside_a_host_s - alone_s)


def test_a_model_that_finds_company_cheaper_pays_nobody() -> None:
    fit = small_fit()
    odd = LatencyModel(replace(fit, busy=fit.idle, idle=fit.busy))
    assert paid_s(odd, WALK, load_of(WALK), 1.0, (DECODE,)) == 0


# ---------------------------------------------------------------- slack


def explained(slack_s: float | None, latency_sensitive_s: float = 0.0) -> Plan:
    why = Explanation("omniserve", slack_s, None, None, latency_sensitive_s, 0.0, 0.0, 0.0, 0.0, WalkLoad())
    return Plan(kind="walk", why=why)


def test_slack_is_what_the_newest_plan_with_targets_left_beside_its_chats() -> None:
    history = History()
    assert history.slack_s() is None
    history.note_plan(0.0, explained(0.5, 0.1))
    history.note_plan(1.0, explained(0.05, 0.08))
    history.note_plan(2.0, explained(None))
    history.note_plan(3.0, Plan(kind="passes"))
    assert history.slack_s() == pytest.approx(-0.03), "chats alone take too long"


# ---------------------------------------------------------------- an engine


@pytest.fixture
def scripted(tiny_subject: TinySubject) -> Iterator[ScriptedEngine]:
    engine = ScriptedEngine(tiny_subject(), host_offload="always", enable_prefix_caching=False)
    yield engine
    engine.close()


def test_lane_tokens_are_harvested_and_chat_tokens_are_not(scripted: ScriptedEngine) -> None:
    scripted.engine.latency = LatencyModel(small_fit(num_layers=scripted.subject.decoder.num_layers))
    scripted.add(PROMPT, 12, LS)
    scripted.add(PROMPT, 5, BE)
    scripted.finish()
    stats = scripted.engine.stats()
    harvested = stats["harvested_lane_tokens"], stats["harvested_device_tokens"]
    assert sum(harvested) == 5
    assert harvested[0] == stats["num_lane_tokens"] > 0
    assert stats["device_tokens"] == 12 + harvested[1], "the first token of a batch text is the prefill's"
    assert stats["latency_sensitive_paid_s"] > 0


def test_an_uncalibrated_engine_does_not_know_what_chats_paid(scripted: ScriptedEngine) -> None:
    scripted.add(PROMPT, 3, LS)
    scripted.add(PROMPT, 3, BE)
    scripted.finish()
    stats = scripted.engine.stats()
    assert (stats["latency_sensitive_paid_s"], stats["slack_s"]) == (None, None)


def test_bytes_that_are_swapped_out_are_those_of_the_tokens_copied(scripted: ScriptedEngine) -> None:
    decoder = scripted.subject.decoder
    token_bytes = 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * 4
    assert scripted.engine.stats()["swap_out_bytes"] == 0
    scripted.add(PROMPT, 4, BE)
    scripted.finish()
    stats = scripted.engine.stats()
    assert stats["swap_out_bytes"] == len(PROMPT) * token_bytes
    assert stats["swap_in_bytes"] == 0


def test_a_lane_grows_old_while_its_host_is_silent(scripted: ScriptedEngine) -> None:
    clock = [100.0]
    scripted.engine._clock = lambda: clock[0]
    scripted.add(PROMPT, 4, BE)
    while not scripted.engine.stats()["requests"]["lane"]:
        scripted.host.serve_copies()
        scripted.step()
    assert scripted.engine.stats()["oldest_lane_s"] == 0
    clock[0] += 7.0
    assert scripted.engine.stats()["oldest_lane_s"] == 7.0
    scripted.finish()
    assert scripted.engine.stats()["oldest_lane_s"] == 0, "there are no lanes anymore"
