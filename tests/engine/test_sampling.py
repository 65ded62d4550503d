"""What a request asks of sampling holds wherever it runs: device, lane, late host, dropped, in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.driver import BE, LS, Subject
from engine.reference import one_thread
from engine.scripted import Asked, ScriptedEngine
from engine.test_scripted_host import (
    FIRST,
    MAX_MODEL_LEN,
    SCRIPTED,
    TURNS,
    Arrive,
    Turn,
    carry_out,
    configs,
    scripted_engine,
    text_of,
)
from omniserve.types import TokenLogprobs

# The logits of random weights lie far apart, hence the temperature. Everything at once.
EVERYTHING: dict[str, Any] = {
    "temperature": 20.0,
    "seed": 11,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.01,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
    "logit_bias": {7: 3.0, 300: -100.0},
    "bad_word_ids": [[5], [12, 13]],
    "min_tokens": 2,
    "stop_token_ids": [3],
    "logprobs": 3,
    "prompt_logprobs": 2,
    "ignore_eos": True,
}
ROOMY: dict[str, Any] = {"page_size": 4, "host_page_size": 4}


@pytest.fixture(scope="module")
def subject(tiny_subject: Callable[..., Subject]) -> Subject:
    return tiny_subject(max_position_embeddings=MAX_MODEL_LEN)


@pytest.fixture(scope="module")
def alone(subject: Subject) -> Callable[[tuple[int, ...], int], Asked]:
    """What a request with EVERYTHING gives when it is the only one, on the device, in one chunk."""

    @cache
    def run_alone(prompt: tuple[int, ...], max_tokens: int) -> Asked:
        run = scripted_engine(subject, 30, 30, **ROOMY)
        request_id = run.add(prompt, max_tokens, LS, **EVERYTHING)
        while not run.engine.is_idle:
            run.step()
        run.close()
        return run.asked[request_id]

    return run_alone


def assert_alike(ours: Sequence[TokenLogprobs | None], theirs: Sequence[TokenLogprobs | None]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        if a is None or b is None:
            assert a is b
            continue
        assert (a.ids[0], len(a.ids), a.rank) == (b.ids[0], len(b.ids), b.rank)
        assert a.logprobs == pytest.approx(b.logprobs, abs=2e-3)


def assert_as_alone(run: ScriptedEngine, alone: Callable[[tuple[int, ...], int], Asked]) -> None:
    """Every text is the one its request gives alone, as far as it went, with the same log probabilities."""
    for asked in run.asked.values():
        expected = alone(asked.prompt, asked.max_tokens)
        if not asked.is_aborted:
            assert asked.tokens == expected.tokens
        assert asked.tokens == expected.tokens[: len(asked.tokens)]
        if asked.tokens:
            assert_alike(asked.logprobs, expected.logprobs[: len(asked.tokens)])
            assert asked.prompt_logprobs is not None
            assert expected.prompt_logprobs is not None
            assert_alike(asked.prompt_logprobs, expected.prompt_logprobs)


class Sampled(ScriptedEngine):
    """Requests are aborted by scripts without knowing whether they have met a stop token."""

    def abort(self, request_id: int) -> None:
        is_running = request_id in self.engine.state.requests
        assert self.engine.abort(request_id) == is_running
        self.asked[request_id].is_aborted |= is_running


@pytest.mark.timeout(900)  # a failing script takes minutes to be made small
# The same examples every time: one draw in a hundred thousand is a tie up to rounding.
@settings(SCRIPTED, max_examples=40, derandomize=True)
@given(
    config=configs(st.integers(5, 16), [5, 4, 2]),
    arrivals=FIRST,
    turns=st.lists(TURNS, min_size=20, max_size=40),
)
def test_any_script_of_the_host_gives_the_sampled_text_and_log_probabilities_that_it_has_alone(
    subject: Subject,
    alone: Callable[[tuple[int, ...], int], Asked],
    config: dict[str, Any],
    arrivals: list[Arrive],
    turns: list[Turn],
) -> None:
    memory = {
        "device_memory_bytes": subject.kv_bytes(config.pop("device_pages"), config["page_size"]),
        "host_memory_bytes": subject.kv_bytes(config.pop("host_pages"), config["host_page_size"]),
    }
    run = Sampled(subject, **memory, **config)
    run.sampling = EVERYTHING
    try:
        carry_out(run, arrivals, turns)
        assert_as_alone(run, alone)
    finally:
        run.close()


@pytest.mark.parametrize("reentry", ["same_iteration", "next_iteration"])
def test_lanes_beside_chat_give_the_text_they_have_alone(
    subject: Subject, alone: Callable[[tuple[int, ...], int], Asked], reentry: str
) -> None:
    run = scripted_engine(subject, 60, 60, host_offload="always", reentry=reentry, **ROOMY)
    run.sampling = EVERYTHING
    lanes = [run.add(text_of(i, 9 + i), 10, BE) for i in range(3)]
    run.add(text_of(0, 9), 10, LS)
    run.add(text_of(1, 5), 12, LS, temperature=0.0, logprobs=None)  # others sample otherwise
    greedy = run.asked.popitem()
    run.during = lambda layer: run.host.serve_all()
    tokens_by_lane = 0
    while not run.engine.is_idle:
        run.host.serve_all()
        run.asked[greedy[0]] = greedy[1]
        tokens_by_lane += sum(t.by_lane for t in run.step().tokens if t.request_id in lanes)
    del run.asked[greedy[0]]
    assert tokens_by_lane > 0
    assert_as_alone(run, alone)
    run.close()


def test_a_lane_that_loses_its_host_again_and_again_goes_on_with_the_same_text(
    subject: Subject, alone: Callable[[tuple[int, ...], int], Asked]
) -> None:
    run = scripted_engine(subject, 30, 30, host_offload="always", max_num_batched_tokens=4, **ROOMY)
    run.sampling = EVERYTHING
    lane = run.add(text_of(1, 12), 10, BE)
    lengths = iter((2, 4, 7))
    wanted = next(lengths)
    while not run.engine.is_idle:
        run.host.serve_all()
        run.step()
        if len(run.asked[lane].tokens) == wanted:
            run.host.lose()
            wanted = next(lengths, -1)
    assert run.engine.stats()["num_dropped"] == 3
    assert_as_alone(run, alone)
    run.close()


# ---------------------------------------------------------------- prompt log probabilities


def reference_logprobs(subject: Subject, ids: Sequence[int]) -> torch.Tensor:
    """Log softmax [len(ids), vocab] of transformers' model after each token."""
    with torch.inference_mode(), one_thread():
        return torch.log_softmax(subject.reference.model(torch.tensor([ids])).logits[0].double(), -1)


@pytest.mark.parametrize("chunk", [3, 7, 40])
@pytest.mark.parametrize("length", [1, 2, 33, 37])
def test_prompt_log_probabilities_are_the_models_whatever_the_chunks(
    subject: Subject, chunk: int, length: int
) -> None:
    run = scripted_engine(subject, 30, 30, max_num_batched_tokens=chunk, **ROOMY)
    prompt = text_of(2, length)
    request_id = run.add(prompt, 4, LS, prompt_logprobs=5, logprobs=0)
    run.add(text_of(1, 20), 3, LS)  # shares the walks
    while not run.engine.is_idle:
        run.step()
    run.close()
    asked = run.asked[request_id]
    found = asked.prompt_logprobs
    assert found is not None
    assert found[0] is None
    assert len(found) == length
    expected = reference_logprobs(subject, [*prompt, *asked.tokens])
    for i in range(1, length):
        position = found[i]
        assert position is not None
        assert position.ids[0] == prompt[i]
        assert len(position.ids) == 6
        assert position.logprobs == pytest.approx(expected[i - 1, position.ids].tolist(), abs=2e-3)
        assert position.logprobs[1:] == pytest.approx(expected[i - 1].topk(5).values.tolist(), abs=2e-3)
    for i, (token, own) in enumerate(zip(asked.tokens, asked.logprobs, strict=True)):
        assert own.ids == [token]
        assert own.logprobs == pytest.approx([float(expected[length + i - 1, token])], abs=2e-3)


def test_a_prompt_parked_and_dropped_in_its_prefill_is_scored_once_and_right(subject: Subject) -> None:
    """Chat takes all rows and then all pages while a batch prompt is half way: it starts again."""
    run = scripted_engine(subject, 12, 30, max_num_batched_tokens=8, max_num_seqs=4, **ROOMY)
    prompt = text_of(0, 24)
    batch = run.add(prompt, 2, BE, prompt_logprobs=1)
    run.step()
    for i in range(2):
        run.add(text_of(1, 20 + i), 8, LS)
    while not run.engine.is_idle:
        run.step()
    stats = run.engine.stats()
    assert stats["num_dropped"] > stats["num_broken_promises"], "the batch prompt was dropped"
    run.close()
    found = run.asked[batch].prompt_logprobs
    assert found is not None
    expected = reference_logprobs(subject, prompt)
    assert [p and p.ids[0] for p in found] == [None, *prompt[1:]]
    values = [p.logprobs[0] for p in found if p is not None]
    assert values == pytest.approx([float(expected[i, t]) for i, t in enumerate(prompt[1:])], abs=2e-3)


# ---------------------------------------------------------------- ends


def test_no_stop_token_comes_before_min_tokens_and_then_it_ends_the_text(subject: Subject) -> None:
    """A bias makes the stop token the best one at once."""
    run = scripted_engine(subject, 30, 30, **ROOMY)
    stop = {"stop_token_ids": [9], "logit_bias": {9: 100.0}}
    early = run.add(text_of(0, 5), 12, LS, **stop)
    late = run.add(text_of(0, 5), 12, LS, min_tokens=6, **stop)
    eos = run.add(text_of(0, 5), 12, LS, min_tokens=3, ignore_eos=False, logit_bias={257: 100.0})
    while not run.engine.is_idle:
        run.step()
    run.close()
    assert run.asked[early].tokens == [9]
    assert (len(run.asked[late].tokens), run.asked[late].tokens[6:]) == (7, [9])
    assert 9 not in run.asked[late].tokens[:6]
    assert (len(run.asked[eos].tokens), run.asked[eos].tokens[3:]) == (4, [257])


def test_requests_without_a_seed_differ_and_the_engine_seed_repeats_them(subject: Subject) -> None:
    def texts(seed: int) -> list[list[int]]:
        run = scripted_engine(subject, 60, 30, seed=seed, **ROOMY)
        for _ in range(4):
            run.add(text_of(0, 5), 8, LS, temperature=20.0)
        while not run.engine.is_idle:
            run.step()
        run.close()
        return [asked.tokens for asked in run.asked.values()]

    first = texts(1)
    assert len({tuple(t) for t in first}) == 4
    assert texts(1) == first
    assert not any(t in first for t in texts(2))
