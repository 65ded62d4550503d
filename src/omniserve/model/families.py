"""Model families as data, and the shape of one checkpoint read from its config.json.

Needs neither torch nor transformers, so that a front end can know a model without loading it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omniserve.errors import ModelError


@dataclass(frozen=True, slots=True)
class Family:
    """How one family names its tensors. Projections get `.weight` (and `.bias` where the config has one).

    `layer_prefix` is formatted with the layer number and put before every per-layer name.
    """

    name: str
    architecture: str
    embedding: str
    final_norm: str
    lm_head: str
    layer_prefix: str
    input_norm: str
    q: str
    k: str
    v: str
    o: str
    post_norm: str
    gate: str
    up: str
    down: str
    # Tensors that old checkpoints carry and nobody needs.
    ignored_suffixes: tuple[str, ...] = ()


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    embedding="model.embed_tokens.weight",
    final_norm="model.norm.weight",
    lm_head="lm_head.weight",
    layer_prefix="model.layers.{layer}.",
    input_norm="input_layernorm.weight",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.o_proj",
    post_norm="post_attention_layernorm.weight",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    ignored_suffixes=("rotary_emb.inv_freq",),
)

FAMILIES: Mapping[str, Family] = {family.architecture: family for family in (LLAMA,)}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """A change of the rotary frequencies. `linear` uses `factor` alone; `llama3` uses every field."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and constants of one checkpoint. Counts and sizes are those of the whole, unsharded model."""

    family: Family
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


def read_model_config(path: Path) -> ModelConfig:
    """The configuration of the checkpoint in folder `path`.

    End-of-text ids come from generation_config.json where it names them, else from config.json, which is
    what `transformers.generate` does. Raises ModelError when the folder holds no usable config.json, or one
    of a family, activation or rotary scaling that is not supported.
    """
    raw = _read_json(path / "config.json")
    if raw is None:
        raise ModelError(f"{path}: config.json not found; a model folder needs config.json and *.safetensors")
    generation = _read_json(path / "generation_config.json") or {}
    try:
        return _parse(raw, generation, where=str(path / "config.json"))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path / 'config.json'}: unusable entry: {error!r}") from error


def _parse(raw: dict[str, Any], generation: dict[str, Any], where: str) -> ModelConfig:
    family = _family(raw, where)
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(f"{where}: hidden_act {activation!r} is not supported; supported: silu")
    num_heads = int(raw["num_attention_heads"])
    num_kv_heads = int(raw.get("num_key_value_heads") or num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"{where}: num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}"
        )
    hidden_size = int(raw["hidden_size"])
    rope = _rope_parameters(raw)
    eos = generation.get("eos_token_id")
    return ModelConfig(
        family=family,
        hidden_size=hidden_size,
        num_layers=int(raw["num_hidden_layers"]),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=int(raw.get("head_dim") or hidden_size // num_heads),
        intermediate_size=int(raw["intermediate_size"]),
        vocab_size=int(raw["vocab_size"]),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        rope_scaling=_rope_scaling(rope, int(raw["max_position_embeddings"]), where),
        max_position_embeddings=int(raw["max_position_embeddings"]),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=bool(raw.get("attention_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=_token_ids(raw.get("eos_token_id") if eos is None else eos),
    )


def _family(raw: dict[str, Any], where: str) -> Family:
    names = raw.get("architectures") or ([LLAMA.architecture] if raw.get("model_type") == "llama" else [])
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    found = ", ".join(names) or f"model_type {raw.get('model_type')!r}"
    raise ModelError(f"{where}: architecture {found} is not supported; supported: {', '.join(FAMILIES)}")


def _rope_parameters(raw: dict[str, Any]) -> dict[str, Any]:
    """One dict for both spellings: `rope_parameters` (transformers 5), `rope_theta` and `rope_scaling`."""
    rope: dict[str, Any] = dict(raw.get("rope_scaling") or {})
    rope.update(raw.get("rope_parameters") or {})
    if "rope_theta" not in rope and raw.get("rope_theta") is not None:
        rope["rope_theta"] = raw["rope_theta"]
    return rope


def _rope_scaling(rope: dict[str, Any], max_position_embeddings: int, where: str) -> RopeScaling | None:
    # "type" is the key of checkpoints from before 2024.
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f"{where}: partial_rotary_factor {rope['partial_rotary_factor']} is not supported")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=float(rope["factor"]))
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_position_embeddings=int(
                rope.get("original_max_position_embeddings") or max_position_embeddings
            ),
        )
    raise ModelError(f"{where}: rope type {kind!r} is not supported; supported: default, linear, llama3")


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value
