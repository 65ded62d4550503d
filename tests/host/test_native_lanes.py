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
from omniserve.policy.lanes import WaitingLane, take

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
            assert rig.host.serve(0)
            assert rig.host.serve(2)
            assert not rig.host.serve(1)
            assert rig.take(layer) == [2, 0]
        rig.start_token(0)
        rig.start_token(2)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_tokens_travel_through_all_layers_with_workers(num_threads: int) -> None:
    rig = Rig()
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


# What take gives, and when


def serve_all(rig: Rig) -> None:
    for _, slot in rig.host.pending():
        assert rig.host.serve(slot)


def test_take_gives_nothing_before_the_result_is_there(rig: Rig) -> None:
    rig.exit(1, 0, 1)
    assert rig.take(1) == []
    rig.host.serve(1)
    assert rig.take(0) == []
    assert rig.take(2) == []
    assert rig.take(1) == [1]
    assert rig.take(1) == []


def test_take_is_oldest_first_and_keeps_to_its_cap(rig: Rig) -> None:
    rig.exit(0, 3)
    rig.exit(0, 1, 2)
    rig.exit(0, 0)
    for slot in (0, 1, 3):
        rig.host.serve(slot)
    assert rig.take(0, cap=0) == []
    assert rig.take(0, cap=2) == [3, 1]
    assert rig.take(0, cap=2) == [0]
    rig.host.serve(2)
    assert rig.take(0) == [2]


def test_next_iteration_rule_leaves_rows_of_this_walk_waiting(rig: Rig) -> None:
    rig.port.begin_walk()
    rig.exit(0, 0)
    serve_all(rig)
    assert rig.take(0, same_iteration=False) == []
    rig.port.end_walk()
    rig.port.begin_walk()
    rig.exit(0, 1)
    serve_all(rig)
    assert rig.take(0, same_iteration=False) == [0]
    assert rig.take(0, same_iteration=True) == [1]
    rig.port.end_walk()
    assert (rig.port.stats()["lane_entries"], rig.port.stats()["same_iteration_entries"]) == (2, 1)


def test_passes_between_walks_take_rows_of_any_age(rig: Rig) -> None:
    rig.port.begin_walk()
    rig.exit(2, 0)
    rig.port.end_walk()
    rig.exit(2, 1)
    serve_all(rig)
    assert rig.take(2, same_iteration=False) == [0, 1]
    assert rig.port.stats()["same_iteration_entries"] == 0


def test_scan_counts_ready_and_waiting_and_finds_the_oldest(rig: Rig) -> None:
    rig.exit(2, 3)  # submission 0
    rig.exit(0, 1, 0)  # submissions 1 and 2
    rig.host.serve(0)
    none = 2**64 - 1
    assert rig.scan() == ([1, 0, 0], [2, 0, 1], [2, none, none])
    rig.host.serve(3)
    rig.host.serve(1)
    assert rig.scan() == ([2, 0, 1], [2, 0, 1], [1, none, 0])


def test_waits_end_at_their_timeout_while_the_host_does_nothing(rig: Rig) -> None:
    assert not rig.port.wait_any(0.0)
    assert rig.port.wait_all(0, 0.0)  # nobody waits there
    rig.exit(0, 0, 1)
    rig.host.serve(1)
    assert rig.port.wait_any(0.0)
    assert not rig.port.wait_all(0, 0.001)


def test_the_walk_is_published_layer_by_layer(rig: Rig) -> None:
    def current_layer() -> int:
        return rig.port.stats()["current_layer"]

    assert current_layer() == -1
    rig.port.begin_walk()
    seen = []
    for layer in range(NUM_LAYERS):
        rig.exit(layer)  # no lane leaves, and the host still hears where the device is
        seen.append(current_layer())
        rig.take(layer)
        seen.append(current_layer())
    rig.port.end_walk()
    assert [*seen, current_layer()] == [0, 1, 1, 2, 2, 3, -1]
    rig.take(0)
    assert current_layer() == -1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rows_of_narrow_activations_round_to_nearest(dtype: str) -> None:
    """With one token in context the result is v itself, so every conversion on the way must be exact."""
    rig = Rig(act_dtype=dtype, kv_dtype=dtype)
    rig.open_lane(0)
    rig.start_token(0)
    width = NUM_KV_HEADS * HEAD_DIM
    wide = rig.rng.standard_normal(3 * width).astype(np.float32)
    if dtype == "float16":
        bits = wide.astype(np.float16).view(np.uint16)
    else:
        bits = (wide.view(np.uint32) >> 16).astype(np.uint16)
    q, v, x = np.repeat(bits[:width], NUM_HEADS // NUM_KV_HEADS), bits[width : 2 * width], bits[-HIDDEN:]
    slots = np.zeros(1, np.int32)
    rig.port.exit(
        0, 1, slots.ctypes.data, q.ctypes.data, 0, bits.ctypes.data, 0, v.ctypes.data, 0, x.ctypes.data, 0
    )  # fmt: skip
    rig.host.serve(0)
    attn, x_out = np.zeros(NUM_HEADS * HEAD_DIM, np.uint16), np.zeros(HIDDEN, np.uint16)
    assert rig.port.take(0, 1, True, slots.ctypes.data, attn.ctypes.data, 0, x_out.ctypes.data, 0) == 1
    heads = v.reshape(NUM_KV_HEADS, 1, HEAD_DIM).repeat(NUM_HEADS // NUM_KV_HEADS, axis=1)
    np.testing.assert_array_equal(attn, heads.ravel())
    np.testing.assert_array_equal(x_out, x)


# Cancelling


def test_cancel_with_nothing_in_flight_frees_at_once(rig: Rig) -> None:
    assert rig.port.cancel(0)
    assert rig.port.drained() == []


def test_cancel_of_a_ready_row_frees_at_once(rig: Rig) -> None:
    rig.exit(0, 0, 1)
    serve_all(rig)
    assert rig.port.cancel(0)
    assert rig.take(0) == [1]


def test_cancel_in_flight_drains_without_computing(rig: Rig) -> None:
    rig.exit(0, 0, 1)
    assert not rig.port.cancel(0)
    assert not rig.port.cancel(0)  # and may be said twice
    assert rig.port.drained() == []
    with pytest.raises(RuntimeError, match="slot 0 has a row in flight"):
        rig.port.reset(0)
    serve_all(rig)
    assert rig.port.drained() == [0]
    assert rig.port.drained() == []
    assert rig.take(0) == [1]
    worker = rig.host.stats()[0]
    assert (worker["tasks"], worker["stale_tasks"]) == (1, 1)


def test_a_drained_slot_serves_its_next_owner(rig: Rig) -> None:
    rig.exit(0, 0)
    rig.port.cancel(0)
    serve_all(rig)
    assert rig.port.drained() == [0]
    rig.open_lane(0)
    rig.start_token(0)
    rig.exit(0, 0)
    assert rig.take(0) == []  # the old completion is not the new row's
    serve_all(rig)
    assert rig.take(0) == [0]


# Copies


DEVICE_KV = native.KvGeometry(
    num_layers=NUM_LAYERS,
    num_kv_heads=NUM_KV_HEADS,
    head_dim=HEAD_DIM,
    page_size=DEVICE_PAGE,
    dtype="float32",
)


def filled_page(first: int) -> npt.NDArray[np.uint8]:
    """A device page whose token t holds k = first + t and v = -(first + t), plus layer / 8 each."""
    geometry = DEVICE_KV
    page = np.zeros(geometry.page_bytes, np.uint8)
    kv = native.PagedKv(geometry, page.ctypes.data, 1)
    tokens, width = geometry.page_size, NUM_KV_HEADS * HEAD_DIM
    k = np.repeat(np.arange(first, first + tokens, dtype=np.float32), width).reshape(tokens, width)
    ids, offsets = np.zeros(tokens, np.int32), np.arange(tokens, dtype=np.int32)
    for layer in range(NUM_LAYERS):
        rows_k, rows_v = k + layer / 8, layer / 8 - k
        kv.write(
            layer, tokens, rows_k.ctypes.data, width, rows_v.ctypes.data, width, "float32",
            ids.ctypes.data, offsets.ctypes.data,
        )  # fmt: skip
    return page


def gathered(kv: native.PagedKv, layer: int, table: list[int], num_tokens: int) -> tuple[Rows, Rows]:
    ids = np.array(table, np.int32)
    k = np.empty((NUM_KV_HEADS, num_tokens, HEAD_DIM), np.float32)
    v = np.empty_like(k)
    kv.gather(layer, ids.ctypes.data, num_tokens, k.ctypes.data, v.ctypes.data)
    return k, v


def test_landed_tokens_lie_in_host_pages_of_another_size(rig: Rig) -> None:
    first = filled_page(0)
    second = filled_page(DEVICE_PAGE)
    table = [5, 2, 9]  # 12 tokens in host pages of 4
    rig.port.land(10, first.ctypes.data, 0, 6, 0, [5, 2])
    rig.port.land(11, second.ctypes.data, 0, 5, 2, [2, 9])
    first[:] = second[:] = 0  # both pages may be reused at once
    assert rig.host.pending_copies() == [10, 11]
    assert rig.host.serve_copy(11)
    assert rig.host.serve_copy(10)
    assert not rig.host.serve_copy(10)
    assert rig.port.collect_copies() == [10, 11]
    for layer in range(NUM_LAYERS):
        k, v = gathered(rig.host.kv, layer, table, 11)
        np.testing.assert_array_equal(k, np.broadcast_to(np.arange(11.0)[None, :, None] + layer / 8, k.shape))
        np.testing.assert_array_equal(v, np.broadcast_to(layer / 8 - np.arange(11.0)[None, :, None], v.shape))


def test_a_fetch_writes_its_token_range_and_nothing_else(rig: Rig) -> None:
    page = filled_page(0)
    rig.port.land(1, page.ctypes.data, 0, 6, 3, [7, 0, 3])
    rig.host.serve_copy(1)
    back = filled_page(100)
    rig.port.fetch(2, 1, 4, 0, [0], back.ctypes.data)  # host tokens 1 .. 4 of the landed page
    rig.host.serve_copy(2)
    assert back.tobytes() == filled_page(100).tobytes()  # until it is collected
    assert rig.port.collect_copies() == [1, 2]
    k, v = gathered(native.PagedKv(DEVICE_KV, back.ctypes.data, 1), 2, [0], DEVICE_PAGE)
    assert k[1, :, 5].tolist() == [100.25, 1.25, 2.25, 3.25, 4.25, 105.25]
    assert v[0, :, 0].tolist() == [-99.75, -0.75, -1.75, -2.75, -3.75, -104.75]


def test_a_cancelled_fetch_leaves_the_device_page_alone(rig: Rig) -> None:
    page = np.full(rig.geometry.device_page_bytes, 77, np.uint8)
    rig.port.fetch(5, 0, 4, 0, [1], page.ctypes.data)
    rig.port.cancel_fetch(5)
    rig.host.serve_copy(5)
    assert rig.port.collect_copies() == [5]
    assert (page == 77).all()


def test_frames_are_counted_and_never_overrun(rig: Rig) -> None:
    page = np.zeros(rig.geometry.device_page_bytes, np.uint8)
    for copy in range(2):
        rig.port.land(copy, page.ctypes.data, 0, 1, 0, [0])
    assert rig.port.free_frames() == 0
    with pytest.raises(RuntimeError, match="free frame"):
        rig.port.land(2, page.ctypes.data, 0, 1, 0, [0])
    rig.host.serve_copy(0)
    assert rig.port.collect_copies() == [0]
    assert rig.port.free_frames() == 1


# Sleeping and waking


def is_written(eventfd: int) -> bool:
    return bool(select.select([eventfd], [], [], 0)[0])


def test_the_host_writes_the_eventfd_once_per_arming(eventfd: int) -> None:
    rig = Rig(eventfd)
    for slot in (0, 1):
        rig.open_lane(slot)
        rig.start_token(slot)
    rig.exit(0, 0, 1)
    assert not rig.port.arm()
    rig.host.serve(0)
    assert is_written(eventfd)
    assert os.eventfd_read(eventfd) == 1
    rig.host.serve(1)
    assert not is_written(eventfd)  # the engine is awake


def test_arming_with_something_complete_does_not_sleep(eventfd: int) -> None:
    rig = Rig(eventfd)
    page = np.zeros(rig.geometry.device_page_bytes, np.uint8)
    rig.port.land(1, page.ctypes.data, 0, 1, 0, [0])
    rig.host.serve_copy(1)
    assert rig.port.arm()
    rig.port.collect_copies()
    rig.open_lane(0)
    rig.start_token(0)
    rig.exit(0, 0)
    rig.port.cancel(0)
    rig.host.serve(0)  # an acknowledgement is news, too
    assert rig.port.arm()
    assert not is_written(eventfd)


def test_disarmed_engine_is_left_alone(eventfd: int) -> None:
    rig = Rig(eventfd)
    rig.open_lane(0)
    rig.start_token(0)
    rig.exit(0, 0)
    assert not rig.port.arm()
    rig.port.disarm()
    rig.host.serve(0)
    assert not is_written(eventfd)


# Errors name what is wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 60}, "head_dim must be a multiple of 8 from 64 to 256, not 60"),
        ({"head_dim": 264}, "head_dim must be a multiple of 8 from 64 to 256, not 264"),
        ({"num_heads": 3}, "num_heads must be a multiple of num_kv_heads 2, not 3"),
        ({"max_lanes": 0}, "max_lanes must be from 1 to 1048576, not 0"),
        ({"act_dtype": "int8"}, "act_dtype must be float32, bfloat16 or float16, not int8"),
        ({"num_frames": -1}, "num_frames must be from 0 to 65536, not -1"),
    ],
)
def test_a_bad_geometry_names_field_and_limit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lane_geometry(**change)


def test_bad_slots_pages_and_positions_name_their_limits(rig: Rig) -> None:
    with pytest.raises(ValueError, match=r"slot 4 is outside 0 \.\. 3"):
        rig.port.cancel(MAX_LANES)
    with pytest.raises(ValueError, match=r"host page 24 is outside 0 \.\. 23"):
        rig.port.set_pages(0, 0, [24])
    with pytest.raises(ValueError, match="at most 6 host pages"):
        rig.port.set_pages(0, 6, [1])
    with pytest.raises(ValueError, match="position 24 is outside the 6 host pages of slot 0"):
        rig.port.start_token(0, HOST_PAGE * PAGES_PER_LANE)
    with pytest.raises(ValueError, match=r"layer 3 is outside 0 \.\. 2"):
        rig.take(NUM_LAYERS)
    with pytest.raises(ValueError, match="host_pages must name 2 pages, not 1"):
        rig.port.land(0, rig.address, 0, 4, 1, [0])


def test_a_second_row_in_flight_is_refused_and_nothing_is_submitted(rig: Rig) -> None:
    rig.exit(0, 1)
    for slots in ([0, 1], [2, 2]):
        ids, rows = np.array(slots, np.int32), np.zeros((2, 256), np.float32)
        row = (rows.ctypes.data, 256)
        with pytest.raises(RuntimeError, match="already has a row in flight"):
            rig.port.exit(1, 2, ids.ctypes.data, *row, *row, *row, *row)
    assert rig.host.pending() == [(0, 1)]
    rig.exit(1, 0, 2)  # both are still idle


def test_a_host_refuses_memory_that_is_no_segment_and_an_arena_too_large(rig: Rig) -> None:
    nothing = mmap.mmap(-1, 1 << 16)
    with pytest.raises(ValueError, match="no lane segment"):
        native.HostWorkers(np.frombuffer(nothing, np.uint8).ctypes.data)
    needed = rig.geometry.host_page_bytes * rig.geometry.num_host_pages
    with pytest.raises(ValueError, match=f"need {needed} bytes, the limit is {needed - 1}"):
        native.HostWorkers(rig.address, arena_bytes=needed - 1)


# Nothing is lost, whatever the order


class LaneMachine(RuleBasedStateMachine):
    """Random exits, services, takes, cancels, walks and resets against a plain model of who is where."""

    slots = st.integers(0, MAX_LANES - 1)
    layers = st.integers(0, NUM_LAYERS - 1)

    @initialize()
    def start(self) -> None:
        self.rig = Rig()
        self.idle: dict[int, int] = {}  # slot -> next layer
        self.waiting: list[tuple[int, int, int]] = []  # (slot, layer, iteration), oldest first
        self.served: set[int] = set()
        self.draining: list[int] = []
        self.free = set(range(MAX_LANES))
        self.iteration, self.in_walk = 0, False

    @precondition(lambda self: self.free)
    @rule(data=st.data())
    def new_owner(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.free)))
        self.free.remove(slot)
        self.rig.open_lane(slot)
        self.rig.start_token(slot)
        self.idle[slot] = 0

    @precondition(lambda self: self.idle)
    @rule(data=st.data())
    def exit_rows(self, data: st.DataObject) -> None:
        layer = data.draw(st.sampled_from(sorted(set(self.idle.values()))))
        here = [slot for slot in sorted(self.idle) if self.idle[slot] == layer]
        for slot in here:
            del self.idle[slot]
            self.waiting.append((slot, layer, self.iteration))
        self.rig.exit(layer, *here)

    @rule(slot=slots)
    def serve(self, slot: int) -> None:
        is_waiting = any(slot == entry[0] for entry in self.waiting) and slot not in self.served
        is_draining = slot in self.draining and slot not in self.served
        assert self.rig.host.serve(slot) == (is_waiting or is_draining)
        if is_waiting or is_draining:
            self.served.add(slot)

    @rule(layer=layers, cap=st.integers(0, MAX_LANES), same_iteration=st.booleans())
    def take(self, layer: int, cap: int, same_iteration: bool) -> None:
        """The native rule is the policy's own; outside walks no row is too young."""
        here = [entry for entry in self.waiting if entry[1] == layer]
        lanes = [WaitingLane(slot, born, slot in self.served) for slot, _, born in here]
        now = self.iteration if self.in_walk else self.iteration + 1
        entering = take(lanes, cap, now, same_iteration)
        assert self.rig.take(layer, cap, same_iteration) == entering
        self.waiting = [entry for entry in self.waiting if entry[0] not in entering]
        for slot in entering:
            self.served.remove(slot)
            self.advance(slot, layer)

    def advance(self, slot: int, layer: int) -> None:
        self.idle[slot] = (layer + 1) % NUM_LAYERS
        if layer < NUM_LAYERS - 1:
            return
        if self.rig.position[slot] + 1 < HOST_PAGE * PAGES_PER_LANE:
            self.rig.start_token(slot)
        else:
            del self.idle[slot]
            self.free.add(slot)

    @rule(slot=slots)
    def cancel(self, slot: int) -> None:
        entry = next((entry for entry in self.waiting if entry[0] == slot), None)
        in_flight = slot in self.draining or (entry is not None and slot not in self.served)
        assert self.rig.port.cancel(slot) == (not in_flight)
        if entry:
            self.waiting.remove(entry)
            self.rig.expected.pop(slot)
        self.idle.pop(slot, None)
        if not in_flight:
            self.served.discard(slot)
            self.free.add(slot)
        elif slot not in self.draining:
            self.draining.append(slot)

    @rule()
    def drain(self) -> None:
        done = [slot for slot in self.draining if slot in self.served]
        assert self.rig.port.drained() == done
        for slot in done:
            self.draining.remove(slot)
            self.served.remove(slot)
            self.free.add(slot)

    @rule(begin=st.booleans())
    def walk(self, begin: bool) -> None:
        if begin:
            self.rig.port.begin_walk()
        else:
            self.rig.port.end_walk()
        self.in_walk = begin
        self.iteration += 1

    @invariant()
    def the_port_agrees(self) -> None:
        if not hasattr(self, "rig"):
            return
        ready, waiting, _ = self.rig.scan()
        layers = [layer for _, layer, _ in self.waiting]
        assert waiting == [layers.count(layer) for layer in range(NUM_LAYERS)]
        layers = [layer for slot, layer, _ in self.waiting if slot in self.served]
        assert ready == [layers.count(layer) for layer in range(NUM_LAYERS)]
        unserved = [s for s, _, _ in self.waiting if s not in self.served]
        unserved += [s for s in self.draining if s not in self.served]
        assert sorted(slot for _, slot in self.rig.host.pending()) == sorted(unserved)


TestLaneMachine = LaneMachine.TestCase
TestLaneMachine.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
