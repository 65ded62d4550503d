"""LanePort on the device side, HostWorkers on the host side: rows that leave and enter again.

Most tests serve tasks by hand, so that they decide when each result appears; a few run real workers.
"""

import mmap
from typing import Any

import numpy as np
import pytest

from host.lane_rig import (
    HEAD_DIM,
    HIDDEN,
    HOST_PAGE,
    MAX_LANES,
    NUM_HEADS,
    NUM_KV_HEADS,
    NUM_LAYERS,
    PAGES_PER_LANE,
    Rig,
    lane_geometry,
)
from omniserve import _native as native

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


@pytest.mark.parametrize("window", [1, HOST_PAGE, HOST_PAGE + 1, 9])
@pytest.mark.parametrize("host_kv_dtype", ["float32", "int8"])
def test_a_lane_attends_to_the_last_tokens_of_a_window_in_its_layers_alone(
    window: int, host_kv_dtype: str
) -> None:
    rig = Rig(window=window, window_layers=[0, 2], host_kv_dtype=host_kv_dtype)
    assert [rig.geometry.first_token(layer, 20) for layer in range(NUM_LAYERS)] == [
        20 - window,
        0,
        20 - window,
    ]
    rig.open_lane(1)
    for _ in range(PAGES_PER_LANE * HOST_PAGE):
        rig.start_token(1)
        for layer in range(NUM_LAYERS):
            rig.exit(layer, 1)
            rig.serve_all()
            assert rig.take(layer) == [1]  # checks the rows


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
    rig.serve_all()
    assert rig.take(0, same_iteration=False) == []
    rig.port.end_walk()
    rig.port.begin_walk()
    rig.exit(0, 1)
    rig.serve_all()
    assert rig.take(0, same_iteration=False) == [0]
    assert rig.take(0, same_iteration=True) == [1]
    rig.port.end_walk()
    assert (rig.port.stats()["lane_entries"], rig.port.stats()["same_iteration_entries"]) == (2, 1)


def test_passes_between_walks_take_rows_of_any_age(rig: Rig) -> None:
    rig.port.begin_walk()
    rig.exit(2, 0)
    rig.port.end_walk()
    rig.exit(2, 1)
    rig.serve_all()
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
    rig.serve_all()
    assert rig.port.cancel(0)
    assert rig.take(0) == [1]


def test_cancel_in_flight_drains_without_computing(rig: Rig) -> None:
    rig.exit(0, 0, 1)
    assert not rig.port.cancel(0)
    assert not rig.port.cancel(0)  # and may be said twice
    assert rig.port.drained() == []
    with pytest.raises(RuntimeError, match="slot 0 has a row in flight"):
        rig.port.reset(0)
    rig.serve_all()
    assert rig.port.drained() == [0]
    assert rig.port.drained() == []
    assert rig.take(0) == [1]
    worker = rig.host.stats()[0]
    assert (worker["tasks"], worker["stale_tasks"]) == (1, 1)


def test_a_drained_slot_serves_its_next_owner(rig: Rig) -> None:
    rig.exit(0, 0)
    rig.port.cancel(0)
    rig.serve_all()
    assert rig.port.drained() == [0]
    rig.open_lane(0)
    rig.start_token(0)
    rig.exit(0, 0)
    assert rig.take(0) == []  # the old completion is not the new row's
    rig.serve_all()
    assert rig.take(0) == [0]


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
        ({"window": -1}, "window must be from 0 to 2147483647, not -1"),
        ({"window": 4, "window_layers": [3]}, r"window_layers: layer 3 is outside 0 \.\. 2"),
        ({"window": 4, "num_layers": 1025}, r"num_layers \(with a window\) must be from 1 to 1024, not 1025"),
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
