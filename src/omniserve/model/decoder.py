"""A decoder-only transformer in calls that leave attention to the caller (docs/design.md, "Lanes").

One layer: q, k, v = pre_attention(l, x, positions); attention somewhere; x = post_attention(l, attn, x).
Rows are independent of each other in every call, so rows of different requests, and best-effort rows that
sit at this layer by chance, share one GEMM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import omniserve._native as _native
from omniserve.config import Quantization
from omniserve.dtypes import dtype_name
from omniserve.errors import ModelError
from omniserve.model.families import ModelConfig
from omniserve.model.linear import Linear
from omniserve.model.mlp import Mlp
from omniserve.model.rope import rope_table

AllReduce = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    """The all-reduce of a model that is not sharded."""
    return x


@dataclass(frozen=True, slots=True)
class Shard:
    """Which slice of heads and of the intermediate size this process holds: slice `rank` of `size`."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ModelError(f"shard: rank {self.rank} is not within 0..{self.size - 1}")

    def of(self, count: int, what: str) -> slice:
        """This shard's equal part of `count` things. Raises ModelError when they do not divide."""
        if count % self.size:
            raise ModelError(f"shard: {what} {count} cannot be divided by {self.size}")
        part = count // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


@dataclass(slots=True)
class LayerWeights:
    """One layer, merged and sharded. h, kvh are the shard's own heads and KV heads.

    Projections carry their biases; those of the row-parallel ones (o, down) live on rank 0 alone, so that the
    all-reduce adds them once.
    """

    input_norm: Tensor  # [H]
    qkv: Linear  # H -> (h + 2 kvh) hd
    o: Linear  # h hd -> H
    post_norm: Tensor  # [H]
    mlp: Mlp  # H -> H
    qk_norm: Tensor | None = None  # [h + kvh, hd], where heads of q and k are normalised


@dataclass(slots=True)
class DecoderWeights:
    """All weights of one shard. `num_bytes` counts every copy that is kept."""

    embedding: Tensor  # [vocab, H]
    final_norm: Tensor  # [H]
    lm_head: Linear  # H -> vocab
    layers: list[LayerWeights]
    num_bytes: int
    quantization: Quantization = "none"


class Decoder:
    """Plain tensors and four calls. Callers wrap their loop in `torch.inference_mode()`.

    H is the hidden size, hd the head size; `num_heads` and `num_kv_heads` are this shard's own. Every result
    is new memory or a view of it: inputs are never written. q, k, v and views passed in may have any row
    stride; the last dimension is contiguous.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        max_model_len: int,
        team: _native.ThreadTeam,
        shard: Shard = Shard(),
        all_reduce: AllReduce = identity,
    ) -> None:
        """team: the threads of a CPU device, the caller among them."""
        self.config = config
        self.shard = shard
        self.num_layers = config.num_layers
        self.num_heads = config.num_heads // shard.size
        self.num_kv_heads = config.num_kv_heads // shard.size
        self.head_dim = config.head_dim
        self.max_model_len = max_model_len
        self.team = team
        self.dtype = weights.embedding.dtype
        self.weight_bytes = weights.num_bytes
        self.quantization = weights.quantization
        self._weights = weights
        self._layers = weights.layers
        self._all_reduce = all_reduce
        self._eps = config.rms_norm_eps
        self._dtype_name = dtype_name(self.dtype)
        self._rotated_size = (self.num_heads + self.num_kv_heads) * self.head_dim
        self._q_size = self.num_heads * self.head_dim
        rope = rope_table(config.head_dim, config.rope_theta, config.rope_scaling, max_model_len)
        self._cos, self._sin = rope.to(self.dtype).unbind(0)

    def embed(self, ids: Tensor) -> Tensor:
        """Rows x [n, H] of token ids [n] (int64 or int32)."""
        return self._weights.embedding.index_select(0, ids)

    def pre_attention(self, layer: int, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Norm, merged QKV projection, norms of q and k where the family has them, rotary embedding.

        x [n, H]; positions [n] int64, contiguous, each below max_model_len. Returns q [n, h hd],
        k [n, kvh hd], v [n, kvh hd] as views of one buffer (equal row strides).
        """
        weights = self._layers[layer]
        qkv = weights.qkv(self._rms_norm(x, weights.input_norm))
        num_rotated = self.num_heads + self.num_kv_heads
        if weights.qk_norm is not None:
            self._norm_parts(qkv, num_rotated, weights.qk_norm, qkv)
        _native.rotate_heads(
            x.shape[0],
            num_rotated,
            self.head_dim,
            qkv.data_ptr(),
            qkv.stride(0),
            self._cos.data_ptr(),
            self._sin.data_ptr(),
            positions.data_ptr(),
            self._dtype_name,
        )
        q_size, rotated = self._q_size, self._rotated_size
        return qkv[:, :q_size], qkv[:, q_size:rotated], qkv[:, rotated:]

    def post_attention(self, layer: int, attn: Tensor, residual: Tensor) -> Tensor:
        """Output projection, residual, norm, MLP, residual.

        attn [n, h hd] in the model's dtype; residual [n, H] is the x that went into pre_attention(layer).
        Returns the next layer's x [n, H].
        """
        weights = self._layers[layer]
        x = self._all_reduce(weights.o(attn)).add_(residual)
        normed = self._rms_norm(x, weights.post_norm)
        return self._all_reduce(weights.mlp(normed)).add_(x)

    def logits(self, x: Tensor) -> Tensor:
        """Logits [n, vocab] float32 of rows x [n, H] from the last layer. The vocabulary is not sharded."""
        normed = self._rms_norm(x, self._weights.final_norm)
        return self._weights.lm_head(normed).float()

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension of x [n, H]."""
        normed = torch.empty_like(x)
        self._norm_parts(x, 1, weight, normed)
        return normed

    def _norm_parts(self, x: Tensor, groups: int, weight: Tensor, out: Tensor) -> None:
        """The first `groups` parts of each row, as long as weight's last dimension, each on its own."""
        _native.rms_norm(
            x.shape[0],
            groups,
            weight.shape[-1],
            x.data_ptr(),
            x.stride(0),
            weight.data_ptr(),
            self._eps,
            out.data_ptr(),
            out.stride(0),
            self._dtype_name,
        )
