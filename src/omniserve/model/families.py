"""The shape of one checkpoint, read from its config.json; what would be ignored is refused by name.

Needs neither torch nor transformers, so that a front end can know a model without loading it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omniserve.errors import ModelError
from omniserve.model.known_families import FAMILIES, Family
from omniserve.model.rope import RopeScaling, read_rope

# Entries that change what a model computes and that no family here implements, with the values that change
# nothing. Absent and null are fine too.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "alibi": (False,),
    "attention_chunk_size": (),
    "attention_multiplier": (),
    "attention_sink": (False,),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1.0,),
    "final_logit_softcapping": (),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "n_shared_experts": (0,),
    "no_rope_layers": (),
    "norm_type": ("rms", "rmsnorm", "rms_norm"),
    "parallel_attn": (False,),
    "qk_layernorm": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1.0,),
    "rope_interleaved": (False,),
    "scale_depth": (1.0,),
    "scale_emb": (1.0,),
    "shared_expert_intermediate_size": (0,),
    "tie_encoder_decoder": (False,),
    "use_alibi": (False,),
    "use_mrope": (False,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
}


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts: in layers `layers`, each row goes through `per_token` of `count` experts."""

    count: int
    per_token: int
    intermediate_size: int
    is_normalised: bool
    layers: frozenset[int]


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
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    # In `window_layers` a token attends to the last `window` tokens, itself included; 0: no layer has one.
    window: int
    window_layers: tuple[int, ...]
    experts: Experts | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def window_of(self, layer: int) -> int:
        """The layer's window in tokens, 0 for none."""
        return self.window if layer in self.window_layers else 0


def read_model_config(path: Path) -> ModelConfig:
    """The configuration of the checkpoint in folder `path`.

    End-of-text ids come from generation_config.json where it names them, else from config.json, which is
    what `transformers.generate` does. Raises ModelError when the folder holds no usable config.json, or one
    of a family, or with an entry, that is not supported.
    """
    raw = _read_json(path / "config.json")
    if raw is None:
        raise ModelError(f"{path}: config.json not found; a model folder needs config.json and *.safetensors")
    generation = _read_json(path / "generation_config.json") or {}
    where = str(path / "config.json")
    try:
        return _parse(raw, generation, where)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{where}: unusable entry: {error!r}") from error


def _parse(raw: dict[str, Any], generation: dict[str, Any], where: str) -> ModelConfig:
    family = _family(raw, where)
    raw = {**family.defaults, **{key: value for key, value in raw.items() if _is_set(family, key, value)}}
    _refuse_other_maths(raw, family, where)
    num_heads = int(raw["num_attention_heads"])
    num_kv_heads = int(raw.get("num_key_value_heads") or num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"{where}: num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}"
        )
    hidden_size, num_layers = int(raw["hidden_size"]), int(raw["num_hidden_layers"])
    rope = read_rope(raw, where)
    window, window_layers = _window(raw, family, num_layers, where)
    attention_bias = bool(raw.get("attention_bias", False))
    eos = generation.get("eos_token_id")
    return ModelConfig(
        family=family,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=int(raw.get("head_dim") or hidden_size // num_heads),
        intermediate_size=int(raw["intermediate_size"]),
        vocab_size=int(raw["vocab_size"]),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        max_position_embeddings=rope.max_positions,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=attention_bias if family.o_bias is None else family.o_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        window=window,
        window_layers=window_layers,
        experts=_experts(raw, family, num_layers, where),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=_token_ids(raw.get("eos_token_id") if eos is None else eos),
    )


def _is_set(family: Family, key: str, value: Any) -> bool:
    """Whether an entry counts: null means the default, but for sliding_window, where it means none."""
    return value is not None or key == "sliding_window" or key not in family.defaults


def _family(raw: dict[str, Any], where: str) -> Family:
    names = raw.get("architectures") or [
        family.architecture for family in FAMILIES.values() if family.name == raw.get("model_type")
    ]
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    found = ", ".join(names) or f"model_type {raw.get('model_type')!r}"
    raise ModelError(f"{where}: architecture {found} is not supported; supported: {', '.join(FAMILIES)}")


def _refuse_other_maths(raw: dict[str, Any], family: Family, where: str) -> None:
    """Raise for an entry that changes the result and that nobody here would heed."""
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(f"{where}: hidden_act {activation!r} is not supported; supported: silu")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method")
        raise ModelError(
            f"{where}: quantization_config ({method}) is not supported; use the unquantised checkpoint, or a"
            " GGUF file"
        )
    for key, neutral in _NEUTRAL.items():
        value = raw.get(key)
        if value is not None and value not in neutral:
            raise ModelError(f"{where}: {key} {value!r} changes what the model computes and is not supported")
    foreign = []
    if family.qkv_bias is not None and raw.get("attention_bias", family.qkv_bias) != family.qkv_bias:
        foreign.append("attention_bias")
    if not family.has_mlp_bias and raw.get("mlp_bias"):
        foreign.append("mlp_bias")
    if family.window_layers == "none" and raw.get("sliding_window") and raw.get("use_sliding_window", True):
        foreign.append("sliding_window")
    if family.experts is None:
        foreign += [key for key in ("num_local_experts", "num_experts") if raw.get(key)]
    for key in foreign:
        raise ModelError(f"{where}: {key} {raw[key]!r} has no meaning for {family.architecture}")


def _window(raw: dict[str, Any], family: Family, num_layers: int, where: str) -> tuple[int, tuple[int, ...]]:
    """Tokens of the sliding window and the layers that have it."""
    window = int(raw.get("sliding_window") or 0)
    is_used = bool(raw.get("use_sliding_window", False))
    kinds = raw.get("layer_types")
    if kinds is not None:
        unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if unknown or len(kinds) != num_layers:
            raise ModelError(
                f"{where}: layer_types must name full_attention or sliding_attention for each of {num_layers}"
                f" layers; it has {len(kinds)} entries{' and names ' + ', '.join(unknown) if unknown else ''}"
            )
    match family.window_layers:
        case "all":
            layers = range(num_layers) if window else range(0)
        case "if used":
            layers = range(num_layers) if window and is_used else range(0)
        case "named":
            layers = range(int(raw["max_window_layers"]), num_layers) if window and is_used else range(0)
        case "none":
            layers = range(0)
    named = tuple(layers)
    if kinds is not None:
        from_kinds = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
        if family.window_layers == "named":
            named = from_kinds
        elif from_kinds != named:
            raise ModelError(f"{where}: layer_types contradicts sliding_window {raw.get('sliding_window')!r}")
    if named and window < 1:
        raise ModelError(f"{where}: layer_types names sliding_attention, but sliding_window is {window}")
    if named and family.window_layers == "named" and not is_used:
        raise ModelError(f"{where}: layer_types names sliding_attention, but use_sliding_window is not true")
    return (window, named) if named else (0, ())


def _experts(raw: dict[str, Any], family: Family, num_layers: int, where: str) -> Experts | None:
    names = family.experts
    if names is None:
        return None
    # Mixtral's count has two names in transformers.
    count = int(raw.get(names.count_field) or raw["num_experts"])
    per_token = int(raw["num_experts_per_tok"])
    step, dense = int(raw.get("decoder_sparse_step", 1)), raw.get("mlp_only_layers") or ()
    layers = frozenset(i for i in range(num_layers) if i not in dense and (i + 1) % step == 0)
    if not 1 <= per_token <= count:
        raise ModelError(f"{where}: num_experts_per_tok {per_token} must be from 1 to the {count} experts")
    normalised = names.is_normalised
    return Experts(
        count=count,
        per_token=per_token,
        intermediate_size=int(raw[names.size_field]),
        is_normalised=bool(raw.get("norm_topk_prob", False)) if normalised is None else normalised,
        layers=layers,
    )


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
