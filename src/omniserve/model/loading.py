"""Checkpoint folder -> Decoder: safetensors, read one tensor at a time into merged, sharded weights.

Imports neither transformers nor any modelling code, which would take seconds of start-up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from omniserve.errors import ModelError
from omniserve.model.decoder import AllReduce, Decoder, DecoderWeights, LayerWeights, Shard, identity
from omniserve.model.families import ModelConfig, read_model_config
from omniserve.model.linear import Linear, PackedLinear, make_linear
from omniserve.model.sources import ensure_model

__all__ = ["ensure_model", "load_decoder"]

# How many missing or unexpected tensors an error names.
_NAMES_SHOWN = 5


def load_decoder(
    path: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    shard: Shard = Shard(),  # noqa: B008 (frozen)
    all_reduce: AllReduce = identity,
    max_model_len: int | None = None,
) -> Decoder:
    """The decoder of checkpoint folder `path`, this shard's slice, converted to `dtype` on `device`.

    `max_model_len` bounds positions (None: the checkpoint's max_position_embeddings). `all_reduce` sums a
    tensor over the shards and returns one that the caller may write. Raises ModelError naming missing,
    unexpected or misshapen tensors.
    """
    config = read_model_config(path)
    with Checkpoint(path) as checkpoint:
        filler = _Filler(config, checkpoint, shard, dtype, torch.device(device))
        weights = filler.decoder_weights()
        filler.refuse_unexpected()
    limit = config.max_position_embeddings if max_model_len is None else max_model_len
    return Decoder(config, weights, limit, shard, all_reduce)


class Checkpoint:
    """A folder's tensors by name, from one safetensors file or several with an index. Context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stack = ExitStack()
        self._owner: dict[str, Any] = {}

    def __enter__(self) -> Checkpoint:
        try:
            for file in _safetensors_files(self.path):
                opened = self._stack.enter_context(safe_open(file, framework="pt", device="cpu"))
                self._owner.update(dict.fromkeys(opened.keys(), opened))
        except (OSError, SafetensorError) as error:
            self._stack.close()
            raise ModelError(f"{self.path}: weights cannot be read: {error}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def names(self) -> Iterator[str]:
        return iter(self._owner)

    def __contains__(self, name: str) -> bool:
        return name in self._owner

    def slice(self, name: str) -> Any:
        """A lazy safetensors slice of one tensor: nothing is read before it is indexed."""
        return self._owner[name].get_slice(name)


def _safetensors_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index}: not a safetensors index: {error!r}") from error
        return [path / name for name in files]
    single = path / "model.safetensors"
    if not single.is_file():
        raise ModelError(f"{path}: neither model.safetensors nor model.safetensors.index.json found")
    return [single]


class _Filler:
    """Allocates merged tensors and fills them. Remembers what it used, to name what it did not."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        shard: Shard,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config = config
        self.checkpoint = checkpoint
        self.shard = shard
        self.dtype = dtype
        self.device = device
        self.used: set[str] = set()
        self.num_bytes = 0
        hd = config.head_dim
        heads = shard.of(config.num_heads, "num_attention_heads")
        kv_heads = shard.of(config.num_kv_heads, "num_key_value_heads")
        self.q_rows = slice(heads.start * hd, heads.stop * hd)
        self.kv_rows = slice(kv_heads.start * hd, kv_heads.stop * hd)
        self.mlp_rows = shard.of(config.intermediate_size, "intermediate_size")
        self._refuse_missing()

    def decoder_weights(self) -> DecoderWeights:
        c, family = self.config, self.config.family
        embedding = self._whole(family.embedding, (c.vocab_size, c.hidden_size))
        final_norm = self._whole(family.final_norm, (c.hidden_size,))
        if c.tie_word_embeddings:
            # Some checkpoints write the tied tensor twice.
            self.used.add(family.lm_head)
            head_weight = embedding
        else:
            head_weight = self._whole(family.lm_head, (c.vocab_size, c.hidden_size))
        lm_head = make_linear(head_weight)
        if c.tie_word_embeddings and isinstance(lm_head, PackedLinear):
            self.num_bytes += head_weight.nbytes
        layers = [self._layer(layer) for layer in range(c.num_layers)]
        return DecoderWeights(embedding, final_norm, lm_head, layers, self.num_bytes)

    def refuse_unexpected(self) -> None:
        """Raise when the checkpoint holds tensors that this family has no place for: it is something else."""
        ignored = self.config.family.ignored_suffixes
        left = [n for n in self.checkpoint.names() if n not in self.used and not n.endswith(ignored)]
        if left:
            raise ModelError(f"{self.checkpoint.path}: {_count(left, 'unexpected tensor')}")

    def _layer(self, layer: int) -> LayerWeights:
        c, f = self.config, self.config.family
        prefix = f.layer_prefix.format(layer=layer)
        q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        qkv = [
            (prefix + f.q, q_size, self.q_rows),
            (prefix + f.k, kv_size, self.kv_rows),
            (prefix + f.v, kv_size, self.kv_rows),
        ]
        gate_up = [(prefix + name, c.intermediate_size, self.mlp_rows) for name in (f.gate, f.up)]
        return LayerWeights(
            input_norm=self._whole(prefix + f.input_norm, (c.hidden_size,)),
            qkv=self._column_parallel(qkv, c.attention_bias),
            o=self._row_parallel(prefix + f.o, q_size, self.q_rows, c.attention_bias),
            post_norm=self._whole(prefix + f.post_norm, (c.hidden_size,)),
            gate_up=self._column_parallel(gate_up, c.mlp_bias),
            down=self._row_parallel(prefix + f.down, c.intermediate_size, self.mlp_rows, c.mlp_bias),
        )

    def _column_parallel(self, parts: list[tuple[str, int, slice]], has_bias: bool) -> Linear:
        """Projections under each other: of each of `parts` (name, rows, own rows) its own rows."""
        weight = self._merged(parts, ".weight", (self.config.hidden_size,))
        return make_linear(weight, self._merged(parts, ".bias", ()) if has_bias else None)

    def _merged(self, parts: list[tuple[str, int, slice]], suffix: str, row_shape: tuple[int, ...]) -> Tensor:
        merged = self._empty((sum(own.stop - own.start for _, _, own in parts), *row_shape))
        row = 0
        for name, num_rows, own in parts:
            end = row + own.stop - own.start
            merged[row:end].copy_(self._open(name + suffix, (num_rows, *row_shape))[own])
            row = end
        return merged

    def _row_parallel(self, name: str, num_columns: int, own: slice, has_bias: bool) -> Linear:
        """Projection of the columns `own` of `num_columns`."""
        lazy = self._open(name + ".weight", (self.config.hidden_size, num_columns))
        weight = self._empty((self.config.hidden_size, own.stop - own.start)).copy_(lazy[:, own])
        bias = self._whole(name + ".bias", (self.config.hidden_size,)) if has_bias else None
        return make_linear(weight, bias if self.shard.rank == 0 else None)

    def _whole(self, name: str, shape: tuple[int, ...]) -> Tensor:
        lazy = self._open(name, shape)
        return self._empty(shape).copy_(lazy[:])

    def _open(self, name: str, shape: tuple[int, ...]) -> Any:
        self.used.add(name)
        lazy = self.checkpoint.slice(name)
        found = tuple(lazy.get_shape())
        if found != shape:
            raise ModelError(
                f"{self.checkpoint.path}: tensor {name} has shape {found}, config.json says {shape}"
            )
        return lazy

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.num_bytes += tensor.nbytes
        return tensor

    def _refuse_missing(self) -> None:
        missing = [name for name in expected_tensors(self.config) if name not in self.checkpoint]
        if missing:
            raise ModelError(f"{self.checkpoint.path}: {_count(missing, 'missing tensor')}")


def expected_tensors(config: ModelConfig) -> list[str]:
    """Names of all tensors that a checkpoint of this configuration must hold."""
    f = config.family
    names = [f.embedding, f.final_norm]
    if not config.tie_word_embeddings:
        names.append(f.lm_head)
    attention, mlp = (f.q, f.k, f.v, f.o), (f.gate, f.up, f.down)
    for layer in range(config.num_layers):
        prefix = f.layer_prefix.format(layer=layer)
        names += [prefix + f.input_norm, prefix + f.post_norm]
        names += [f"{prefix}{name}.weight" for name in attention + mlp]
        names += [f"{prefix}{name}.bias" for name in attention if config.attention_bias]
        names += [f"{prefix}{name}.bias" for name in mlp if config.mlp_bias]
    return names


def _count(names: list[str], what: str) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''}: {shown}{more}"
