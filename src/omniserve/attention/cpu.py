"""The CPU as device: paged KV memory, and the attention of a walk's rows over it by the native kernels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
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


class CpuKvStore:
    """Device KV memory: `num_pages` pages, each one blob of all layers (layout: csrc/kv.h).

    Untouched pages cost no memory: the mapping is filled on first write.
    """

    def __init__(self, geometry: _native.KvGeometry, num_pages: int) -> None:
        self.page_size = geometry.page_size
        self.token_bytes = geometry.page_bytes // geometry.page_size  # of all layers
        self.memory = torch.empty(num_pages * geometry.page_bytes, dtype=torch.uint8)
        self.kv = _native.PagedKv(geometry, self.memory.data_ptr(), num_pages)


def _padded(tables: Sequence[np.ndarray]) -> np.ndarray:
    """Page tables as rows of one array, int32 [n, longest]; what is behind a table's end is never read."""
    padded = np.zeros((len(tables), max((len(t) for t in tables), default=1)), dtype=np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return padded


class DeviceBatch:
    """The device rows of one walk, laid out: single-token rows first, then chunks."""

    def __init__(self, rows: Sequence[DeviceRows], page_size: int) -> None:
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
        self.tables = _padded(tables[: self.num_singles])
        # Of each chunk its first row, its number of rows and the position of its first token.
        self.chunks = np.stack([ends - counts, counts, starts], axis=1)[self.num_singles :]
        self.chunk_tables = _padded(tables[self.num_singles :])


class CpuAttention:
    """Attention of the device rows of a walk, one call per layer, over paged KV."""

    def __init__(
        self,
        store: CpuKvStore,
        num_heads: int,
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
        if len(batch.chunks):
            _native.prompt_attention(
                self.team,
                self.store.kv,
                layer,
                batch.chunks,
                batch.chunk_tables.ctypes.data,
                batch.chunk_tables.shape[1],
                dtype_name(q.dtype),
                q.data_ptr(),
                q.stride(0),
                out.data_ptr(),
                out.stride(0),
                self.num_heads,
                self.scale,
                self._window_of(layer),
            )

    def _window_of(self, layer: int) -> int:
        return self.window if layer in self.window_layers else 0

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
            self._window_of(layer),
        )
        if result is not out:
            out.copy_(result)
