"""The same kernel where lanes use it: rows submitted through a segment, served by host workers, taken back.

Two views. *One layer at a time*: all lanes' rows leave at one layer, and the next layer starts when the last
result is back; that includes the way there and back and the wait for the slowest. *Queue kept full*: lanes
wait at different layers and go on a few at a time, long before the others are served; this is what a busy
host achieves. In both the engine sleeps, at last on its eventfd, as the real one does: it runs on one of the
workers' cores, and what it takes of that is part of the price.
"""

from __future__ import annotations

import math
import mmap
import os
import select
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import omniserve._native as _native
from omniserve.bench.host import SETTLE_S, Case, HostBench, page_tables, rate_of
from omniserve.bench.host_memory import NUM_KV_HEADS, PAGE_SIZE, TORCH_DTYPES, fill_pages
from omniserve.bench.measure import Rounds, cpus_to_pin
from omniserve.host.segment import address_of

MAX_ARENA_BYTES = 3 << 29
TIMEOUT_S = 60.0
FULL_S = 0.05  # of one turn with the queue kept full
ROUNDS = 9
NAP_SHARE = 0.6  # of the shortest layer so far, slept by the clock: no wake-up per result in between
NAP_LANES = (
    0.25  # with the queue kept full: sleeps until about so many of the lanes are back, the rest is queued
)
MIN_NAP_S = 100e-6

PREFIX_TOKENS = 2048  # of the shared-prefix cases: common to all lanes
OWN_TOKENS = 256
PREFIX_LANES = 16

LAYERWISE, FULL = "one layer at a time", "queue kept full"


def lane_cases(threads: int, quick: bool) -> Iterator[Case]:
    """One lane that all workers share, a few, and many, at the shapes the project promises figures for."""
    shapes = ((1, 4096), (8, 1024), (8, 4096), (64, 1024))
    for group, (lanes, context) in product((1, 3, 4, 8), shapes):
        if not quick or (group == 4 and lanes <= 8):
            yield Case("bfloat16", group, 128, context, lanes, threads)
    yield Case("bfloat16", 3, 64, 4096, 8, threads)
    if threads > 1:  # the engine has a core to itself
        yield Case("bfloat16", 4, 128, 4096, 8, threads - 1)


def prefix_cases(threads: int, quick: bool) -> Iterator[Case]:
    context = PREFIX_TOKENS + OWN_TOKENS
    for group, head_dim in ((1, 128), (3, 128), (4, 128), (8, 128), (3, 64)):
        if not quick or group in (3, 4):
            yield Case("bfloat16", group, head_dim, context, PREFIX_LANES, threads)


def shared_tables(case: Case, shared_tokens: int) -> npt.NDArray[np.int32]:
    """Page tables [lanes][pages]: the first `shared_tokens` (whole pages) in common, the rest own."""
    num_shared = shared_tokens // PAGE_SIZE
    num_own = math.ceil(case.context / PAGE_SIZE) - num_shared
    order = np.random.default_rng(0).permutation(num_shared + case.lanes * num_own).astype(np.int32)
    shared = np.broadcast_to(order[:num_shared], (case.lanes, num_shared))
    return np.hstack([shared, order[num_shared:].reshape(case.lanes, num_own)])


class LaneRig:
    """`lanes` lanes in mid-sequence and a host that serves them, in one process.

    There are as many layers as it takes to spread the lanes' KV over `arena_bytes`: a layer that comes round
    again has left the caches.
    """

    def __init__(self, case: Case, arena_bytes: int, tables: npt.NDArray[np.int32]) -> None:
        self.case = case
        num_pages = int(tables.max()) + 1
        layer_bytes = num_pages * PAGE_SIZE * case.token_bytes
        self.geometry = _native.LaneGeometry(
            num_layers=math.ceil(arena_bytes / layer_bytes),
            num_heads=NUM_KV_HEADS * case.group,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=case.head_dim,
            hidden_size=64,  # residuals are the engine's and cost the host nothing
            act_dtype=case.dtype,
            kv_dtype=case.dtype,
            max_lanes=case.lanes,
            host_page_size=PAGE_SIZE,
            max_pages_per_lane=tables.shape[1],
            num_host_pages=num_pages,
            device_page_size=PAGE_SIZE,
        )
        self.memory = mmap.mmap(-1, _native.segment_bytes(self.geometry))
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.poll = select.poll()
        self.poll.register(self.event_fd, select.POLLIN)
        address = address_of(self.memory)
        self.port = _native.LanePort(self.geometry, address)
        self.host = _native.HostWorkers(address, eventfd=self.event_fd, cpus=cpus_to_pin())
        fill_pages(self.host.kv)
        for slot, pages in enumerate(tables.tolist()):
            self.port.reset(slot)
            self.port.set_pages(slot, 0, pages)
            self.port.start_token(slot, case.context - 1)
        self._make_rows()
        self.layer = 0
        self.layer_s = self.row_s = math.inf  # the shortest so far, per row with the queue kept full
        self.host.start(case.threads)

    def _make_rows(self) -> None:
        lanes, g = self.case.lanes, self.geometry
        self.slots = np.arange(lanes, dtype=np.int32)
        self.taken = np.empty(lanes, dtype=np.int32)
        dtype = TORCH_DTYPES[self.case.dtype]
        self.q = torch.randn(lanes, g.num_heads * g.head_dim).to(dtype)
        self.kv = torch.randn(2, lanes, g.num_kv_heads * g.head_dim).to(dtype)
        self.x = torch.zeros(lanes, g.hidden_size, dtype=dtype)
        self.attn = torch.empty_like(self.q)
        self.ready = np.zeros(g.num_layers, np.int32)
        self.waiting = np.zeros(g.num_layers, np.int32)
        self.oldest = np.zeros(g.num_layers, np.uint64)

    def exit(self, layer: int, slots: npt.NDArray[np.int32]) -> None:
        self.port.exit(
            layer, len(slots), slots.ctypes.data, self.q.data_ptr(), self.q.shape[1], self.kv[0].data_ptr(),
            self.kv.shape[2], self.kv[1].data_ptr(), self.kv.shape[2], self.x.data_ptr(), self.x.shape[1],
        )  # fmt: skip

    def take(self, layer: int, first: int = 0) -> npt.NDArray[np.int32]:
        """Slots whose result of `layer` is there; results are in rows `first` and on of `attn`."""
        slots, attn, x = self.taken[first:], self.attn[first:], self.x[first:]
        n = self.port.take(
            layer, len(slots), True, slots.ctypes.data, attn.data_ptr(), attn.shape[1], x.data_ptr(),
            x.shape[1],
        )  # fmt: skip
        return slots[:n]

    def sleep(self) -> None:
        """Until something is complete."""
        if self.port.arm():
            return
        if not self.poll.poll(TIMEOUT_S * 1e3):
            raise RuntimeError(f"no result within {TIMEOUT_S} s")
        os.eventfd_read(self.event_fd)
        self.port.disarm()

    def nap(self, seconds: float) -> None:
        if MIN_NAP_S < seconds < math.inf:
            time.sleep(seconds)

    def one_layer(self) -> None:
        """All lanes' rows leave at the next layer and come back."""
        layer = self.layer
        self.layer = (layer + 1) % self.geometry.num_layers
        began = time.perf_counter()
        self.exit(layer, self.slots)
        if self.case.lanes > 1:
            self.nap(NAP_SHARE * self.layer_s)
        taken = len(self.take(layer))
        while taken < self.case.lanes:
            self.sleep()
            taken += len(self.take(layer, taken))
        self.layer_s = min(self.layer_s, time.perf_counter() - began)

    def kept_full(self, at_least_s: float) -> float:
        """Rows per second while every lane is under way to some layer, from the first result on."""
        for slot in self.slots:  # spread over the layers
            self.exit(int(slot) * self.geometry.num_layers // self.case.lanes, self.slots[slot : slot + 1])
        self._go_on(math.inf)
        served, began = 0, time.perf_counter()
        while (seconds := time.perf_counter() - began) < at_least_s or served < 2 * self.case.lanes:
            served += self._go_on(NAP_LANES * self.case.lanes * self.row_s)
        self.row_s = min(self.row_s, seconds / served)
        for layer in np.flatnonzero(self._scan()[1]).tolist():
            if not self.port.wait_all(layer, TIMEOUT_S):
                raise RuntimeError(f"no result of layer {layer} within {TIMEOUT_S} s")
            self.take(layer)
        return served / seconds

    def _scan(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        self.port.scan(self.ready.ctypes.data, self.waiting.ctypes.data, self.oldest.ctypes.data)
        return self.ready, self.waiting

    def _go_on(self, nap_s: float) -> int:
        """Waits, then sends every lane that is back to its next layer; how many."""
        self.nap(nap_s)
        self.sleep()
        moved = 0
        for layer in np.flatnonzero(self._scan()[0]).tolist():
            slots = self.take(layer)
            self.exit((layer + 1) % self.geometry.num_layers, slots)
            moved += len(slots)
        return moved

    def busy_s(self) -> float:
        return sum(w["busy_s"] for w in self.host.stats())

    def close(self) -> None:
        self.host.stop()
        os.close(self.event_fd)


@dataclass(frozen=True, slots=True)
class LaneResult:
    """`rounds`: "stream" and "lanes" in GB/s of KV, "busy" the workers' share of time spent serving."""

    case: Case
    view: str
    rounds: Rounds

    def as_dict(self) -> dict[str, Any]:
        spreads = self.rounds.spreads()
        return {
            **asdict(self.case),
            "view": self.view,
            "stream_gbps": spreads["stream"].as_dict(),
            "gbps": spreads["lanes"].as_dict(),
            "busy_share": spreads["busy"].as_dict(),
            "share_of_stream": self.rounds.ratio("lanes", "stream").as_dict(),
        }


def measure_lanes(case: Case, bench: HostBench) -> list[LaneResult]:
    """Both views beside the streaming rate; of a lane alone the first, for its queue is never full."""
    arena_bytes = min(MAX_ARENA_BYTES, bench.arena.num_bytes)
    num_pages = case.lanes * math.ceil(case.context / PAGE_SIZE)
    rig = LaneRig(case, arena_bytes, page_tables(case, num_pages, np.random.default_rng(0))[0])
    views: dict[str, Callable[[], float]] = {
        LAYERWISE: lambda: rate_of(rig.one_layer, case.num_bytes, bench.sweep.round_s)
    }
    if case.lanes > 1:
        views[FULL] = lambda: rig.kept_full(FULL_S) * case.num_bytes / case.lanes / 1e9
    results = [LaneResult(case, view, Rounds()) for view in views]

    def timed(rounds: Rounds, rate: Callable[[], float]) -> Callable[[], float]:
        def run() -> float:
            busy_s, began = rig.busy_s(), time.perf_counter()
            gbps = rate()
            rounds.add("busy", (rig.busy_s() - busy_s) / case.threads / (time.perf_counter() - began))
            time.sleep(SETTLE_S)  # idle workers spin for a while
            return gbps

        return run

    try:
        for _ in range(ROUNDS):
            for result, rate in zip(results, views.values(), strict=True):
                rounds = result.rounds
                bench.read_between_streams(rounds, case.threads, "lanes", timed(rounds, rate))
    finally:
        rig.close()
    return results


@dataclass(frozen=True, slots=True)
class PrefixResult:
    """`rounds`: 1e6 KV tokens attended to per second, "shared" and "private" prefix, one layer at a time."""

    case: Case
    rounds: Rounds

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self.case),
            "shared_tokens": PREFIX_TOKENS,
            "mtokens_per_s": {name: s.as_dict() for name, s in self.rounds.spreads().items()},
            "shared_over_private": self.rounds.ratio("shared", "private").as_dict(),
        }


def measure_prefix(case: Case, bench: HostBench) -> PrefixResult:
    """Lanes whose first pages are the same pages, against the same lanes with a copy each; both cold."""
    arena_bytes = min(MAX_ARENA_BYTES, bench.arena.num_bytes)
    rigs = {
        "shared": LaneRig(case, arena_bytes, shared_tables(case, PREFIX_TOKENS)),
        "private": LaneRig(case, arena_bytes, shared_tables(case, 0)),
    }
    rounds = Rounds()
    try:
        for _ in range(ROUNDS):
            for name, rig in rigs.items():
                gbps = rate_of(rig.one_layer, case.num_bytes, FULL_S)
                rounds.add(name, gbps * 1e3 / case.token_bytes)
    finally:
        for rig in rigs.values():
            rig.close()
    return PrefixResult(case, rounds)
