"""The CPU as device: paged KV memory, decode attention by the native kernel, prefill chunks by torch SDPA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import omniserve._native as _native
from omniserve.dtypes import dtype_name
from omniserve.policy.plan import DeviceRows


def kv_geometry(
    num_layers: int, num_kv_heads: int, head_dim: int, page_size: int, dtype: str
) -> _native.KvGeometry:
    """Shape of paged KV in `dtype` (see _native); `page_bytes` of it is what one page of all layers takes."""
    return _native.KvGeometry(
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        dtype=dtype,
    )


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch may use `count` threads meanwhile.

    Otherwise it has one: the cores are the team's, and small operations end before another thread is awake.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class CpuKvStore:
    """Device KV memory: `num_pages` pages, each one blob of all layers (layout: csrc/kv.h).

    Untouched pages cost no memory: the mapping is filled on first write.
    """

    def __init__(self, geometry: _native.KvGeometry, num_pages: int, dtype: torch.dtype) -> None:
        self.page_size = geometry.page_size
        self.dtype = dtype
        self.memory = torch.empty(num_pages * geometry.page_bytes, dtype=torch.uint8)
        self.kv = _native.PagedKv(geometry, self.memory.data_ptr(), num_pages)


@dataclass(slots=True)
class _View:
    """The part of its context, from token `first_token` on, that some row of a chunk looks at.

    mask: True where a row may look, [count, tokens]; None when the chunk is all there is, plain causal.
    """

    first_token: int
    mask: Tensor | None

    @classmethod
    def of(cls, start: int, count: int, window: int) -> _View:
        """`window` 0: every token up to the row's own."""
        first_token = max(0, start + 1 - window) if window else 0
        is_narrowed = 0 < window < start + count
        if start == 0 and not is_narrowed:
            return cls(0, None)
        mask = torch.ones(count, start + count - first_token, dtype=torch.bool).tril_(start - first_token)
        if is_narrowed:
            mask.triu_(start - first_token + 1 - window)
        return cls(first_token, mask)


@dataclass(slots=True)
class _ChunkRows:
    """Rows first..first+count-1 of the batch: one prefill chunk that starts at position `start`.

    `whole` is what its rows look at in layers without a window, `windowed` in those with one.
    """

    first: int
    count: int
    start: int
    table: np.ndarray
    whole: _View
    windowed: _View


class DeviceBatch:
    """The device rows of one walk, laid out: single-token rows first, then chunks."""

    def __init__(self, rows: Sequence[DeviceRows], page_size: int, window: int = 0) -> None:
        """window: of the layers that have one, in tokens; 0: none has."""
        self.rows = sorted(rows, key=lambda r: r.num_tokens > 1)
        counts = np.array([r.num_tokens for r in self.rows], dtype=np.int64)
        ends = np.cumsum(counts)
        self.num_rows = int(ends[-1]) if len(ends) else 0
        self.num_singles = sum(1 for r in self.rows if r.num_tokens == 1)
        self.last_row = ends - 1
        starts = np.array([r.start for r in self.rows], dtype=np.int64)
        self.positions = np.arange(self.num_rows) - np.repeat(ends - counts - starts, counts)
        tables = [np.array(r.pages, dtype=np.int32) for r in self.rows]
        self.page_ids = np.empty(self.num_rows, dtype=np.int32)
        for table, end, count in zip(tables, ends, counts, strict=True):
            rows_of = slice(end - count, end)
            self.page_ids[rows_of] = table[self.positions[rows_of] // page_size]
        self.offsets = (self.positions % page_size).astype(np.int32)
        self.context_lens = (starts[: self.num_singles] + 1).astype(np.int32)
        width = max((len(t) for t in tables[: self.num_singles]), default=1)
        self.tables = np.zeros((self.num_singles, width), dtype=np.int32)
        for i, table in enumerate(tables[: self.num_singles]):
            self.tables[i, : len(table)] = table
        self.chunks = [
            _ChunkRows(
                first=int(ends[i] - counts[i]),
                count=int(counts[i]),
                start=int(starts[i]),
                table=tables[i],
                whole=(whole := _View.of(int(starts[i]), int(counts[i]), 0)),
                windowed=_View.of(int(starts[i]), int(counts[i]), window) if window else whole,
            )
            for i in range(self.num_singles, len(self.rows))
        ]


class CpuAttention:
    """Attention of the device rows of a walk, one call per layer, over paged KV."""

    def __init__(
        self,
        store: CpuKvStore,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        team: _native.ThreadTeam,
        window: int = 0,
        window_layers: Sequence[int] = (),
    ) -> None:
        """team: the device's threads, the caller among them.

        In `window_layers` a token attends to the last `window` tokens alone, itself included.
        """
        self.store = store
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.window = window if window_layers else 0
        self.window_layers = frozenset(window_layers)
        self.team = team

    def run(self, layer: int, batch: DeviceBatch, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """Append k, v [n, kvh hd] to the pages, attend with q [n, h hd] and write out [n, h hd]."""
        self.store.kv.write(
            layer,
            batch.num_rows,
            k.data_ptr(),
            k.stride(0),
            v.data_ptr(),
            v.stride(0),
            dtype_name(k.dtype),
            batch.page_ids.ctypes.data,
            batch.offsets.ctypes.data,
        )
        if batch.num_singles:
            self._decode(layer, batch, q[: batch.num_singles], out[: batch.num_singles])
        for chunk in batch.chunks:
            rows = slice(chunk.first, chunk.first + chunk.count)
            out[rows] = self._prefill(layer, chunk, q[rows], k[rows], v[rows])

    def _decode(self, layer: int, batch: DeviceBatch, q: Tensor, out: Tensor) -> None:
        query = q.to(torch.float32, memory_format=torch.contiguous_format).contiguous()
        result = out if out.dtype == torch.float32 and out.is_contiguous() else torch.empty_like(query)
        _native.paged_attention(
            self.team,
            self.store.kv,
            layer,
            batch.num_singles,
            query.data_ptr(),
            batch.tables.ctypes.data,
            batch.tables.shape[1],
            batch.context_lens.ctypes.data,
            result.data_ptr(),
            self.num_heads,
            self.scale,
            self.window if layer in self.window_layers else 0,
        )
        if result is not out:
            out.copy_(result)

    def _prefill(self, layer: int, chunk: _ChunkRows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        view = chunk.windowed if layer in self.window_layers else chunk.whole
        if view.mask is None:
            keys = k.view(chunk.count, self.num_kv_heads, self.head_dim).transpose(0, 1)
            values = v.view(chunk.count, self.num_kv_heads, self.head_dim).transpose(0, 1)
        else:
            keys, values = self._gather(layer, chunk, view.first_token)
        query = q.view(chunk.count, self.num_heads, self.head_dim).transpose(0, 1)
        with torch_threads(self.team.num_threads):
            result = F.scaled_dot_product_attention(
                query[None],
                keys[None],
                values[None],
                attn_mask=view.mask,
                is_causal=view.mask is None,
                scale=self.scale,
                enable_gqa=self.num_heads != self.num_kv_heads,
            )
        return result[0].transpose(0, 1).reshape(chunk.count, -1)

    def _gather(self, layer: int, chunk: _ChunkRows, first_token: int) -> tuple[Tensor, Tensor]:
        """Keys and values [kvh, T, hd] of a chunk's context from `first_token` on, its own rows included."""
        context = chunk.start + chunk.count
        keys = torch.empty(self.num_kv_heads, context - first_token, self.head_dim, dtype=self.store.dtype)
        values = torch.empty_like(keys)
        self.store.kv.gather(
            layer, chunk.table.ctypes.data, context, keys.data_ptr(), values.data_ptr(), first_token
        )
        return keys, values
