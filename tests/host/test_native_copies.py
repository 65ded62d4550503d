"""Pages that move between device and host, and the engine's sleep until something is complete."""

import os
import select

import numpy as np
import numpy.typing as npt
import pytest

from host.lane_rig import DEVICE_PAGE, HEAD_DIM, NUM_KV_HEADS, NUM_LAYERS, Rig, Rows
from omniserve import _native as native

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
