"""Configurations as well-known checkpoints publish them are accepted and read as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from omniserve.model.families import read_model_config
from omniserve.model.rope import RopeScaling

COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "use_cache": True,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
# Name: family, (hidden, inner, layers, heads, KV heads, positions, vocabulary), further entries.
PUBLISHED: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "TinyLlama-1.1B": (
        "LlamaForCausalLM",
        (2048, 5632, 22, 32, 4, 2048, 32000),
        {"attention_bias": False, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
    ),
    "Yi-6B": (
        "LlamaForCausalLM",
        (4096, 11008, 32, 32, 4, 4096, 64000),
        {"pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_theta": 5e6},
    ),
    "Llama-3.1-8B": (
        "LlamaForCausalLM",
        (4096, 14336, 32, 32, 8, 131072, 128256),
        {"mlp_bias": False, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "rope_scaling": LLAMA3},
    ),
    "SmolLM2-1.7B": (
        "LlamaForCausalLM",
        (2048, 8192, 24, 32, 32, 8192, 49152),
        {
            "is_llama_config": True,
            "rms_norm_eps": 1e-5,
            "rope_interleaved": False,
            "rope_theta": 130000,
            "tie_word_embeddings": True,
        },
    ),
    "Mistral-7B-v0.1": (
        "MistralForCausalLM",
        (4096, 14336, 32, 32, 8, 32768, 32000),
        {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096},
    ),
    "Mistral-7B-v0.3": (
        "MistralForCausalLM",
        (4096, 14336, 32, 32, 8, 32768, 32768),
        {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None},
    ),
    "Qwen2.5-0.5B": (
        "Qwen2ForCausalLM",
        (896, 4864, 24, 14, 2, 32768, 151936),
        {
            "max_window_layers": 24,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_mrope": False,
            "use_sliding_window": False,
        },
    ),
    "Qwen3-0.6B": (
        "Qwen3ForCausalLM",
        (1024, 3072, 28, 16, 8, 40960, 151936),
        {
            "attention_bias": False,
            "head_dim": 128,
            "max_window_layers": 28,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
        },
    ),
    "Mixtral-8x7B": (
        "MixtralForCausalLM",
        (4096, 14336, 32, 32, 8, 32768, 32000),
        {
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
            "output_router_logits": False,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
        },
    ),
    "Qwen3-30B-A3B": (
        "Qwen3MoeForCausalLM",
        (2048, 6144, 48, 32, 4, 40960, 151936),
        {
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "sliding_window": None,
            "use_sliding_window": False,
        },
    ),
}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "max_position_embeddings", "vocab_size")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_read_as_transformers_reads_it(tmp_path: Path, name: str) -> None:
    from transformers import AutoConfig

    architecture, sizes, further = PUBLISHED[name]
    model_type = {"Llama": "llama", "Mistral": "mistral", "Qwen2": "qwen2", "Qwen3": "qwen3"}
    model_type |= {"Mixtral": "mixtral", "Qwen3Moe": "qwen3_moe"}
    kind = model_type[architecture.removesuffix("ForCausalLM")]
    raw = {**COMMON, "architectures": [architecture], "model_type": kind, **further}
    (tmp_path / "config.json").write_text(json.dumps(raw | dict(zip(SIZES, sizes, strict=True))))
    ours, theirs = read_model_config(tmp_path), AutoConfig.from_pretrained(tmp_path)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (ours.head_dim, ours.num_kv_heads) == (head_dim, theirs.num_key_value_heads)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.window == (getattr(theirs, "sliding_window", None) or 0)
    assert (ours.tie_word_embeddings, ours.vocab_size) == (theirs.tie_word_embeddings, theirs.vocab_size)
    assert (ours.rope_scaling is not None) == (theirs.rope_parameters["rope_type"] != "default")
    assert (ours.experts is not None) == hasattr(theirs, "num_experts_per_tok")
    if ours.experts is not None:
        assert (ours.experts.count, len(ours.experts.layers)) == (theirs.num_experts, ours.num_layers)


def test_llama3_scaling_is_read_with_its_own_entries(tmp_path: Path) -> None:
    architecture, sizes, further = PUBLISHED["Llama-3.1-8B"]
    raw = {"architectures": [architecture], **dict(zip(SIZES, sizes, strict=True)), **further}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_model_config(tmp_path).rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
