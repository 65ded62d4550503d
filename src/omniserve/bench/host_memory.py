"""The memory that the host benchmark reads: storage types, an arena larger than the caches, what fills it."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import omniserve._native as _native
from omniserve.machine import available_cpus, memory_limit_bytes

PAGE_SIZE = 64  # tokens, the host's default
NUM_KV_HEADS = 8
CACHE_MULTIPLE = 4  # the arena over the last-level cache
MIN_ARENA_BYTES = 512 << 20
SAMPLE_BYTES = 4 << 20  # of random pages; the rest repeats them

# Every storage type to measure, and how torch's attention reads the same elements; None where it cannot.
# Another type that `_native.KvGeometry` knows (int8, say) needs one line here: sizes and contents of pages
# come from the native module.
TORCH_DTYPES: dict[str, torch.dtype | None] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": None,
}
SHORT_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int8": "int8"}


def short_name(dtype: str) -> str:
    return SHORT_NAMES.get(dtype, dtype)


def last_level_cache_bytes() -> int:
    """All last-level caches of the CPUs in the affinity mask; 32 MiB when the system does not say."""
    found: dict[str, tuple[int, int]] = {}  # CPUs that share a cache -> the highest level, its bytes
    for cpu in available_cpus().cpus:
        for folder in Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"):
            try:
                level = int((folder / "level").read_text())
                size = int((folder / "size").read_text().strip().removesuffix("K")) << 10
                shared = (folder / "shared_cpu_list").read_text().strip()
            except (OSError, ValueError):
                continue
            found[shared] = max(found.get(shared, (0, 0)), (level, size))
    top = max((level for level, _ in found.values()), default=0)
    return sum(size for level, size in found.values() if level == top) or 32 << 20


def default_arena_bytes() -> int:
    """Four times the last-level cache, but no more than a quarter of this machine's memory."""
    wanted = max(MIN_ARENA_BYTES, CACHE_MULTIPLE * last_level_cache_bytes())
    return min(wanted, memory_limit_bytes() // 4 >> 20 << 20)


class Arena:
    """Private memory in huge pages where allowed."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8)
        self.address = self.bytes.data_ptr()

    def paged(self, geometry: _native.KvGeometry) -> _native.PagedKv:
        """As many pages as fit."""
        return _native.PagedKv(geometry, self.address, self.num_bytes // geometry.page_bytes)


def memory_at(address: int, num_bytes: int) -> Tensor:
    """Somebody else's memory as bytes."""
    return torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)


def fill_pages(kv: _native.PagedKv) -> None:
    """Standard normal keys and values everywhere: a few pages written row by row, copied over all others.

    The native module writes them, so whatever else a page holds (the scales of a quantised type) is valid.
    """
    geometry = kv.geometry
    num_samples = max(1, min(kv.num_pages, SAMPLE_BYTES // geometry.page_bytes))
    rng = np.random.default_rng(0)
    offsets = np.arange(geometry.page_size, dtype=np.int32)
    width = geometry.num_kv_heads * geometry.head_dim
    for page in range(num_samples):
        pages = np.full(geometry.page_size, page, np.int32)
        for layer in range(geometry.num_layers):
            k, v = rng.standard_normal((2, geometry.page_size, width), np.float32)
            kv.write(
                layer, geometry.page_size, k.ctypes.data, width, v.ctypes.data, width, "float32",
                pages.ctypes.data, offsets.ctypes.data,
            )  # fmt: skip
    memory = memory_at(kv.page_address(0), kv.num_pages * geometry.page_bytes)
    block = num_samples * geometry.page_bytes
    for start in range(block, len(memory), block):
        memory[start : start + block] = memory[: min(block, len(memory) - start)]
