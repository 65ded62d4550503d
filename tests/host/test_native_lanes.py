"""Both ends of the segment in one process: LanePort on the device side, HostWorkers on the host side.

Most tests serve tasks by hand, so that they decide when each result appears; a few run real workers.
"""

import mmap
import os
import select
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from omniserve import _native as native

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, HIDDEN = 3, 4, 2, 64, 24
HOST_PAGE, DEVICE_PAGE, MAX_LANES, PAGES_PER_LANE = 4, 6, 4, 6
Rows = npt.NDArray[np.float32]


def lane_geometry(**changes: Any) -> native.LaneGeometry:
    sizes = dict(
        num_layers=NUM_LAYERS,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        hidden_size=HIDDEN,
        act_dtype="float32",
        kv_dtype="float32",
        max_lanes=MAX_LANES,
        host_page_size=HOST_PAGE,
        max_pages_per_lane=PAGES_PER_LANE,
        num_host_pages=MAX_LANES * PAGES_PER_LANE,
        device_page_size=DEVICE_PAGE,
        num_frames=2,
    )
    return native.LaneGeometry(**{**sizes, **changes})


def attention(q: Rows, keys: Rows, values: Rows) -> npt.NDArray[np.float64]:
    """Reference in float64: q [heads, dim], keys and values [tokens, kv_heads, dim] -> [heads, dim]."""
    group = q.shape[0] // keys.shape[1]
    out = np.empty(q.shape)
    for head, query in enumerate(q.astype(np.float64)):
        scores = keys[:, head // group].astype(np.float64) @ query / np.sqrt(q.shape[1])
        weights = np.exp(scores - scores.max())
        out[head] = weights @ values[:, head // group] / weights.sum()
    return out


class Rig:
    """A port, a host, and what every lane's attention must be."""

    def __init__(self, eventfd: int = -1, **changes: Any) -> None:
        self.geometry = lane_geometry(**changes)
        g = self.geometry
        self.memory = mmap.mmap(-1, native.segment_bytes(g))
        self.address = np.frombuffer(self.memory, np.uint8).ctypes.data
        self.port = native.LanePort(g, self.address)
        self.host = native.HostWorkers(self.address, eventfd)
        self.rng = np.random.default_rng(7)
        self.position = [-1] * g.max_lanes
        self.keys = [
            [np.empty((0, g.num_kv_heads, g.head_dim), np.float32)] * g.num_layers for _ in range(g.max_lanes)
        ]
        self.values = [list(rows) for rows in self.keys]
        self.expected: dict[int, npt.NDArray[np.float64]] = {}  # slot -> result of its row in flight
        self.residual: dict[int, Rows] = {}

    def open_lane(self, slot: int) -> None:
        g = self.geometry
        self.port.reset(slot)
        self.port.set_pages(slot, 0, list(range(slot, g.max_lanes * g.max_pages_per_lane, g.max_lanes)))
        self.position[slot] = -1
        self.keys[slot] = [np.empty((0, g.num_kv_heads, g.head_dim), np.float32)] * g.num_layers
        self.values[slot] = list(self.keys[slot])

    def start_token(self, slot: int) -> None:
        self.position[slot] += 1
        self.port.start_token(slot, self.position[slot])

    def exit(self, layer: int, *slots: int) -> None:
        """Random rows of the given slots leave the batch at `layer`."""
        g, n = self.geometry, len(slots)
        q = self.rng.standard_normal((n, g.num_heads, g.head_dim), np.float32)
        kv = self.rng.standard_normal((n, 2, g.num_kv_heads, g.head_dim), np.float32)  # k and v in one buffer
        x = self.rng.standard_normal((n, g.hidden_size), np.float32)
        ids = np.array(slots, np.int32)
        width = g.num_kv_heads * g.head_dim
        k_addr = kv.ctypes.data
        self.port.exit(
            layer, n, ids.ctypes.data, q.ctypes.data, g.num_heads * g.head_dim, k_addr, 2 * width,
            k_addr + 4 * width, 2 * width, x.ctypes.data, g.hidden_size,
        )  # fmt: skip
        for i, slot in enumerate(slots):
            self.keys[slot][layer] = np.concatenate([self.keys[slot][layer], kv[i, None, 0]])
            self.values[slot][layer] = np.concatenate([self.values[slot][layer], kv[i, None, 1]])
            self.expected[slot] = attention(q[i], self.keys[slot][layer], self.values[slot][layer])
            self.residual[slot] = x[i]

    def take(self, layer: int, cap: int = MAX_LANES, same_iteration: bool = True) -> list[int]:
        """Slots taken at `layer`, their rows checked."""
        g = self.geometry
        slots = np.full(MAX_LANES, -1, np.int32)
        attn = np.full((MAX_LANES, g.num_heads * g.head_dim + 3), np.nan, np.float32)  # wider than a row
        x = np.full((MAX_LANES, g.hidden_size), np.nan, np.float32)
        n = self.port.take(
            layer,
            cap,
            same_iteration,
            slots.ctypes.data,
            attn.ctypes.data,
            attn.shape[1],
            x.ctypes.data,
            x.shape[1],
        )
        for i, slot in enumerate(slots[:n].tolist()):
            got = attn[i, : g.num_heads * g.head_dim].reshape(g.num_heads, g.head_dim)
            np.testing.assert_allclose(got, self.expected.pop(slot), atol=2e-6)
            np.testing.assert_array_equal(x[i], self.residual.pop(slot))
        assert np.isnan(attn[n:]).all()
        return slots[:n].tolist()

    def scan(self) -> tuple[list[int], list[int], list[int]]:
        layers = self.geometry.num_layers
        ready, waiting, oldest = (
            np.empty(layers, np.int32),
            np.empty(layers, np.int32),
            np.empty(layers, np.uint64),
        )
        self.port.scan(ready.ctypes.data, waiting.ctypes.data, oldest.ctypes.data)
        return ready.tolist(), waiting.tolist(), oldest.tolist()


@pytest.fixture
def rig() -> Rig:
    rig = Rig()
    for slot in range(MAX_LANES):
        rig.open_lane(slot)
        rig.start_token(slot)
    return rig


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


# A lane's way through the layers


def test_tokens_travel_through_all_layers_by_hand(rig: Rig) -> None:
    for _ in range(HOST_PAGE + 2):
        for layer in range(NUM_LAYERS):
            rig.exit(layer, 2, 0)
            assert rig.host.pending() == [(layer, 2), (layer, 0)]
            assert rig.host.serve(0) and rig.host.serve(2) and not rig.host.serve(1)
            assert rig.take(layer) == [2, 0]
        rig.start_token(0)
        rig.start_token(2)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("act_dtype", ["float32"])
def test_tokens_travel_through_all_layers_with_workers(num_threads: int, act_dtype: str) -> None:
    rig = Rig(act_dtype=act_dtype)
    rig.host.start(num_threads)
    for slot in range(MAX_LANES):
        rig.open_lane(slot)
    for _ in range(PAGES_PER_LANE * HOST_PAGE):
        for slot in range(MAX_LANES):
            rig.start_token(slot)
        rig.port.begin_walk()
        for layer in range(NUM_LAYERS):
            rig.exit(layer, *range(MAX_LANES))
            assert rig.port.wait_all(layer, 30.0)
            assert rig.take(layer) == list(range(MAX_LANES))
        rig.port.end_walk()
    rig.host.stop()
    rows = PAGES_PER_LANE * HOST_PAGE * NUM_LAYERS * MAX_LANES
    assert rig.port.stats()["same_iteration_entries"] == rows


def test_a_long_context_is_split_among_workers_and_stays_exact() -> None:
    pages = 300
    rig = Rig(max_pages_per_lane=pages, num_host_pages=pages, max_lanes=1, num_layers=1, num_frames=0)
    rig.open_lane(0)
    kv, tokens = rig.host.kv, pages * HOST_PAGE - 1
    keys, values = rig.rng.standard_normal((2, tokens, NUM_KV_HEADS, HEAD_DIM), np.float32)
    at = np.arange(tokens, dtype=np.int32)
    page_ids, offsets, width = at // HOST_PAGE, at % HOST_PAGE, NUM_KV_HEADS * HEAD_DIM
    kv.write(
        0,
        tokens,
        keys.ctypes.data,
        width,
        values.ctypes.data,
        width,
        "float32",
        page_ids.ctypes.data,
        offsets.ctypes.data,
    )
    rig.keys[0], rig.values[0] = [keys], [values]
    rig.port.start_token(0, tokens)
    rig.host.start(2)
    rig.exit(0, 0)
    assert rig.port.wait_any(30.0)
    assert rig.take(0) == [0]
    rig.host.stop()
    assert sum(worker["pieces"] for worker in rig.host.stats()) > NUM_KV_HEADS
    assert sum(worker["tasks"] for worker in rig.host.stats()) == 1
