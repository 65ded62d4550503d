"""Host attention against the memory it reads: `omniserve bench-host [--quick] [--json FILE] [--plot FILE]`.

For each shape the same memory is read four ways within one run and on the same cores, in turns: by a plain
streaming loop, by our kernel (`paged_attention` on a team of threads), by torch's
`scaled_dot_product_attention` (SDPA) at query length 1, and by SDPA with the query heads of a group as its
query rows, which is the best that one call of torch can do. All figures are 1e9 bytes of KV per second, each
element counted once, however often it is read; medians over rounds with their range.

Every reader walks cyclically through an arena of at least four times the last-level cache, ours through
shuffled pages, so that whatever comes round again has left the caches (with less memory than that, nothing
counts and the report says so). One more case per shape reads pages that stay in the first caches: what
arithmetic alone allows. It is marked `cached` and counts nowhere.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import omniserve._native as _native
from omniserve.bench.measure import Spread, seconds_of
from omniserve.config import available_cpus, memory_limit_bytes

PAGE_SIZE = 64  # tokens, the host's default
NUM_KV_HEADS = 8
CACHE_MULTIPLE = 4  # the arena over the last-level cache
MIN_ARENA_BYTES = 512 << 20
CACHED_CONTEXT = 1024  # tokens, all of them in one page: of a case that stays in the first caches
SDPA_BYTES = 16 << 20  # of one call: torch reads slower, and as fast with fewer lanes
SETTLE_S = 0.003  # torch's threads spin on after a call; wait until they sleep

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Case:
    """One combination of the sweep. `cached`: every lane reads the same page over and over."""

    dtype: str
    group: int
    head_dim: int
    context: int
    lanes: int
    threads: int
    cached: bool = False

    @property
    def token_bytes(self) -> int:
        """KV bytes of one token of one layer."""
        return 2 * NUM_KV_HEADS * self.head_dim * TORCH_DTYPES[self.dtype].itemsize

    @property
    def num_bytes(self) -> int:
        """KV bytes of one call: all lanes, one layer."""
        return self.lanes * self.context * self.token_bytes

    @property
    def intensity(self) -> float:
        """Floating point operations per byte of KV: one FMA is two."""
        return 2 * self.group / TORCH_DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class Sweep:
    """Which cases to measure, how often, and for how long at a time."""

    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")
    groups: tuple[int, ...] = (1, 3, 4, 8)
    head_dims: tuple[int, ...] = (64, 128)
    contexts: tuple[int, ...] = (256, 1024, 4096, 16384)
    lanes: tuple[int, ...] = (1, 8, 64)
    threads: tuple[int, ...] = (1,)
    rounds: int = 5
    round_s: float = 0.01

    def cases(self) -> Iterator[Case]:
        for dtype, head_dim, group, threads in product(
            self.dtypes, self.head_dims, self.groups, self.threads
        ):
            yield Case(dtype, group, head_dim, CACHED_CONTEXT, 2 * threads, threads, cached=True)
            for context, lanes in product(self.contexts, self.lanes):
                yield Case(dtype, group, head_dim, context, lanes, threads)


def default_threads() -> tuple[int, ...]:
    """1, 2, 4 ... and all cores."""
    cores = available_cpus().count
    return tuple(sorted({cores, *(1 << i for i in range(cores.bit_length()) if 1 << i < cores)}))


def quick_sweep() -> Sweep:
    """A minute: the shapes that the project promises figures for, on all cores."""
    return Sweep(
        dtypes=("bfloat16", "float32"),
        contexts=(1024, 4096),
        lanes=(1, 8),
        threads=(available_cpus().count,),
        rounds=3,
    )


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
    """Private memory in huge pages where allowed, filled with random numbers of one dtype."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8)
        self.address = self.bytes.data_ptr()

    def fill(self, dtype: str) -> Tensor:
        """The arena as a flat tensor of `dtype`, standard normal numbers, repeated every 16 MiB."""
        values = self.bytes.view(TORCH_DTYPES[dtype])
        fill_random(values)
        return values


def fill_random(values: Tensor) -> None:
    block = torch.randn((16 << 20) // values.element_size(), generator=torch.Generator().manual_seed(0))
    for start in range(0, len(values), len(block)):
        values[start : start + len(block)] = block[: len(values) - start]


def memory_as_tensor(address: int, num_bytes: int, dtype: str) -> Tensor:
    """Somebody else's memory as a flat tensor."""
    array = (ctypes.c_uint8 * num_bytes).from_address(address)
    return torch.frombuffer(array, dtype=TORCH_DTYPES[dtype])


class Rates:
    """Gathers bytes per second of several readers, in turns."""

    def __init__(self) -> None:
        self.samples: dict[str, list[float]] = {}

    def add(self, reader: str, gbps: float) -> None:
        self.samples.setdefault(reader, []).append(gbps)

    def spreads(self) -> dict[str, Spread]:
        return {reader: Spread(values) for reader, values in self.samples.items()}


def rate_of(call: Callable[[], object], num_bytes: int, at_least_s: float) -> float:
    """1e9 bytes per second of `call`, repeated for `at_least_s` seconds after a first one."""
    once_s = seconds_of(call)
    repeats = max(1, math.ceil(at_least_s / max(once_s, 1e-7)))
    if once_s >= at_least_s / 2:  # long enough to be its own measurement
        return num_bytes / once_s / 1e9
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return repeats * num_bytes / (time.perf_counter() - began) / 1e9


class OurReader:
    """`paged_attention` of one case; each call goes on where the last one stopped."""

    def __init__(self, case: Case, arena: Arena, team: _native.ThreadTeam) -> None:
        geometry = _native.KvGeometry(
            num_layers=1,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=case.head_dim,
            page_size=PAGE_SIZE,
            dtype=case.dtype,
        )
        self.num_pages = arena.num_bytes // geometry.page_bytes
        self.kv = _native.PagedKv(geometry, arena.address, self.num_pages)
        self.team = team
        self.num_heads = NUM_KV_HEADS * case.group
        rng = np.random.default_rng(0)
        self.q = rng.standard_normal((case.lanes, self.num_heads * case.head_dim), np.float32)
        self.out = np.empty_like(self.q)
        self.context_lens = np.full(case.lanes, case.context, np.int32)
        self.tables = page_tables(case, self.num_pages, rng)
        self.scale = case.head_dim**-0.5
        self.turn = 0

    def __call__(self) -> None:
        tables = self.tables[self.turn]
        self.turn = (self.turn + 1) % len(self.tables)
        _native.paged_attention(
            self.team, self.kv, 0, len(self.q), self.q.ctypes.data, tables.ctypes.data, tables.shape[1],
            self.context_lens.ctypes.data, self.out.ctypes.data, self.num_heads, self.scale,
        )  # fmt: skip


def page_tables(case: Case, num_pages: int, rng: np.random.Generator) -> npt.NDArray[np.int32]:
    """Page ids [calls][lanes][pages per lane]: a shuffled walk over all pages, as many calls as cover them.

    A call that needs more than all pages goes round several times: what it meets again has left the caches.
    """
    shape = (case.lanes, math.ceil(case.context / PAGE_SIZE))
    if case.cached:
        return np.zeros((1, *shape), np.int32)
    per_call = shape[0] * shape[1]
    calls = math.ceil(num_pages / per_call)
    order = rng.permutation(num_pages).astype(np.int32)
    return order[np.arange(calls * per_call) % num_pages].reshape(calls, *shape)


class TorchReader:
    """SDPA over contiguous K and V in the same memory. `grouped`: the group's queries as query rows."""

    def __init__(self, case: Case, values: Tensor, grouped: bool) -> None:
        lane_bytes = case.context * case.token_bytes
        self.lanes = max(1, min(case.lanes, SDPA_BYTES // lane_bytes))
        self.num_bytes = self.lanes * lane_bytes
        kv_shape = (2, self.lanes, NUM_KV_HEADS, case.context, case.head_dim)
        size = math.prod(kv_shape)
        self.calls = [values[i * size : (i + 1) * size].view(kv_shape) for i in range(len(values) // size)]
        heads, rows = (NUM_KV_HEADS, case.group) if grouped else (NUM_KV_HEADS * case.group, 1)
        self.q = torch.randn(self.lanes, heads, rows, case.head_dim).to(values.dtype)
        self.expand = not grouped and case.group > 1
        self.turn = 0

    def __call__(self) -> None:
        k, v = self.calls[self.turn]
        self.turn = (self.turn + 1) % len(self.calls)
        torch.nn.functional.scaled_dot_product_attention(self.q, k, v, enable_gqa=self.expand)


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured of one case, by reader: "stream", "ours", "sdpa", "sdpa_grouped"."""

    case: Case
    gbps: dict[str, Spread]
    counts: bool  # false: some cache held what was read

    @property
    def share(self) -> float:
        """Our rate over the streaming rate."""
        return self.gbps["ours"].median / self.gbps["stream"].median

    def over(self, reader: str) -> float | None:
        other = self.gbps.get(reader)
        return None if other is None else self.gbps["ours"].median / other.median

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self.case),
            "intensity_flop_per_byte": self.case.intensity,
            "counts": self.counts,
            "gbps": {reader: spread.as_dict() for reader, spread in self.gbps.items()},
            "share_of_stream": self.share,
            "over_sdpa": self.over("sdpa"),
            "over_sdpa_grouped": self.over("sdpa_grouped"),
        }


class HostBench:
    """Measures the cases of one sweep, one at a time."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.arena = Arena(default_arena_bytes())
        self.is_cold = self.arena.num_bytes >= CACHE_MULTIPLE * last_level_cache_bytes()
        self.values = self.arena.bytes
        self.teams = {n: _native.ThreadTeam(n) for n in sweep.threads}
        self._streamed = 0

    def fill(self, dtype: str) -> None:
        if self.values.dtype != TORCH_DTYPES[dtype]:
            self.values = self.arena.fill(dtype)

    def measure(self, case: Case) -> Result:
        self.fill(case.dtype)
        team = self.teams[case.threads]
        torch.set_num_threads(case.threads)
        ours = OurReader(case, self.arena, team)
        sdpa = {} if case.cached else {"sdpa": TorchReader(case, self.values, grouped=False)}
        if sdpa and case.group > 1:
            sdpa["sdpa_grouped"] = TorchReader(case, self.values, grouped=True)
        rates = Rates()
        for _ in range(self.sweep.rounds):
            rates.add("stream", self.stream(case.threads))
            rates.add("ours", rate_of(ours, case.num_bytes, self.sweep.round_s))
            for name, reader in sdpa.items():
                rates.add(name, rate_of(reader, reader.num_bytes, 0.0))
            if sdpa:
                time.sleep(SETTLE_S)
        return Result(case, rates.spreads(), counts=self.is_cold and not case.cached)

    def stream(self, threads: int) -> float:
        """Streaming rate over the next eighth of the arena, threads warmed up."""
        size = self.arena.num_bytes // 8
        address = self.arena.address + self._streamed * size
        self._streamed = (self._streamed + 1) % 8
        team = self.teams[threads]
        _native.stream_read_gbps(address, 1 << 16, team)
        return _native.stream_read_gbps(address, size, team)

    def check_stream(self, threads: int) -> dict[str, Any]:
        """Our streaming loop beside torch.sum of the whole arena as float32: ours must not be slow."""
        values = self.arena.bytes.view(torch.float32)
        torch.set_num_threads(threads)
        rates = Rates()
        for _ in range(max(5, self.sweep.rounds)):
            rates.add("torch_sum", self.arena.num_bytes / seconds_of(values.sum) / 1e9)
            time.sleep(SETTLE_S)
            rates.add(
                "stream",
                _native.stream_read_gbps(self.arena.address, self.arena.num_bytes, self.teams[threads]),
            )
        spreads = rates.spreads()
        ratio = spreads["stream"].median / spreads["torch_sum"].median
        return {
            "threads": threads,
            **{f"{k}_gbps": s.as_dict() for k, s in spreads.items()},
            "ratio": ratio,
            "holds": ratio >= 0.95,
        }


def description(bench: HostBench) -> dict[str, Any]:
    """The conditions of a run."""
    return {
        "simd": _native.simd(),
        "page_size": PAGE_SIZE,
        "num_kv_heads": NUM_KV_HEADS,
        "last_level_cache_bytes": last_level_cache_bytes(),
        "arena_bytes": bench.arena.num_bytes,
        "sweep": asdict(bench.sweep),
        "load_average": os.getloadavg()[0],
    }
