"""Rounded weights: the engine computes the model that is left and marks its texts; what they cost in text."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.driver import Arrival, Subject, run
from engine.prompts import Pool, pool_of, text_of
from engine.scenarios import SCENARIOS, Scenario, Settings, config_of, few_lengths, serve
from engine.tally import TALLY
from omniserve import LLM, SamplingParams
from omniserve.config import Quantization
from omniserve.model.tokenizer import Tokenizer

# Measured on SmolLM2 (docs/models.md, "Quantisation").
MIN_AGREEMENT = {"bfloat16": 0.95, "int8": 0.9, "int4": 0.8}


@pytest.fixture(scope="module")
def pool() -> Pool:
    rng = random.Random(11)
    return pool_of([rng.randrange(512) for _ in range(4000)])


def rounded(weight: Tensor, quantization: Quantization) -> Tensor:
    """What is left; int8: each output in 255 equal steps around zero."""
    if quantization == "bfloat16":
        return weight.bfloat16().float()
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scale).round() * scale


def rounded_folder(path: Path, target: Path, quantization: Quantization) -> Path:
    """The checkpoint with the weights that are left, the embedding untouched and apart from the head."""
    shutil.copytree(path, target)
    tensors = load_file(path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors.setdefault("lm_head.weight", embedding.clone())
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and tensor is not embedding:
            tensors[name] = rounded(tensor, quantization)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return target


@pytest.mark.parametrize(("quantization", "is_tied"), [("int8", False), ("int8", True), ("bfloat16", True)])
def test_tokens_equal_transformers_on_the_rounded_weights(
    tiny_llama: Callable[..., Path], tmp_path: Path, pool: Pool, quantization: Quantization, is_tied: bool
) -> None:
    path = tiny_llama(tie_word_embeddings=is_tied, attention_bias=True)
    reference = rounded_folder(path, tmp_path / "rounded", quantization)
    subject = Subject(path, quantization=quantization, reference_path=reference)
    for scenario in ("ls_alone", "be_always", "mixed"):
        settings, rng = Settings(), random.Random(scenario)
        story = SCENARIOS[scenario](pool, settings, few_lengths(rng), rng)
        serve(subject, story, settings)


def test_a_model_of_int4_serves_chat_and_lanes(tiny_llama: Callable[..., Path], pool: Pool) -> None:
    """The same text whether a chat or a lane: rows do not depend on each other."""
    subject = Subject(tiny_llama(), quantization="int4")
    texts = []
    for scenario in ("ls_alone", "be_always"):
        settings = Settings()
        story = SCENARIOS[scenario](pool, settings, (33, 17, 64), random.Random(1))
        outcome = run(subject, config_of(subject, story, settings), story.arrivals)
        story.proves(outcome)
        assert outcome.stats["quantization"] == "int4"
        texts.append(outcome.tokens)
    equal = [a == b for chat, lane in zip(*texts, strict=True) for a, b in zip(chat, lane, strict=True)]
    assert sum(equal) >= 0.9 * len(equal)


# Marks


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(host_offload="always", quantization="int8", max_model_len=512) as engine:
        yield engine


def test_every_text_from_rounded_weights_is_marked(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    chat, batch = llm.generate(["The capital of France is"] * 2, params, ["latency_sensitive", "best_effort"])
    assert "Paris" in chat.text
    assert not chat.metrics.is_exact
    assert not batch.metrics.is_exact
    stats = llm.stats()
    assert (stats["quantization"], stats["host_kv_dtype"]) == ("int8", "float32")


# What it costs in text


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize(
    ("lengths", "num_tokens"),
    [
        ((15, 64, 129, 257), 24),
        pytest.param((15, 33, 64, 100, 129, 255, 257, 511), 48, marks=pytest.mark.full),
    ],
)
def test_agreement_of_rounded_weights_with_float32_on_smollm2(
    smollm2: Subject,
    smollm2_path: Path,
    quantization: Quantization,
    lengths: tuple[int, ...],
    num_tokens: int,
) -> None:
    """Prints how many greedy tokens agree; asserts a loose bound on agreement given the same text so far.

    A text never comes back after its first difference, so the second figure asks, of every token, whether the
    exact model would have chosen it after the same tokens.
    """
    texts = pool_of(Tokenizer(smollm2_path).encode(text_of(4)))
    arrivals = [Arrival(0, texts[n].ids, num_tokens) for n in lengths]
    story = Scenario(arrivals, lambda outcome: None, "never")
    subject = Subject(smollm2_path, quantization=quantization)
    config = replace(config_of(subject, story, Settings()), device_threads=1)
    outcome = run(subject, config, arrivals)
    figures: dict[str, Any] = {"equal": 0, "given_ours": 0, "texts": 0, "error": 0.0}
    for arrival, tokens, logits in zip(arrivals, outcome.tokens, outcome.logits, strict=True):
        exact = smollm2.reference.logits(arrival.prompt, tokens)
        expected = smollm2.reference.generate(arrival.prompt, num_tokens)
        figures["given_ours"] += int((exact.argmax(dim=-1) == torch.tensor(tokens)).sum())
        figures["equal"] += sum(a == b for a, b in zip(tokens, expected, strict=True))
        figures["texts"] += tokens == expected
        figures["error"] += float(((logits - exact).abs().amax(-1) / exact.abs().amax(-1)).mean())
    total = len(arrivals) * num_tokens
    TALLY.notes.append(
        f"{quantization} weights, SmolLM2: {figures['equal']} of {total} tokens, {figures['texts']} of"
        f" {len(arrivals)} texts equal float32's; {figures['given_ours']} of {total} tokens are the exact"
        " model's choice after the same ones; the worst logit of a position is off by"
        f" {figures['error'] / len(arrivals):.1e} of the scale on average"
    )
    assert figures["given_ours"] >= MIN_AGREEMENT[quantization] * total
