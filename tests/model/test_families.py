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
            {"rope_scaling": {"type": "yarn", "factor": 4}},
            "'yarn' is not supported; supported: default, linear",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor 0.5",
        ),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"hidden_size": None}, "unusable entry"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, entries: dict[str, Any], named: str
) -> None:
    with pytest.raises(ModelError, match=named):
        config_of(tmp_path, **entries)


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
