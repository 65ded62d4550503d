"""The same kernel where lanes use it: rows submitted through a segment, served by host workers, taken back.

What a row costs besides its attention (slots, queues, pieces, wake-ups) is the difference to `bench.host`.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np

import omniserve._native as _native
from omniserve.bench.host import (
    NUM_KV_HEADS,
    PAGE_SIZE,
    Case,
    HostBench,
    Rates,
    fill_random,
    memory_as_tensor,
    rate_of,
)
from omniserve.bench.measure import Spread
from omniserve.host.segment import address_of

MAX_ARENA_BYTES = 3 << 29
TIMEOUT_S = 60.0


def lane_cases(threads: int, quick: bool) -> Iterator[Case]:
    """One lane that all workers share, a few, and many, at the shapes the project promises figures for."""
    for group, (lanes, context) in product((1, 4, 8), ((1, 4096), (8, 1024), (8, 4096), (64, 1024))):
        if not quick or (group == 4 and lanes <= 8):
            yield Case("bfloat16", group, 128, context, lanes, threads)
    yield Case("bfloat16", 3, 64, 4096, 8, threads)


@dataclass(frozen=True, slots=True)
class LaneResult:
    case: Case
    stream_gbps: Spread
    gbps: Spread

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self.case),
            "stream_gbps": self.stream_gbps.as_dict(),
            "gbps": self.gbps.as_dict(),
            "share_of_stream": self.gbps.median / self.stream_gbps.median,
        }


class LaneRig:
    """`lanes` lanes in mid-sequence and a host that serves them, in one process; one call is one layer."""

    def __init__(self, case: Case, arena_bytes: int) -> None:
        self.case = case
        pages_per_lane = math.ceil(case.context / PAGE_SIZE)
        layers = math.ceil(arena_bytes / case.num_bytes)
        self.geometry = _native.LaneGeometry(
            num_layers=layers,
            num_heads=NUM_KV_HEADS * case.group,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=case.head_dim,
            hidden_size=64,  # residuals are the engine's and cost the host nothing
            act_dtype="float32",
            kv_dtype=case.dtype,
            max_lanes=case.lanes,
            host_page_size=PAGE_SIZE,
            max_pages_per_lane=pages_per_lane,
            num_host_pages=case.lanes * pages_per_lane,
            device_page_size=PAGE_SIZE,
        )
        self.memory = mmap.mmap(-1, _native.segment_bytes(self.geometry))
        address = address_of(self.memory)
        self.port = _native.LanePort(self.geometry, address)
        self.host = _native.HostWorkers(address)
        values = memory_as_tensor(self.host.kv.page_address(0), self.host.arena_bytes, case.dtype)
        fill_random(values)
        self._open_lanes(pages_per_lane)
        self._make_rows()
        self.layer = 0
        self.host.start(case.threads)

    def _open_lanes(self, pages_per_lane: int) -> None:
        order = np.random.default_rng(0).permutation(self.geometry.num_host_pages)
        for slot, pages in enumerate(order.reshape(self.case.lanes, pages_per_lane).tolist()):
            self.port.reset(slot)
            self.port.set_pages(slot, 0, pages)
            self.port.start_token(slot, self.case.context - 1)

    def _make_rows(self) -> None:
        rng, lanes, g = np.random.default_rng(1), self.case.lanes, self.geometry
        self.slots = np.arange(lanes, dtype=np.int32)
        self.q = rng.standard_normal((lanes, g.num_heads * g.head_dim), np.float32)
        self.kv = rng.standard_normal((2, lanes, g.num_kv_heads * g.head_dim), np.float32)
        self.x = np.zeros((lanes, g.hidden_size), np.float32)
        self.attn = np.empty_like(self.q)

    def __call__(self) -> None:
        """All lanes' rows leave at the next layer and come back."""
        n, layer = self.case.lanes, self.layer
        self.layer = (layer + 1) % self.geometry.num_layers
        self.port.exit(
            layer, n, self.slots.ctypes.data, self.q.ctypes.data, self.q.shape[1], self.kv[0].ctypes.data,
            self.kv.shape[2], self.kv[1].ctypes.data, self.kv.shape[2], self.x.ctypes.data, self.x.shape[1],
        )  # fmt: skip
        if not self.port.wait_all(layer, TIMEOUT_S):
            raise RuntimeError(f"no result of layer {layer} within {TIMEOUT_S} s")
        self.port.take(
            layer, n, True, self.slots.ctypes.data, self.attn.ctypes.data, self.attn.shape[1],
            self.x.ctypes.data, self.x.shape[1],
        )  # fmt: skip

    def close(self) -> None:
        self.host.stop()


def measure_lanes(case: Case, bench: HostBench) -> LaneResult:
    """KV bytes per second from `exit` of all rows to their `take`, beside the streaming rate."""
    rig = LaneRig(case, min(MAX_ARENA_BYTES, bench.arena.num_bytes))
    rates = Rates()
    try:
        for _ in range(bench.sweep.rounds):
            rates.add("stream", bench.stream(case.threads))
            rates.add("lanes", rate_of(rig, case.num_bytes, bench.sweep.round_s))
    finally:
        rig.close()
    spreads = rates.spreads()
    return LaneResult(case, spreads["stream"], spreads["lanes"])
