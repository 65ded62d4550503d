"""config.json in, ModelConfig out; what is not supported is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from omniserve.errors import ModelError
from omniserve.model.families import RopeScaling, read_model_config

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 256,
}
# Families whose format takes 8 KV heads for granted.
MISTRAL = {"architectures": ["MistralForCausalLM"], "num_attention_heads": 8}
MIXTRAL = {"architectures": ["MixtralForCausalLM"], "num_attention_heads": 8}


def config_of(folder: Path, generation: dict[str, Any] | None = None, **entries: Any) -> Any:
    (folder / "config.json").write_text(json.dumps(BASE | entries))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return read_model_config(folder)


def test_absent_entries_take_the_defaults_of_the_format(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (4, 16, 10000.0)
    assert (config.rope_scaling, config.tie_word_embeddings, config.eos_token_ids) == (None, False, ())


def test_both_spellings_of_rotary_parameters_mean_the_same(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    old = config_of(tmp_path, rope_theta=5e5, rope_scaling=scaling)
    new = config_of(tmp_path, rope_parameters=scaling | {"rope_theta": 5e5})
    assert old == new
    assert old.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 64)


def test_generation_config_decides_the_end_of_text(tmp_path: Path) -> None:
    assert config_of(tmp_path, eos_token_id=2).eos_token_ids == (2,)
    assert config_of(tmp_path, {"eos_token_id": [3, 4]}, eos_token_id=2).eos_token_ids == (3, 4)


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "GPT2LMHeadModel is not supported; supported: LlamaForCausalLM",
        ),
        ({"architectures": None, "model_type": "mamba"}, "'mamba' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (
            {"rope_scaling": {"type": "proportional", "factor": 4}},
            "'proportional' is not supported; supported: default, linear, dynamic",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor 0.5",
        ),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"sliding_window": 4096}, "sliding_window 4096 has no meaning for LlamaForCausalLM"),
        ({"num_local_experts": 8}, "num_local_experts 8 has no meaning for LlamaForCausalLM"),
        ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping 50\.0 changes what the model computes"),
        ({"residual_multiplier": 0.2}, r"residual_multiplier 0\.2 changes what the model computes"),
        ({"no_rope_layers": [1, 0]}, r"no_rope_layers \[1, 0\] changes"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config \(gptq\) is not supported"),
        ({"architectures": ["Qwen2ForCausalLM"], "attention_bias": False}, "attention_bias False has no"),
        ({"architectures": ["MistralForCausalLM"], "mlp_bias": True}, "mlp_bias True has no meaning"),
        (
            MISTRAL | {"layer_types": ["sliding_attention", "full_attention"]},
            "layer_types contradicts sliding_window 4096",
        ),
        (
            {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["chunked_attention"] * 2},
            "names chunked_attention",
        ),
        (
            {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["sliding_attention"] * 2},
            "use_sliding_window is not true",
        ),
        (
            MIXTRAL | {"num_local_experts": 2, "num_experts_per_tok": 3},
            "num_experts_per_tok 3 must be from 1 to the 2 experts",
        ),
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM is not supported"),
        ({"hidden_size": None}, "unusable entry"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, entries: dict[str, Any], named: str
) -> None:
    with pytest.raises(ModelError, match=named):
        config_of(tmp_path, **entries)


def test_values_that_change_nothing_are_accepted(tmp_path: Path) -> None:
    plain = config_of(tmp_path)
    entries = {"sliding_window": None, "logit_scale": 1.0, "attn_logit_softcapping": None}
    assert config_of(tmp_path, layer_types=["full_attention"] * 2, pretraining_tp=1, **entries) == plain


WINDOWS: list[tuple[dict[str, Any], dict[str, Any], tuple[int, tuple[int, ...]]]] = [
    (MISTRAL, {}, (4096, (0, 1))),
    (MISTRAL, {"sliding_window": 8}, (8, (0, 1))),
    (MISTRAL, {"sliding_window": None}, (0, ())),
    (MIXTRAL, {}, (0, ())),
    (MIXTRAL, {"sliding_window": 8}, (8, (0, 1))),
    ({"architectures": ["Qwen2ForCausalLM"]}, {"sliding_window": 8}, (0, ())),
    ({"architectures": ["Qwen2ForCausalLM"]}, {"sliding_window": 8, "use_sliding_window": True}, (0, ())),
    (
        {"architectures": ["Qwen2ForCausalLM"]},
        {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
        (8, (1,)),
    ),
    (
        {"architectures": ["Qwen3ForCausalLM"]},
        {
            "sliding_window": 8,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        (8, (0,)),
    ),
    ({"architectures": ["Qwen3MoeForCausalLM"]}, {"sliding_window": 8}, (0, ())),
    (
        {"architectures": ["Qwen3MoeForCausalLM"]},
        {"sliding_window": 8, "use_sliding_window": True},
        (8, (0, 1)),
    ),
]


@pytest.mark.parametrize(("family", "entries", "expected"), WINDOWS)
def test_window_and_its_layers_are_those_of_transformers(
    tmp_path: Path, family: dict[str, Any], entries: dict[str, Any], expected: tuple[int, tuple[int, ...]]
) -> None:
    config = config_of(tmp_path, **family, **entries)
    assert (config.window, config.window_layers) == expected
    assert [config.window_of(layer) for layer in range(2)] == [
        expected[0] if layer in expected[1] else 0 for layer in range(2)
    ]
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    raw = json.loads((tmp_path / "config.json").read_text())
    theirs = CONFIG_MAPPING[config.family.name](**{k: v for k, v in raw.items() if k != "architectures"})
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 2
    layers = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention" and theirs.sliding_window)
    assert layers == expected[1]
    assert (theirs.sliding_window if layers else 0) == expected[0]


def test_absent_entries_of_a_family_take_its_own_defaults(tmp_path: Path) -> None:
    qwen3 = config_of(tmp_path, architectures=["Qwen3ForCausalLM"])
    assert (qwen3.head_dim, qwen3.family.has_qk_norm, qwen3.qkv_bias) == (128, True, False)
    mixtral = config_of(tmp_path, architectures=["MixtralForCausalLM"], num_attention_heads=8)
    assert (mixtral.rope_theta, mixtral.rms_norm_eps, mixtral.num_kv_heads) == (1e6, 1e-5, 8)
    assert mixtral.experts is not None
    assert (mixtral.experts.count, mixtral.experts.per_token, mixtral.experts.is_normalised) == (8, 2, True)
    qwen2 = config_of(tmp_path, architectures=["Qwen2ForCausalLM"])
    assert (qwen2.qkv_bias, qwen2.o_bias) == (True, False)


def test_dense_layers_of_a_mixture_are_those_of_transformers(tmp_path: Path) -> None:
    entries = {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    config = config_of(tmp_path, architectures=["Qwen3MoeForCausalLM"], **entries)
    assert config.experts is not None
    assert config.experts.layers == {1, 5}


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_positions_end_where_frequencies_would_begin_to_depend_on_the_length(
    tmp_path: Path, kind: str
) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}
    scaling = {"rope_type": kind, "factor": 4.0, **(factors if kind == "longrope" else {})}
    assert config_of(tmp_path, rope_scaling=scaling).max_position_embeddings == (
        64 if kind == "longrope" else 256
    )


def test_a_folder_without_config_or_with_a_broken_one_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json not found"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        read_model_config(tmp_path)


def test_a_configuration_is_read_without_torch() -> None:
    code = "import sys, omniserve.model.families, omniserve.model.sources; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
