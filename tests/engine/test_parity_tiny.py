"""The parity scenarios on random tiny Llamas of many shapes, and what bfloat16 costs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.driver import Subject
from engine.parity16 import report_agreement
from engine.prompts import Pool, pool_of
from engine.scenarios import SCENARIOS, Settings, few_lengths, serve

# Query heads per KV head, head size and tied embeddings; every kernel path and odd widths.
SHAPES: dict[str, dict[str, Any]] = {
    "groups of 1, head size 64": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64},
    "groups of 2, head size 80": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 80},
    "groups of 3, head size 128": {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "hidden_size": 144,
    },
    "groups of 4, head size 64, tied": {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "groups of 8, head size 80": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 80},
}
SETTINGS = (
    Settings("same_iteration", 16, 8, 16),
    Settings("next_iteration", 64, 16, 5),
    Settings("same_iteration", 512, 16, 8),
)

TinySubject = Callable[..., Subject]


@pytest.fixture(scope="module")
def pool() -> Pool:
    rng = random.Random(3)
    return pool_of([rng.randrange(512) for _ in range(4000)])


def serve_shape(tiny_subject: TinySubject, pool: Pool, shape: str, scenario: str, settings: Settings) -> None:
    rng = random.Random(shape + scenario)
    story = SCENARIOS[scenario](pool, settings, few_lengths(rng), rng)
    serve(tiny_subject(**SHAPES[shape]), story, settings)


def rotated() -> list[tuple[str, str, Settings]]:
    """Every shape with every scenario, the settings taken in turn."""
    pairs = itertools.product(SHAPES, SCENARIOS)
    return [(shape, scenario, SETTINGS[i % len(SETTINGS)]) for i, (shape, scenario) in enumerate(pairs)]


@pytest.mark.parametrize(("shape", "scenario", "settings"), rotated(), ids=str)
def test_tokens_equal_for_every_shape(
    tiny_subject: TinySubject, pool: Pool, shape: str, scenario: str, settings: Settings
) -> None:
    serve_shape(tiny_subject, pool, shape, scenario, settings)


@pytest.mark.full
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_equal_for_every_shape_and_setting(
    tiny_subject: TinySubject, pool: Pool, shape: str, scenario: str, settings: Settings
) -> None:
    serve_shape(tiny_subject, pool, shape, scenario, settings)


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_text_is_diverse(tiny_subject: TinySubject, pool: Pool, shape: str) -> None:
    """A model that repeats itself would hide a wrong token."""
    reference = tiny_subject(**SHAPES[shape]).reference
    for length in (7, 23, 63):
        assert len(set(reference.generate(pool[length].ids, 32))) >= 20


@pytest.mark.parametrize("scenario", ["ls_alone", "be_always"])
@pytest.mark.parametrize("shape", ["groups of 3, head size 128", "groups of 4, head size 64, tied"])
def test_bfloat16_is_as_near_to_float32_as_transformers_is(
    tiny_subject: TinySubject, pool: Pool, shape: str, scenario: str
) -> None:
    """Given our tokens, our logits are as far from the float32 model's as transformers' bfloat16 logits are.

    Token agreement is reported, not asserted: bfloat16 rounds far more coarsely than the tie rule allows.
    """
    subject = tiny_subject(torch.bfloat16, **SHAPES[shape])
    exact = tiny_subject(**SHAPES[shape]).reference
    lengths = few_lengths(random.Random(5))
    report_agreement(f"tiny Llama, {shape}, {scenario}", subject, exact, pool, scenario, lengths)


@pytest.mark.full
@pytest.mark.parametrize("scenario", ["ls_alone", "be_always"])
def test_bfloat16_smollm2_is_as_near_to_float32_as_transformers_is(
    smollm2_path: Path, smollm2: Subject, scenario: str
) -> None:
    from engine.prompts import text_of
    from omniserve.model.tokenizer import Tokenizer

    pool = pool_of(Tokenizer(smollm2_path).encode(text_of(4)))
    subject = Subject(smollm2_path, torch.bfloat16)
    lengths = few_lengths(random.Random(5))
    report_agreement(f"SmolLM2, {scenario}", subject, smollm2.reference, pool, scenario, lengths)
