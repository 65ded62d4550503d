"""Targets from the API to the plan and back: refusals, explanations, arrival. The model is a formula."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import count
from typing import Any

import pytest

from engine.conftest import TinySubject
from engine.driver import BE, LS, Arrival, assert_exact, build_engine, run
from omniserve.config import EngineConfig
from omniserve.engine.client import _refusal
from omniserve.engine.loop import Engine
from omniserve.engine.messages import (
    Add,
    AskAdmission,
    AskExplanations,
    MessageBuffer,
    from_engine_decoder,
    pack,
)
from omniserve.engine.process import Channel, EngineLoop
from omniserve.engine.refusal import refusal_text
from omniserve.errors import RequestError, SloUnattainableError
from omniserve.policy.admission import Admission, Obstacle
from omniserve.policy.latency import WalkLoad
from omniserve.types import BEST_EFFORT, LATENCY_SENSITIVE, SLO, SamplingParams
from policy.exact import ExactModel

TARGETS = SLO(ttft_s=5.0, tpot_s=1.0)
CLASSES = (replace(LATENCY_SENSITIVE, slo=TARGETS, tightest=SLO(0.01, 0.01)), BEST_EFFORT)
GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def engine(tiny_subject: TinySubject) -> Iterator[Engine]:
    yield from engines(tiny_subject)


def engines(tiny_subject: TinySubject, **config: Any) -> Iterator[Engine]:
    settings = EngineConfig(classes=CLASSES, host_offload="never", max_num_batched_tokens=64, **config)
    engine = build_engine(tiny_subject(), settings, latency=ExactModel())
    engine._clock = Clock()
    yield engine
    engine.close()


def finish(engine: Engine) -> dict[int, int]:
    """Tokens by request."""
    counts: dict[int, int] = {}
    while not engine.is_idle:
        for token in engine.step().tokens:
            counts[token.request_id] = counts.get(token.request_id, 0) + 1
    return counts


def test_both_classes_finish_under_targets(engine: Engine) -> None:
    chat = engine.add(list(range(1, 40)), GREEDY, LS)
    batch = engine.add(list(range(1, 30)), GREEDY, BE)
    assert finish(engine) == {chat: 4, batch: 4}
    assert engine.stats()["promises_slo"] is True


@pytest.mark.parametrize("mode", ["auto", "always"])
def test_tokens_under_targets_are_the_references_with_lanes_too(tiny_subject: TinySubject, mode: str) -> None:
    """Little slack, so that budgets cut chunks, leave rows out and cap lanes."""
    subject = tiny_subject()
    model = ExactModel(walk=0.002, row=0.0005, lane_row=0.0002, host_row=1e-5)
    slo = SLO(ttft_s=2.0, tpot_s=0.01)
    config = EngineConfig(
        classes=(replace(LATENCY_SENSITIVE, slo=slo), BEST_EFFORT),
        host_offload=mode,  # type: ignore[arg-type]
        admission="off",
        max_model_len=subject.max_model_len,
        host_threads=1,
        device_memory_bytes=subject.kv_bytes(24, 16),
    )
    arrivals = [Arrival(3 * i, tuple(range(1, 30 + 5 * i)), 12, BE if i % 3 else LS) for i in range(9)]
    outcome = run(subject, config, arrivals, latency=model)
    assert_exact(subject, outcome)
    assert sum(outcome.num_lane_tokens) > 0 or mode == "auto"


def test_a_request_that_cannot_have_its_targets_is_refused_with_both_times(engine: Engine) -> None:
    with pytest.raises(SloUnattainableError, match="first token would be late") as caught:
        engine.add(list(range(1, 40)), GREEDY, LS, slo=SLO(0.02, 1.0))
    assert caught.value.field == "slo"
    assert caught.value.target_ttft_s == 0.02
    assert caught.value.predicted_ttft_s == pytest.approx(0.049)
    assert isinstance(caught.value, RequestError)
    assert engine.is_idle, "nothing of it is left"
    assert engine.executor.remove(0) is None
    (refusal,) = engine.explain()["refusals"]
    assert (refusal["reason"], refusal["target_ttft_s"], refusal["at_s"]) == ("ttft", 0.02, 100.0)
    assert engine.stats()["num_refused"] == 1
    assert engine.add(list(range(1, 40)), GREEDY, LS) != refusal["request_id"]


@pytest.mark.parametrize(
    ("obstacle", "words"),
    [
        ("ttft", ["predicted ttft_s 3, target 2", "looser ttft_s"]),
        ("tpot", ["predicted tpot_s 0.3, target 0.2", "looser tpot_s"]),
        ("others", ["already admitted would be late", "looser ttft_s"]),
        ("memory", ["device_memory_bytes", "max_tokens"]),
        ("rows", ["no row", "max_num_seqs"]),
    ],
)
def test_a_refusal_says_what_decided_and_what_may_help(obstacle: Obstacle, words: list[str]) -> None:
    text = refusal_text(Admission(obstacle, 3.0, 2.0, 0.3, 0.2))
    assert all(word in text for word in (*words, "try again later"))
    assert ("ttft_s 3" in text, "tpot_s 0.3" in text) == (obstacle == "ttft", obstacle == "tpot")


def test_a_prompt_that_is_cached_is_admitted_where_a_new_one_is_not(engine: Engine) -> None:
    prompt, slo = list(range(1, 40)), SLO(0.022, 1.0)
    with pytest.raises(SloUnattainableError):
        engine.add(prompt, GREEDY, LS, slo=slo)
    engine.add(prompt, GREEDY, LS)
    finish(engine)
    assert engine.add(prompt, GREEDY, LS, slo=slo) > 0


def test_a_request_counts_from_its_arrival_at_the_api(engine: Engine) -> None:
    engine.add([1, 2, 3], GREEDY, LS, arrived_s=96.0)
    with pytest.raises(SloUnattainableError):
        engine.add([1, 2, 3], GREEDY, LS, arrived_s=94.0)


def test_targets_that_nothing_holds_are_worth_a_warning(
    tiny_subject: TinySubject, caplog: pytest.LogCaptureFixture
) -> None:
    for latency, policy in ((None, "omniserve"), (ExactModel(), "sarathi")):
        settings = EngineConfig(classes=CLASSES, host_offload="never", policy=policy)
        build_engine(tiny_subject(), settings, latency=latency).close()
        assert "not promised: that takes a latency model (calibrate: 'auto')" in caplog.text
        assert f"(policy: {policy!r})" in caplog.text
        caplog.clear()
    build_engine(tiny_subject(), EngineConfig(host_offload="never")).close()
    assert caplog.text == "", "without targets there is nothing to promise"


def test_without_admission_it_waits(tiny_subject: TinySubject) -> None:
    for engine in engines(tiny_subject, admission="off"):
        request = engine.add(list(range(1, 40)), GREEDY, LS, slo=SLO(0.02, 1.0))
        assert finish(engine) == {request: 4}


def test_a_job_that_should_end_sooner_goes_first(engine: Engine) -> None:
    engine.add(list(range(1, 60)), GREEDY, BE)
    urgent = engine.add(list(range(1, 60)), GREEDY, BE, completion_window_s=3600.0)
    engine.step()
    assert engine.explain()["plans"][-1]["chunks"][0][0] == urgent


def test_the_last_plans_and_their_reasons_are_plain_data(engine: Engine) -> None:
    engine.add(list(range(1, 40)), GREEDY, LS)
    finish(engine)
    plans = json.loads(json.dumps(engine.explain()))["plans"]
    assert [plan["kind"] for plan in plans] == ["walk"] * 4
    assert plans[0]["chunks"] == [[0, 0, 39]]
    assert plans[1]["why"]["tightest"] == 0
    assert plans[1]["why"]["slack_s"] == pytest.approx(1.0)
    assert plans[1]["why"]["load"]["num_decodes"] == 1


def test_the_model_learns_what_a_walk_was_planned_by_and_what_ran(engine: Engine) -> None:
    seen: list[tuple[WalkLoad, float, float, tuple[WalkLoad, float]]] = []

    class Watching(ExactModel):
        def observe(self, *arguments: Any) -> float:
            seen.append(arguments)  # type: ignore[arg-type]
            return 1.0

    ticks = count(100)
    engine.latency, engine._clock = Watching(), lambda: float(next(ticks))
    engine.add(list(range(1, 40)), GREEDY, LS, slo=SLO(1e4, 1e4), arrived_s=100.0)
    finish(engine)
    assert len(seen) == 4
    for (ran, host_share, seconds, planned), plan in zip(seen, engine.explain()["plans"], strict=True):
        assert (asdict(planned[0]), planned[1]) == (plan["why"]["load"], plan["why"]["host_is_busy"])
        assert ran == planned[0], "without lanes a walk is as planned"
        assert (host_share, seconds > 0) == (0.0, True)


def test_a_refusal_reaches_the_caller_as_the_same_error(engine: Engine) -> None:
    ours, theirs = socket.socketpair()
    loop = EngineLoop(engine, Channel(theirs))
    loop._heed(Add(7, list(range(1, 40)), GREEDY, LS, slo=SLO(0.02, 1.0)))
    loop._heed(AskExplanations(8))
    bodies = MessageBuffer().feed(ours.recv(1 << 16))
    refused, answer = (from_engine_decoder.decode(body) for body in bodies)
    error = _refusal(refused)  # type: ignore[arg-type]
    assert isinstance(error, SloUnattainableError)
    assert error.target_ttft_s == 0.02
    assert answer.answer["refusals"][0]["service_class"] == LS  # type: ignore[union-attr]
    ours.close()
    theirs.close()


def test_what_cannot_have_its_targets_whatever_its_prompt_is_is_refused_before_that_is_known(
    engine: Engine,
) -> None:
    engine.check_arrival(400, 4, LS)
    engine.check_arrival(1, None, LS, slo=SLO(0.02, 1.0))
    assert engine.history.num_refused == 0, "most of the prompt may be cached"
    with pytest.raises(SloUnattainableError, match="first token would be late") as caught:
        engine.check_arrival(1, 4, LS, slo=SLO(0.5, 1.0), arrived_s=99.0)
    assert (caught.value.target_ttft_s, engine.history.num_refused) == (0.5, 1)
    assert engine.is_idle, "nothing of it is left"
    ours, theirs = socket.socketpair()
    EngineLoop(engine, Channel(theirs))._heed(AskAdmission(8, 1, 4, LS, SLO(0.5, 1.0), 99.0))
    (body,) = MessageBuffer().feed(ours.recv(1 << 16))
    answer = from_engine_decoder.decode(body).answer  # type: ignore[union-attr]
    assert SloUnattainableError(**answer).target_ttft_s == 0.5
    ours.close()
    theirs.close()


def test_without_a_prefix_cache_the_least_length_of_a_prompt_counts(tiny_subject: TinySubject) -> None:
    for engine in engines(tiny_subject, enable_prefix_caching=False):
        engine.check_arrival(100, 4, LS, slo=SLO(0.2, 1.0))
        with pytest.raises(SloUnattainableError):
            engine.check_arrival(400, 4, LS, slo=SLO(0.2, 1.0))


def test_targets_and_classes_survive_the_way_to_the_engine() -> None:
    from omniserve.engine.messages import Start, to_engine_decoder

    config = EngineConfig(classes=CLASSES, policy="paper")
    (body,) = MessageBuffer().feed(pack(Start(config, "somewhere")))
    assert to_engine_decoder.decode(body) == Start(config, "somewhere")
