"""Host attention against the memory it reads: the kernel sweep of `omniserve bench-host`.

For each shape the same memory is read four ways within one run and on the same cores, in turns: by a plain
streaming loop, by our kernel (`paged_attention` on a team of threads), by torch's
`scaled_dot_product_attention` (SDPA) at query length 1, and by SDPA with the query heads of a group as its
query rows, which is the best that one call of torch can do. Rates are 1e9 bytes of KV per second, each
byte counted once, however often it is read. Shares and ratios are taken round by round; what is reported is
their median and range.

Every reader walks cyclically through an arena of at least four times the last-level cache, ours through
shuffled pages, so that whatever comes round again has left the caches (with less memory than that, nothing
counts and the report says so). One more case per shape reads pages that stay in the first caches: what
arithmetic alone allows. It is marked `cached` and counts nowhere.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import omniserve._native as _native
from omniserve.bench import host_memory
from omniserve.bench.host_memory import NUM_KV_HEADS, PAGE_SIZE, TORCH_DTYPES, Arena, fill_pages
from omniserve.bench.measure import Rounds, cpus_to_pin, pinned, seconds_of
from omniserve.machine import available_cpus

CACHED_CONTEXT = 1024  # tokens, all of them in one page: of a case that stays in the first caches
SDPA_BYTES = 8 << 20  # of one call: torch reads slower, and as fast with fewer lanes
SDPA_S = 0.06  # per case: then its turns are over
MIN_ROUNDS = 3  # whatever the budget
SETTLE_S = 0.003  # torch's threads spin on after a call; wait until they sleep


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
    def geometry(self) -> _native.KvGeometry:
        """Pages of one layer."""
        return _native.KvGeometry(
            num_layers=1,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=self.head_dim,
            page_size=PAGE_SIZE,
            dtype=self.dtype,
        )

    @property
    def token_bytes(self) -> float:
        """KV bytes of one token of one layer, whatever belongs to its page included."""
        return self.geometry.page_bytes / PAGE_SIZE

    @property
    def num_bytes(self) -> int:
        """KV bytes of one call: all lanes, one layer."""
        return round(self.lanes * self.context * self.token_bytes)

    @property
    def intensity(self) -> float:
        """Floating point operations per byte of KV: one FMA, two of them, per query head and element."""
        return 2 * self.group * 2 * NUM_KV_HEADS * self.head_dim / self.token_bytes

    @property
    def text(self) -> str:
        kind = f"{host_memory.short_name(self.dtype)} group {self.group} head {self.head_dim}"
        return f"{kind} context {self.context} lanes {self.lanes} threads {self.threads}"


@dataclass(frozen=True, slots=True)
class Sweep:
    """Which cases, at most how often, and for how long: one turn of ours, and all cases together."""

    dtypes: tuple[str, ...] = tuple(TORCH_DTYPES)
    groups: tuple[int, ...] = (1, 3, 4, 8)
    head_dims: tuple[int, ...] = (64, 128)
    contexts: tuple[int, ...] = (256, 1024, 4096, 16384)
    lanes: tuple[int, ...] = (1, 8, 64)
    threads: tuple[int, ...] = (1,)
    rounds: int = 13
    round_s: float = 0.01
    budget_s: float = 200.0

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
        dtypes=tuple(d for d in TORCH_DTYPES if d != "float16"),
        contexts=(1024, 4096),
        lanes=(1, 8),
        threads=(available_cpus().count,),
        rounds=5,
        budget_s=25.0,
    )


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


def model_numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> npt.NDArray[np.float32]:
    """Standard normal numbers as a model in this type has them (int8 KV: a bfloat16 model)."""
    numbers = torch.from_numpy(rng.standard_normal(shape, np.float32))
    return numbers.to(TORCH_DTYPES[dtype] or torch.bfloat16).float().numpy()


class OurReader:
    """`paged_attention` of one case; each call goes on where the last one stopped."""

    def __init__(self, case: Case, arena: Arena, team: _native.ThreadTeam) -> None:
        self.kv = arena.paged(case.geometry)
        self.team = team
        self.num_heads = NUM_KV_HEADS * case.group
        rng = np.random.default_rng(0)
        self.q = model_numbers(rng, (case.lanes, self.num_heads * case.head_dim), case.dtype)
        self.out = np.empty_like(self.q)
        self.context_lens = np.full(case.lanes, case.context, np.int32)
        self.tables = page_tables(case, self.kv.num_pages, rng)
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
        lane_bytes = round(case.context * case.token_bytes)
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
    rounds: Rounds
    counts: bool  # false: some cache held what was read

    def ratio(self, over: str, under: str) -> dict[str, float] | None:
        has_both = over in self.rounds.samples and under in self.rounds.samples
        return self.rounds.ratio(over, under).as_dict() if has_both else None

    def as_dict(self) -> dict[str, Any]:
        gbps = {reader: spread.as_dict() for reader, spread in self.rounds.spreads().items()}
        return {
            **asdict(self.case),
            "intensity_flop_per_byte": self.case.intensity,
            "token_bytes": self.case.token_bytes,
            "counts": self.counts,
            "rounds": {reader: len(values) for reader, values in self.rounds.samples.items()},
            "gbps": gbps,
            "mtokens_per_s": gbps["ours"]["median"] * 1e3 / self.case.token_bytes,
            "share_of_stream": self.ratio("ours", "stream"),
            "over_sdpa": self.ratio("ours", "sdpa"),
            "over_sdpa_grouped": self.ratio("ours", "sdpa_grouped"),
            "stream_over_sdpa": self.ratio("stream", "sdpa"),
        }


@dataclass
class HostBench:
    """Measures the cases of one sweep, one at a time."""

    sweep: Sweep
    arena: Arena = field(init=False)
    is_cold: bool = field(init=False)  # the arena is large enough to leave the caches behind

    def __post_init__(self) -> None:
        self.arena = Arena(host_memory.default_arena_bytes())
        self.is_cold = self.arena.num_bytes >= (
            host_memory.CACHE_MULTIPLE * host_memory.last_level_cache_bytes()
        )
        self.cpus = cpus_to_pin()
        self._teams: dict[int, _native.ThreadTeam] = {}
        self.case_s = self.sweep.budget_s / len(list(self.sweep.cases()))
        self._filled = ("", 0)  # dtype, head size
        self._streamed = 0

    def team(self, threads: int) -> _native.ThreadTeam:
        """Pinned, as the engine's is; member 0 is this thread, and pinned while it reads."""
        if threads not in self._teams:
            self._teams[threads] = _native.ThreadTeam(threads, self.cpus)
        return self._teams[threads]

    def fill(self, case: Case) -> None:
        if self._filled != (case.dtype, case.head_dim):
            fill_pages(self.arena.paged(case.geometry))
            self._filled = (case.dtype, case.head_dim)

    def measure(self, case: Case) -> Result:
        self.fill(case)
        torch.set_num_threads(case.threads)
        ours = OurReader(case, self.arena, self.team(case.threads))
        sdpa = self._torch_readers(case)
        sdpa_left_s = SDPA_S
        rounds = Rounds()
        began = time.perf_counter()
        for number in range(self.sweep.rounds):
            if number >= MIN_ROUNDS and time.perf_counter() - began > self.case_s:
                break
            self.read_between_streams(rounds, case.threads, "ours", lambda: self.rate(ours, case))
            if not sdpa or sdpa_left_s <= 0:
                continue
            for name, reader in sdpa.items():
                gbps = rate_of(reader, reader.num_bytes, 0.0)
                rounds.add(name, gbps)
                sdpa_left_s -= reader.num_bytes / gbps / 1e9
            time.sleep(SETTLE_S)
        return Result(case, rounds, counts=self.is_cold and not case.cached)

    def _torch_readers(self, case: Case) -> dict[str, TorchReader]:
        dtype = TORCH_DTYPES[case.dtype]
        if case.cached or dtype is None:
            return {}
        values = self.arena.bytes.view(dtype)
        readers = {"sdpa": TorchReader(case, values, grouped=False)}
        if case.group > 1:
            readers["sdpa_grouped"] = TorchReader(case, values, grouped=True)
        return readers

    def rate(self, ours: OurReader, case: Case) -> float:
        with pinned(self.cpus):
            return rate_of(ours, case.num_bytes, self.sweep.round_s)

    def read_between_streams(
        self, rounds: Rounds, threads: int, name: str, rate: Callable[[], float]
    ) -> None:
        """One round: `rate` as `name`; as "stream" the mean of what memory gave right before and after."""
        before = self.stream(threads)
        rounds.add(name, rate())
        rounds.add("stream", (before + self.stream(threads)) / 2)

    def stream(self, threads: int) -> float:
        """Streaming rate over the next eighth of the arena, threads warmed up."""
        size = self.arena.num_bytes // 8
        address = self.arena.address + self._streamed * size
        self._streamed = (self._streamed + 1) % 8
        team = self.team(threads)
        with pinned(self.cpus):
            _native.stream_read_gbps(address, 1 << 16, team)
            return _native.stream_read_gbps(address, size, team)

    def check_stream(self, threads: int) -> dict[str, Any]:
        """Our streaming loop beside torch.sum of the whole arena as float32: ours must not be slow."""
        values = self.arena.bytes.view(torch.float32)
        torch.set_num_threads(threads)
        rounds = Rounds()
        for _ in range(max(15, self.sweep.rounds)):
            rounds.add("torch_sum", self.arena.num_bytes / seconds_of(values.sum) / 1e9)
            time.sleep(SETTLE_S)
            with pinned(self.cpus):
                gbps = _native.stream_read_gbps(self.arena.address, self.arena.num_bytes, self.team(threads))
            rounds.add("stream", gbps)
        ratio = rounds.ratio("stream", "torch_sum")
        return {
            "threads": threads,
            **{f"{k}_gbps": s.as_dict() for k, s in rounds.spreads().items()},
            "ratio": ratio.as_dict(),
            "holds": ratio.median >= 0.95,
        }


def description(bench: HostBench) -> dict[str, Any]:
    """The conditions of a run."""
    return {
        "simd": _native.simd(),
        "page_size": PAGE_SIZE,
        "num_kv_heads": NUM_KV_HEADS,
        "last_level_cache_bytes": host_memory.last_level_cache_bytes(),
        "arena_bytes": bench.arena.num_bytes,
        "sweep": asdict(bench.sweep),
        "load_average": os.getloadavg()[0],
    }
