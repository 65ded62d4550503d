"""int8 KV on the host: lanes run, end and are marked, never return; chat stays exact; what texts change."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.driver import Arrival, Outcome, Subject, run
from engine.prompts import Pool, pool_of, text_of
from engine.scenarios import (
    SCENARIOS,
    Scenario,
    Settings,
    arrivals_of,
    best_effort_decodes_in_lanes,
    config_of,
    few_lengths,
)
from engine.tally import TALLY
from omniserve import LLM, SamplingParams
from omniserve.config import EngineConfig
from omniserve.engine.build import make_limits
from omniserve.engine.messages import Token
from omniserve.engine.progress import Progress
from omniserve.model.tokenizer import Tokenizer

BE = "best_effort"
# Measured on SmolLM2: 428 of 432 (docs/host-attention.md, "int8"). A kernel that took one scale for
# a whole tile came to 45 of 96.
MIN_AGREEMENT = 0.9


@pytest.fixture(scope="module")
def tiny(tiny_subject: Callable[..., Subject]) -> Subject:
    return tiny_subject()


@pytest.fixture(scope="module")
def pool() -> Pool:
    rng = random.Random(11)
    return pool_of([rng.randrange(512) for _ in range(4000)])


def serve_int8(subject: Subject, story: Scenario, settings: Settings) -> Outcome:
    config = replace(config_of(subject, story, settings), host_kv_dtype="int8")
    return run(subject, config, story.arrivals, story.after_step)


def assert_what_int8_promises(subject: Subject, outcome: Outcome) -> None:
    """Everybody ends, whoever never was a lane is exact, and no page came back."""
    for arrival, tokens, num_lane_tokens in zip(
        outcome.arrivals, outcome.tokens, outcome.num_lane_tokens, strict=True
    ):
        assert len(tokens) == arrival.max_tokens
        if num_lane_tokens == 0:
            subject.reference.check(arrival.prompt, tokens)
    assert outcome.stats["host_kv_dtype"] == "int8"
    assert outcome.stats["num_swapped_in"] == outcome.stats["fetched_pages"] == 0
    assert outcome.stats["device_wait_s"] == 0


@pytest.mark.parametrize("scenario", ["be_always", "mixed", "crowded", "displaced", "dropped", "host_lost"])
def test_lanes_of_int8_finish_whatever_happens_to_them(tiny: Subject, pool: Pool, scenario: str) -> None:
    settings = Settings("same_iteration", 64, 16, 5)
    rng = random.Random(scenario)
    story = SCENARIOS[scenario](pool, settings, few_lengths(rng), rng)
    outcome = serve_int8(tiny, story, settings)
    if scenario != "dropped":  # four times as many tokens fit the same host memory
        story.proves(outcome)
    assert_what_int8_promises(tiny, outcome)


def test_a_displaced_lane_of_int8_ends_on_the_host_where_an_exact_one_returns(
    tiny: Subject, pool: Pool
) -> None:
    story = SCENARIOS["returned"](pool, Settings(), [], random.Random(1))
    exact = run(tiny, config_of(tiny, story, Settings()), story.arrivals)
    story.proves(exact)  # it does return
    lossy = serve_int8(tiny, story, Settings())
    assert_what_int8_promises(tiny, lossy)
    assert lossy.stats["num_displaced"] > 0
    assert lossy.stats["num_lane_tokens"] > exact.stats["num_lane_tokens"]


def test_host_bytes_read_shrink_with_the_storage(tiny: Subject, pool: Pool) -> None:
    """The same lanes read (64 + 4) / (4 * 64) of the bytes."""
    story = Scenario(arrivals_of(pool, (33, 17), BE), lambda outcome: None, "always")
    exact = run(tiny, config_of(tiny, story, Settings()), story.arrivals)
    lossy = serve_int8(tiny, story, Settings())
    assert lossy.stats["host_kv_bytes_read"] * 256 == exact.stats["host_kv_bytes_read"] * 68


def test_lanes_of_int8_serve_a_bfloat16_model(tiny_subject: Callable[..., Subject], pool: Pool) -> None:
    story = Scenario(arrivals_of(pool, (33, 17, 64), BE), best_effort_decodes_in_lanes, "always")
    outcome = serve_int8(tiny_subject(torch.bfloat16), story, Settings())
    story.proves(outcome)
    assert outcome.stats["host_kv_dtype"] == "int8"


@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float32, 256 / 68), (torch.bfloat16, 128 / 68)])
def test_more_pages_fit_the_same_host_memory(tiny: Subject, dtype: torch.dtype, ratio: float) -> None:
    def limits(**changes: Any) -> Any:
        config = EngineConfig(
            host_memory_bytes=1 << 25, device_memory_bytes=1 << 22, max_lanes=4096, **changes
        )
        return make_limits(config, tiny.decoder.config, dtype, 4096)

    exact, lossy = limits(), limits(host_kv_dtype="int8")
    assert (exact.host_kv_is_lossy, lossy.host_kv_is_lossy) == (False, True)
    assert lossy.num_host_pages == pytest.approx(exact.num_host_pages * ratio, rel=0.02)
    assert lossy.num_device_pages == exact.num_device_pages


# Marks


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(host_offload="always", host_kv_dtype="int8", max_model_len=512) as engine:
        yield engine


def test_outputs_from_int8_lanes_are_marked_and_others_are_not(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    one = SamplingParams(temperature=0.0, max_tokens=1)
    prompt = "The capital of France is"
    chat, batch, short = llm.generate([prompt] * 3, [params, params, one], ["latency_sensitive", BE, BE])
    assert chat.metrics.is_exact
    assert batch.metrics.num_lane_tokens == 11
    assert not batch.metrics.is_exact
    assert short.metrics.is_exact  # its only token came from the prefill on the device
    assert llm.stats()["host_kv_dtype"] == "int8"


def test_one_token_from_lossy_kv_marks_the_text_for_good(smollm2_path: Path) -> None:
    progress = Progress(Tokenizer(smollm2_path), "0", [1], SamplingParams(), 0.0)
    marks = []
    for by_lane, is_exact in ((False, True), (True, False), (False, True)):
        progress.push(Token(0, 5, by_lane, None, is_exact), 0.0)
        marks.append(progress.output().metrics.is_exact)
    assert marks == [True, False, False]
    progress.abort()
    assert not progress.output().metrics.is_exact


# What it costs in text


@pytest.mark.parametrize(
    ("lengths", "num_tokens"),
    [
        ((15, 64, 129, 257), 24),
        pytest.param((15, 33, 64, 100, 129, 255, 257, 511, 1500), 48, marks=pytest.mark.full),
    ],
)
def test_agreement_of_int8_lanes_with_float32_lanes_on_smollm2(
    smollm2: Subject, smollm2_path: Path, lengths: tuple[int, ...], num_tokens: int
) -> None:
    """Prints how many greedy tokens agree; asserts a loose bound on agreement given the same text so far.

    A text never comes back after its first difference, so the second figure asks, of every token, whether the
    exact model would have chosen it after the same tokens.
    """
    texts = pool_of(Tokenizer(smollm2_path).encode(text_of(4)))
    arrivals = [Arrival(0, texts[n].ids, num_tokens, BE) for n in lengths]
    story = Scenario(arrivals, lambda outcome: None, "always")
    exact = run(smollm2, config_of(smollm2, story, Settings()), arrivals)
    lossy = serve_int8(smollm2, story, Settings())
    equal = given_ours = total = 0
    same_texts = 0
    for arrival, expected, tokens in zip(arrivals, exact.tokens, lossy.tokens, strict=True):
        best = smollm2.reference.logits(arrival.prompt, tokens).argmax(dim=-1)
        given_ours += int((best == torch.tensor(tokens)).sum())
        equal += sum(a == b for a, b in zip(tokens, expected, strict=True))
        same_texts += tokens == expected
        total += len(tokens)
    TALLY.notes.append(
        f"int8 lanes, SmolLM2: {equal} of {total} tokens, {same_texts} of {len(arrivals)} texts equal float "
        f"lanes'; {given_ours} of {total} tokens are the exact model's choice after the same ones"
    )
    assert given_ours >= MIN_AGREEMENT * total
