"""The parity scenarios on a random tiny model of every family, and what 16 bits cost."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.driver import Subject
from engine.parity16 import report_agreement
from engine.prompts import Pool, pool_of
from engine.scenarios import SCENARIOS, Settings, serve

# Windows are shorter than most prompts, and end within pages, chunks and tiles.
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 27},
    "qwen2, a window in some layers": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 256,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 40,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 96,
    },
    "qwen3 moe, a dense layer": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "mlp_only_layers": [1],
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
    "llama, yarn": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    },
}
PATHS = ("ls_alone", "be_always", "mixed")
SETTINGS = (
    Settings("same_iteration", 16, 8, 16),
    Settings("next_iteration", 64, 16, 5),
    Settings("same_iteration", 512, 16, 64),
)
LENGTHS = (3, 17, 33, 65, 129)

TinySubject = Callable[..., Subject]


@pytest.fixture(scope="module")
def pool() -> Pool:
    rng = random.Random(9)
    return pool_of([rng.randrange(300) for _ in range(4000)])


def rotated() -> list[tuple[str, str, Settings]]:
    """Every family on every path, the settings taken in turn."""
    pairs = itertools.product(FAMILIES, PATHS)
    return [(family, path, SETTINGS[(i + i // 3) % 3]) for i, (family, path) in enumerate(pairs)]


def serve_family(tiny_subject: TinySubject, pool: Pool, family: str, path: str, settings: Settings) -> None:
    rng = random.Random(family + path)
    story = SCENARIOS[path](pool, settings, LENGTHS, rng)
    serve(tiny_subject(vocab_size=300, **FAMILIES[family]), story, settings)


@pytest.mark.parametrize(("family", "path", "settings"), rotated(), ids=str)
def test_tokens_equal_for_every_family_on_every_path(
    tiny_subject: TinySubject, pool: Pool, family: str, path: str, settings: Settings
) -> None:
    serve_family(tiny_subject, pool, family, path, settings)


@pytest.mark.full
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("path", SCENARIOS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_for_every_family_scenario_and_setting(
    tiny_subject: TinySubject, pool: Pool, family: str, path: str, settings: Settings
) -> None:
    serve_family(tiny_subject, pool, family, path, settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_text_is_diverse(tiny_subject: TinySubject, pool: Pool, family: str) -> None:
    """A model that repeats itself would hide a wrong token."""
    reference = tiny_subject(vocab_size=300, **FAMILIES[family]).reference
    assert len(set(reference.generate(pool[23].ids, 32))) >= 20


@pytest.mark.parametrize("family", ["mistral", "qwen2, a window in some layers"])
def test_a_window_changes_what_is_said(tiny_subject: TinySubject, pool: Pool, family: str) -> None:
    """The scenarios above would notice a window that is not heeded."""
    windowed = FAMILIES[family]
    whole = windowed | {"sliding_window": 4096}
    prompt = pool[65].ids
    texts = [
        tiny_subject(vocab_size=300, **config).reference.generate(prompt, 12) for config in (windowed, whole)
    ]
    assert texts[0] != texts[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("family", "path"),
    [("mistral", "mixed"), ("qwen3", "be_always"), ("mixtral", "ls_alone")],
)
def test_16_bits_are_as_near_to_float32_as_transformers_is(
    tiny_subject: TinySubject, pool: Pool, family: str, path: str, dtype: torch.dtype
) -> None:
    """Given our tokens, our logits are as far from the float32 model's as transformers' 16-bit logits are.

    Token agreement is reported, not asserted: 16 bits round far more coarsely than the tie rule allows.
    """
    config = {"vocab_size": 300, **FAMILIES[family]}
    exact = tiny_subject(**config).reference
    report_agreement(f"tiny {family}, {path}", tiny_subject(dtype, **config), exact, pool, path, LENGTHS)
