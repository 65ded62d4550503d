"""Rotary embedding: what config.json says of it (no torch needed), and the table that the decoder reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from omniserve.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

RopeKind = Literal["linear", "dynamic", "llama3", "yarn", "longrope", "divisors"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """A change of the rotary frequencies; a kind uses the fields that it needs.

    linear    all frequencies divided by `factor`
    llama3    long wavelengths stretched by `factor`, short ones kept, those between blended
    yarn      as llama3 with a ramp between `beta_fast` and `beta_slow` turns, and cos and sin times a factor
    divisors  each frequency divided by its own of `divisors` (hd/2): longrope within its original context,
              and the GGUF spelling of llama3
    """

    kind: Literal["linear", "llama3", "yarn", "divisors"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    divisors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Rope:
    """Base, scaling, and how many positions they are good for."""

    theta: float
    scaling: RopeScaling | None
    max_positions: int


def read_rope(raw: dict[str, Any], where: str) -> Rope:
    """The rotary embedding of a config.json. Raises ModelError naming what is not supported.

    Two kinds depend in transformers on the length that a text has reached, so that keys already kept change:
    `dynamic` beyond max_position_embeddings, `longrope` beyond original_max_position_embeddings. Positions
    end there for both, and below that they depend on nothing.
    """
    rope = _parameters(raw)
    limit = int(raw["max_position_embeddings"])
    theta = float(rope.get("rope_theta", 10000.0))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f"{where}: partial_rotary_factor {rope['partial_rotary_factor']} is not supported")
    # "type" is the key of checkpoints from before 2024.
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", *get_args(RopeKind)):
        supported = ", ".join(("default", *get_args(RopeKind)))
        raise ModelError(f"{where}: rope type {kind!r} is not supported; supported: {supported}")
    original = raw.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    original = int(original or limit)
    if kind == "longrope":
        return Rope(theta, _longrope(rope, limit, original), min(limit, original))
    return Rope(theta, _scaling(kind, rope, limit, original), limit)


def _parameters(raw: dict[str, Any]) -> dict[str, Any]:
    """One dict for both spellings: `rope_parameters` (transformers 5), `rope_theta` and `rope_scaling`."""
    rope: dict[str, Any] = dict(raw.get("rope_scaling") or {})
    rope.update(raw.get("rope_parameters") or {})
    for name in ("rope_theta", "partial_rotary_factor"):
        if name not in rope and raw.get(name) is not None:
            rope[name] = raw[name]
    return rope


def _scaling(kind: str, rope: dict[str, Any], limit: int, original: int) -> RopeScaling | None:
    match kind:
        case "linear":
            return RopeScaling("linear", factor=float(rope["factor"]))
        case "llama3":
            return RopeScaling(
                "llama3",
                factor=float(rope["factor"]),
                low_freq_factor=float(rope["low_freq_factor"]),
                high_freq_factor=float(rope["high_freq_factor"]),
                original_max_position_embeddings=original,
            )
        case "yarn":
            factor = float(rope.get("factor") or limit / original)
            return RopeScaling(
                "yarn",
                factor=factor,
                original_max_position_embeddings=original,
                beta_fast=float(rope.get("beta_fast") or 32),
                beta_slow=float(rope.get("beta_slow") or 1),
                truncate=bool(rope.get("truncate", True)),
                attention_factor=_yarn_attention_factor(rope, factor),
            )
        case "divisors":
            return RopeScaling("divisors", divisors=tuple(float(d) for d in rope["divisors"]))
        case _:  # default, and dynamic below its limit
            return None


def _yarn_attention_factor(rope: dict[str, Any], factor: float) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    given = rope.get("attention_factor")
    if given is not None:
        return float(given)
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    return scale(mscale) / scale(all_dim) if mscale and all_dim else scale(1.0)


def _longrope(rope: dict[str, Any], limit: int, original: int) -> RopeScaling:
    factor = float(rope.get("factor") or limit / original)
    given = rope.get("attention_factor")
    if given is None:
        given = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    divisors = tuple(float(d) for d in rope["short_factor"])
    return RopeScaling("divisors", attention_factor=float(given), divisors=divisors)


def rope_table(head_dim: int, theta: float, scaling: RopeScaling | None, num_positions: int) -> Tensor:
    """Rotary factors [2, num_positions, 1, 2, hd/2] float32: [0] is (cos, cos), [1] is (-sin, sin).

    Angles are rounded as in transformers' LlamaRotaryEmbedding (float32 position times float32 frequency), so
    that long positions agree to the last bit.
    """
    import torch

    frequencies = _frequencies(head_dim, theta, scaling)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    if scaling is not None and scaling.attention_factor != 1.0:
        cos, sin = cos * scaling.attention_factor, sin * scaling.attention_factor
    table = torch.stack((torch.stack((cos, cos), 1), torch.stack((-sin, sin), 1)))
    return table.unsqueeze(2)


def _frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians per position [hd/2] float32, after scaling."""
    import torch

    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    powers = theta**exponents
    frequencies = 1.0 / powers
    match scaling:
        case None:
            return frequencies
        case RopeScaling(kind="linear"):
            return frequencies / scaling.factor
        case RopeScaling(kind="llama3"):
            return _llama3(frequencies, scaling)
        case RopeScaling(kind="yarn"):
            return _yarn(powers, head_dim, theta, scaling)
    if len(scaling.divisors) != head_dim // 2:
        raise ModelError(
            f"rope: {len(scaling.divisors)} factors (short_factor, divisors) for {head_dim // 2} frequencies"
        )
    return 1.0 / (torch.tensor(scaling.divisors, dtype=torch.float32) * powers)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    import torch

    context = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    blend = (context / wavelengths - low) / (high - low)
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    middle_or_short = torch.where(wavelengths < context / high, frequencies, blended)
    return torch.where(wavelengths > context / low, frequencies / scaling.factor, middle_or_short)


def _yarn(powers: Tensor, head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Dimensions that turn often within the original context are kept, those that hardly turn stretched."""
    import torch

    def dimension_of(turns: float) -> float:
        context = scaling.original_max_position_embeddings
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    dimensions = torch.arange(head_dim // 2, dtype=torch.float32)
    kept = 1 - ((dimensions - low) / (high - low)).clamp(0, 1)
    return 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept
