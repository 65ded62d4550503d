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

from omniserve.config import Quantization
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
        shard: Shard = Shard(),
        all_reduce: AllReduce = identity,
    ) -> None:
        self.config = config
        self.shard = shard
        self.num_layers = config.num_layers
        self.num_heads = config.num_heads // shard.size
        self.num_kv_heads = config.num_kv_heads // shard.size
        self.head_dim = config.head_dim
        self.max_model_len = max_model_len
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        self.weight_bytes = weights.num_bytes
        self.quantization = weights.quantization
        self._weights = weights
        self._layers = weights.layers
        self._all_reduce = all_reduce
        self._eps = torch.tensor(config.rms_norm_eps, dtype=torch.float32, device=self.device)
        self._num_rotated = (self.num_heads + self.num_kv_heads) * self.head_dim
        self._q_size = self.num_heads * self.head_dim
        rope = rope_table(config.head_dim, config.rope_theta, config.rope_scaling, max_model_len)
        self._rope_table = rope.to(self.device, self.dtype)

    def embed(self, ids: Tensor) -> Tensor:
        """Rows x [n, H] of token ids [n] (int64 or int32)."""
        return self._weights.embedding.index_select(0, ids)

    def pre_attention(self, layer: int, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Norm, merged QKV projection, norms of q and k where the family has them, rotary embedding.

        x [n, H]; positions [n] int64, each below max_model_len. Returns q [n, h hd], k [n, kvh hd],
        v [n, kvh hd] as views of one buffer (equal row strides).
        """
        weights = self._layers[layer]
        normed = self._rms_norm(x, weights.input_norm)
        qkv = weights.qkv(normed)
        heads = qkv[:, : self._num_rotated].view(-1, self.num_heads + self.num_kv_heads, self.head_dim)
        if weights.qk_norm is not None:
            heads.copy_(self._rms_norm(heads, weights.qk_norm))
        qk = heads.view(-1, self.num_heads + self.num_kv_heads, 2, self.head_dim // 2)
        # x * cos + rotate_half(x) * sin, in place: the table holds cos twice, then -sin and sin, so that
        # rotate_half is the two halves swapped.
        cos, sin = self._rope_table.index_select(1, positions).unbind(0)
        swapped = qk.flip(2)
        qk.mul_(cos).addcmul_(swapped, sin)
        q_size, rotated = self._q_size, self._num_rotated
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
        """x / sqrt(mean(x^2) + eps) over the last dimension in float32, rounded to the model's dtype, then
        times weight, like transformers. F.rms_norm on CPU makes whole-row temporaries and rounds the other
        way in bfloat16."""
        wide = x.float()
        sum_of_squares = torch.linalg.vecdot(wide, wide).unsqueeze_(-1)
        scale = torch.add(self._eps, sum_of_squares, alpha=1.0 / x.shape[-1]).rsqrt_()
        return (wide * scale).to(self.dtype).mul_(weight)
