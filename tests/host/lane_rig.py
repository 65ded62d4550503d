"""Both ends of a segment in one process, with what every lane's attention must be."""

import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from omniserve import _native as native

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, HIDDEN = 3, 4, 2, 64, 24
HOST_PAGE, DEVICE_PAGE, MAX_LANES, PAGES_PER_LANE = 4, 6, 4, 6
Rows = npt.NDArray[np.float32]


def lane_geometry(**changes: Any) -> native.LaneGeometry:
    sizes = {
        "num_layers": NUM_LAYERS,
        "num_heads": NUM_HEADS,
        "num_kv_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_size": HIDDEN,
        "act_dtype": "float32",
        "kv_dtype": "float32",
        "max_lanes": MAX_LANES,
        "host_page_size": HOST_PAGE,
        "max_pages_per_lane": PAGES_PER_LANE,
        "num_host_pages": MAX_LANES * PAGES_PER_LANE,
        "device_page_size": DEVICE_PAGE,
        "num_frames": 2,
    }
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


def as_int8(rows: Rows) -> tuple[npt.NDArray[np.int8], Rows]:
    """What int8 storage keeps of rows [..., dim]: integers and scales [..., 1]."""
    amax = np.abs(rows).max(axis=-1, keepdims=True)
    scales = (amax / np.float32(127)).astype(np.float32)
    integers = np.rint(rows / np.where(scales == 0, np.float32(1), scales))
    return integers.astype(np.int8), scales


def dequantised(rows: Rows) -> npt.NDArray[np.float64]:
    integers, scales = as_int8(rows)
    return integers * scales.astype(np.float64)


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
            kept = dequantised(kv[i, None]) if g.host_kv_dtype == "int8" else kv[i, None]
            self.keys[slot][layer] = np.concatenate([self.keys[slot][layer], kept[:, 0]])
            self.values[slot][layer] = np.concatenate([self.values[slot][layer], kept[:, 1]])
            keys, values = self.keys[slot][layer], self.values[slot][layer]
            first = g.first_token(layer, len(keys))
            self.expected[slot] = attention(q[i], keys[first:], values[first:])
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
        taken: list[int] = slots[:n].tolist()
        return taken

    def scan(self) -> tuple[list[int], list[int], list[int]]:
        layers = self.geometry.num_layers
        ready, waiting, oldest = (
            np.empty(layers, np.int32),
            np.empty(layers, np.int32),
            np.empty(layers, np.uint64),
        )
        self.port.scan(ready.ctypes.data, waiting.ctypes.data, oldest.ctypes.data)
        return ready.tolist(), waiting.tolist(), oldest.tolist()

    def serve_all(self) -> None:
        for _, slot in self.host.pending():
            assert self.host.serve(slot)
