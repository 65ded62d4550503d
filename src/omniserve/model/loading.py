"""Checkpoint folder -> Decoder: tensors read piece by piece into merged, sharded weights.

Imports neither transformers nor any modelling code, which would take seconds of start-up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

import omniserve._native as _native
from omniserve.config import LoadFormat, Quantization
from omniserve.errors import ModelError
from omniserve.model.checkpoint import DummyTensors, LazyTensor, TensorSource, open_checkpoint
from omniserve.model.decoder import AllReduce, Decoder, DecoderWeights, LayerWeights, Shard, identity
from omniserve.model.families import ModelConfig, read_model_config
from omniserve.model.linear import Gated, Linear, WeightDType, make_gated, make_linear
from omniserve.model.mlp import ExpertsMlp, GatedMlp, Mlp
from omniserve.model.quantized_linear import Int4Linear
from omniserve.model.sources import ensure_model
from omniserve.model.tensors import expected_tensors

__all__ = ["ensure_model", "expected_tensors", "load_decoder"]

# How many missing or unexpected tensors an error names.
_NAMES_SHOWN = 5
# Bytes of a tensor that are read at once: what loading needs besides the weights and one merged tensor.
_PIECE_BYTES = 32 << 20
# A progress bar is shown from so many bytes of weights on.
_LONG_LOAD_BYTES = 1 << 30


class Advance(Protocol):
    """Told how many bytes of weights have been filled."""

    def __call__(self, num_bytes: int) -> None: ...


def load_decoder(
    path: Path,
    dtype: torch.dtype = torch.float32,
    shard: Shard = Shard(),  # noqa: B008 (frozen)
    all_reduce: AllReduce = identity,
    max_model_len: int | None = None,
    load_format: LoadFormat = "auto",
    show_progress: bool = False,
    team: _native.ThreadTeam | None = None,
    quantization: Quantization = "none",
) -> Decoder:
    """The decoder of checkpoint folder `path`, this shard's slice, converted to `dtype`, for the CPU device.

    `max_model_len` bounds positions (None: as many as the checkpoint is good for). `all_reduce` sums a
    tensor over the shards and returns one that the caller may write. `load_format` "dummy" needs config.json
    alone and makes random weights. `show_progress` draws a bar on standard error when it is a terminal and
    there is much to load. `team` are the device's threads (None: as many as torch has).
    `quantization` rounds each matrix as soon as it is read. Raises ModelError naming missing, unexpected or
    misshapen tensors, ConfigError for quantised weights off the CPU.
    """
    config = read_model_config(path)
    shapes = expected_tensors(config)
    source: TensorSource
    if load_format == "dummy":
        source = DummyTensors(list(shapes), shapes.__getitem__)
    else:
        source = open_checkpoint(path, config)
    total = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize // shard.size
    with source, _progress(total, show_progress, path.name) as advance:
        team = team or _native.ThreadTeam(torch.get_num_threads())
        filler = _Filler(config, source, shard, dtype, advance, team, quantization)
        weights = filler.decoder_weights()
        filler.refuse_unexpected()
    limit = config.max_position_embeddings if max_model_len is None else max_model_len
    return Decoder(config, weights, limit, team, shard, all_reduce)


# How matrices are kept; None: as they come. The output matrix is int8 where the rest is int4: its rounding
# errs in the logits themselves.
_KEPT_AS: dict[Quantization, WeightDType | None] = {
    "none": None,
    "bfloat16": "bfloat16",
    "int8": "int8",
    "int4": "int8",
}


class _Filler:
    """Allocates merged tensors and fills them. Remembers what it used, to name what it did not."""

    def __init__(
        self,
        config: ModelConfig,
        source: TensorSource,
        shard: Shard,
        dtype: torch.dtype,
        advance: Advance,
        team: _native.ThreadTeam,
        quantization: Quantization,
    ) -> None:
        self.config = config
        self.team = team
        self.quantization = quantization
        self.kept_as = _KEPT_AS[quantization]
        self.source = source
        self.shard = shard
        self.dtype = dtype
        self.advance = advance
        self.shapes = expected_tensors(config)
        self.used: set[str] = set()
        self.num_bytes = 0
        hd = config.head_dim
        self.heads = shard.of(config.num_heads, "num_attention_heads")
        self.kv_heads = shard.of(config.num_kv_heads, "num_key_value_heads")
        self.q_rows = slice(self.heads.start * hd, self.heads.stop * hd)
        self.kv_rows = slice(self.kv_heads.start * hd, self.kv_heads.stop * hd)
        self._refuse_missing()

    def decoder_weights(self) -> DecoderWeights:
        c, family = self.config, self.config.family
        embedding = self._counted_tensor(self._whole(family.embedding))
        final_norm = self._counted_tensor(self._whole(family.final_norm))
        if c.tie_word_embeddings:
            # Some checkpoints write the tied tensor twice.
            self.used.add(family.lm_head)
            head_weight = embedding
        else:
            head_weight = self._whole(family.lm_head)
        lm_head = self._counted(make_linear(head_weight, None, self.team, self.kept_as))
        del head_weight
        layers = [self._layer(layer) for layer in range(c.num_layers)]
        return DecoderWeights(embedding, final_norm, lm_head, layers, self.num_bytes, self.quantization)

    def refuse_unexpected(self) -> None:
        """Raise when the checkpoint holds tensors that this family has no place for: it is something else."""
        ignored = self.config.family.ignored_suffixes
        left = [n for n in self.source.names() if n not in self.used and not n.endswith(ignored)]
        if left:
            raise ModelError(f"{self.source.where}: {_count(left, 'unexpected tensor')}")

    def _refuse_missing(self) -> None:
        missing = [name for name in self.shapes if name not in self.source]
        if missing:
            raise ModelError(f"{self.source.where}: {_count(missing, 'missing tensor')}")

    # ------------------------------------------------------------ one layer

    def _layer(self, layer: int) -> LayerWeights:
        c, f = self.config, self.config.family
        prefix = f.layer_prefix.format(layer=layer)
        qkv = [(prefix + f.q, self.q_rows), (prefix + f.k, self.kv_rows), (prefix + f.v, self.kv_rows)]
        return LayerWeights(
            input_norm=self._counted_tensor(self._whole(prefix + f.input_norm)),
            qkv=self._column_parallel(qkv, c.qkv_bias),
            o=self._row_parallel(prefix + f.o, self.q_rows, c.o_bias),
            post_norm=self._counted_tensor(self._whole(prefix + f.post_norm)),
            mlp=self._mlp(layer, prefix),
            qk_norm=self._counted_tensor(self._qk_norm(prefix)) if f.has_qk_norm else None,
        )

    def _qk_norm(self, prefix: str) -> Tensor:
        """[own heads + own KV heads, hd]: each head's factors, so that all are applied at once."""
        hd, family = self.config.head_dim, self.config.family
        num_heads, num_kv_heads = (part.stop - part.start for part in (self.heads, self.kv_heads))
        norms = self._empty((num_heads + num_kv_heads, hd))
        for name, rows in ((family.q_norm, norms[:num_heads]), (family.k_norm, norms[num_heads:])):
            self._fill(rows[0], self._open(prefix + name))
            rows.copy_(rows[:1].clone().expand_as(rows))
        return norms

    def _mlp(self, layer: int, prefix: str) -> Mlp:
        c, f = self.config, self.config.family
        if c.experts is None or f.experts is None or layer not in c.experts.layers:
            return self._gated_mlp(prefix, (f.gate, f.up, f.down), c.intermediate_size)
        names, size = f.experts, c.experts.intermediate_size
        projections = (names.gate, names.up, names.down)
        return ExpertsMlp(
            router=self._counted(make_linear(self._whole(prefix + names.router), None, self.team)),
            experts=[
                self._gated_mlp(prefix + names.expert.format(expert=expert), projections, size)
                for expert in range(c.experts.count)
            ],
            per_token=c.experts.per_token,
            is_normalised=c.experts.is_normalised,
        )

    def _gated_mlp(self, prefix: str, names: tuple[str, str, str], size: int) -> GatedMlp:
        own = self.shard.of(size, "intermediate_size")
        gate, up, down = (prefix + name for name in names)
        return GatedMlp(
            gate_up=self._gated([(gate, own), (up, own)], self.config.mlp_bias),
            down=self._row_parallel(down, own, self.config.mlp_bias),
        )

    # ------------------------------------------------------------ one tensor

    def _column_parallel(self, parts: list[tuple[str, slice]], has_bias: bool) -> Linear:
        """Projections under each other: of each of `parts` (name, own rows) its own rows."""
        weight = self._merged(parts, ".weight")
        return self._linear(weight, self._merged(parts, ".bias") if has_bias else None)

    def _gated(self, parts: list[tuple[str, slice]], has_bias: bool) -> Linear:
        """The gate and what it multiplies, of each of `parts` (name, own rows) its own rows."""
        gate, up = (self._merged([part], ".weight") for part in parts)
        biases = None
        if has_bias:
            biases = self._merged(parts[:1], ".bias"), self._merged(parts[1:], ".bias")
        if self.quantization == "int4":
            gate_bias, up_bias = biases or (None, None)
            return Gated(self._linear(gate, gate_bias), self._linear(up, up_bias))
        return self._counted(make_gated(gate, up, biases, self.team, self.kept_as))

    def _merged(self, parts: list[tuple[str, slice]], suffix: str) -> Tensor:
        row_shape = self.shapes[parts[0][0] + suffix][1:]
        merged = self._empty((sum(own.stop - own.start for _, own in parts), *row_shape))
        row = 0
        for name, own in parts:
            end = row + own.stop - own.start
            self._fill(merged[row:end], self._open(name + suffix), rows=own)
            row = end
        return merged

    def _row_parallel(self, name: str, own: slice, has_bias: bool) -> Linear:
        """Projection of the columns `own`."""
        lazy = self._open(name + ".weight")
        weight = self._empty((lazy.shape[0], own.stop - own.start))
        self._fill(weight, lazy, columns=own)
        bias = self._whole(name + ".bias") if has_bias else None
        return self._linear(weight, bias if self.shard.rank == 0 else None)

    def _whole(self, name: str) -> Tensor:
        lazy = self._open(name)
        tensor = self._empty(lazy.shape)
        self._fill(tensor, lazy)
        return tensor

    def _fill(
        self, target: Tensor, lazy: LazyTensor, rows: slice | None = None, columns: slice | None = None
    ) -> None:
        """Read into `target`, some rows at a time: a large tensor is never in memory twice."""
        rows = rows or slice(0, lazy.shape[0])
        columns = columns or slice(0, lazy.shape[-1])
        row_bytes = 4 if target.dim() == 1 else 4 * lazy.shape[1]  # what is read may be float32
        step = max(1, _PIECE_BYTES // row_bytes)
        for first in range(rows.start, rows.stop, step):
            last = min(rows.stop, first + step)
            piece = lazy.read(slice(first, last), columns)
            target[first - rows.start : last - rows.start].copy_(piece)
            self.advance(num_bytes=piece.numel() * self.dtype.itemsize)

    def _open(self, name: str) -> LazyTensor:
        self.used.add(name)
        lazy, expected = self.source.open(name), self.shapes[name]
        if lazy.shape != expected:
            raise ModelError(
                f"{self.source.where}: tensor {name} has shape {lazy.shape}, config.json says {expected}"
            )
        return lazy

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self.dtype)

    def _counted_tensor(self, tensor: Tensor) -> Tensor:
        self.num_bytes += tensor.nbytes
        return tensor

    def _linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        if self.quantization == "int4":
            return self._counted(Int4Linear(weight, bias))
        return self._counted(make_linear(weight, bias, self.team, self.kept_as))

    def _counted(self, linear: Linear) -> Linear:
        self.num_bytes += linear.num_bytes
        return linear


def _count(names: list[str], what: str) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''}: {shown}{more}"


@contextmanager
def _progress(total: int, is_wanted: bool, name: str) -> Iterator[Advance]:
    """A bar of `total` bytes on standard error; nothing for short loads and where nobody looks."""
    from rich.console import Console

    console = Console(stderr=True)
    if not is_wanted or total < _LONG_LOAD_BYTES or not console.is_terminal:
        yield lambda num_bytes: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(f"loading {name}", total=total)
        yield lambda num_bytes: bars.advance(task, num_bytes)
