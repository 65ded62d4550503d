"""What a row costs without its attention: copying into and out of slots, and the way to a worker and back."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

import omniserve._native as _native
from omniserve.bench.host_memory import PAGE_SIZE, TORCH_DTYPES
from omniserve.bench.measure import Rounds, Spread, cpus_to_pin, percentile, pinned, seconds_of
from omniserve.host.segment import address_of

ROWS = 400
SLOT_ROUNDS = 30
TRIPS = 2000
PARKED_TRIPS = 200
PARK_S = 0.001  # a worker has stopped spinning and sleeps after this long without work
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class SlotShape:
    """The rows of one model as lanes carry them."""

    name: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    act_dtype: str

    @property
    def item(self) -> int:
        return 4 if self.act_dtype == "float32" else 2

    @property
    def exit_bytes(self) -> int:
        """Bytes of one row's q, k, v and residual: what its exit copies."""
        q, kv, x = self._elements()
        return (q + 2 * kv + x) * self.item

    @property
    def take_bytes(self) -> int:
        """Bytes of one row's attention result and residual: what its entry copies."""
        q, _, x = self._elements()
        return (q + x) * self.item

    def _elements(self) -> tuple[int, int, int]:
        return self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.hidden_size


SLOT_SHAPES = (
    SlotShape("SmolLM2-135M", 576, 9, 3, 64, "float32"),
    SlotShape("SmolLM2-135M", 576, 9, 3, 64, "bfloat16"),
    SlotShape("Llama-2-70B, one of 4 ranks", 8192, 16, 2, 128, "bfloat16"),
)


class SlotRig:
    """`rows` lanes at their first token, one layer, and a host whose threads run only when asked to."""

    def __init__(self, shape: SlotShape, rows: int, cpus: Sequence[int] = ()) -> None:
        self.geometry = _native.LaneGeometry(
            num_layers=1,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            hidden_size=shape.hidden_size,
            act_dtype=shape.act_dtype,
            kv_dtype=shape.act_dtype,
            max_lanes=rows,
            host_page_size=PAGE_SIZE,
            max_pages_per_lane=1,
            num_host_pages=rows,
            device_page_size=PAGE_SIZE,
        )
        self.memory = mmap.mmap(-1, _native.segment_bytes(self.geometry))
        address = address_of(self.memory)
        self.port = _native.LanePort(self.geometry, address)
        self.host = _native.HostWorkers(address, cpus=list(cpus))
        for slot in range(rows):
            self.port.reset(slot)
            self.port.set_pages(slot, 0, [slot])
            self.port.start_token(slot, 0)
        dtype = TORCH_DTYPES[shape.act_dtype]
        width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.slots = np.arange(rows, dtype=np.int32)
        self.taken = np.empty(rows, dtype=np.int32)
        # q, k and v are views of one buffer, as Decoder.pre_attention returns them.
        self.qkv = torch.randn(rows, width + 2 * kv_width).to(dtype)
        q, k, v = torch.split(self.qkv, [width, kv_width, kv_width], dim=1)
        self.attn = torch.empty(rows, width, dtype=dtype)
        self.x = torch.randn(rows, shape.hidden_size).to(dtype)
        self.x_out = torch.empty_like(self.x)
        # Addresses once: what is timed is the native call, as cheaply entered as Python can.
        self._exit_args = (
            0, rows, self.slots.ctypes.data, q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0),
            v.data_ptr(), v.stride(0), self.x.data_ptr(), shape.hidden_size,
        )  # fmt: skip
        self._take_args = (
            0, rows, True, self.taken.ctypes.data, self.attn.data_ptr(), width, self.x_out.data_ptr(),
            shape.hidden_size,
        )  # fmt: skip

    def exit(self) -> None:
        self.port.exit(*self._exit_args)

    def take(self) -> int:
        return self.port.take(*self._take_args)

    def wait(self) -> None:
        if not self.port.wait_all(0, TIMEOUT_S):
            raise RuntimeError(f"no result within {TIMEOUT_S} s")


@dataclass(frozen=True, slots=True)
class SlotResult:
    """Microseconds for all rows: "exit", "take", and "copy_exit", "copy_take", a memcpy of the same bytes."""

    shape: SlotShape
    rounds: Rounds

    def as_dict(self) -> dict[str, Any]:
        us = self.rounds.spreads()
        num_bytes = {"exit": ROWS * self.shape.exit_bytes, "take": ROWS * self.shape.take_bytes}
        return {
            **asdict(self.shape),
            "rows": ROWS,
            **{
                way: {
                    "us": us[way].as_dict(),
                    "bytes": moved,
                    "gbps": moved / us[way].median / 1e3,
                    "copy_us": us[f"copy_{way}"].as_dict(),
                    "copy_gbps": moved / us[f"copy_{way}"].median / 1e3,
                    "over_copy_us": us[way].median - us[f"copy_{way}"].median,
                }
                for way, moved in num_bytes.items()
            },
        }


def measure_slots(shape: SlotShape) -> SlotResult:
    """Exit with workers stopped; their results are then made by one worker, and taken when all are there."""
    rig = SlotRig(shape, ROWS)
    copies = {"exit": copier(ROWS * shape.exit_bytes), "take": copier(ROWS * shape.take_bytes)}
    rounds = Rounds()
    for number in range(SLOT_ROUNDS + 1):
        exit_s = seconds_of(rig.exit)
        rig.host.start(1)
        rig.wait()
        rig.host.stop()
        began = time.perf_counter()
        if rig.take() != ROWS:
            raise RuntimeError("take did not return every row whose result is there")
        take_s = time.perf_counter() - began
        if number == 0:
            continue  # touched its memory for the first time
        rounds.add("take", take_s * 1e6)
        rounds.add("exit", exit_s * 1e6)
        for way, copy in copies.items():
            rounds.add(f"copy_{way}", seconds_of(copy) * 1e6)
    return SlotResult(shape, rounds)


def copier(num_bytes: int) -> Callable[[], object]:
    """One memcpy on this thread, between buffers that are used for nothing else."""
    source, target = np.ones(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
    target[:] = source
    return lambda: ctypes.memmove(target.ctypes.data, source.ctypes.data, num_bytes)


@dataclass(frozen=True, slots=True)
class TripResult:
    """Microseconds from before `exit` of one row with one token of context to its result being visible."""

    spinning: list[float]
    parked: list[float]
    served_us: float  # of it inside the worker, from taking the row to having answered; mean

    def as_dict(self) -> dict[str, Any]:
        return {
            **{
                name: {
                    **Spread(samples).as_dict(),
                    "p99": percentile(samples, 0.99),
                    "samples": len(samples),
                }
                for name, samples in (("spinning_us", self.spinning), ("parked_us", self.parked))
            },
            "served_us": self.served_us,
        }


def measure_trip() -> TripResult:
    """Both sides spinning: an upper bound of the time from submitting to a worker's start. Then asleep."""
    cpus = cpus_to_pin()
    rig = SlotRig(SLOT_SHAPES[0], 1, cpus[-1:])
    rig.host.start(1)
    try:
        with pinned(cpus):
            for _ in range(100):
                _trip_us(rig)
            spinning = [_trip_us(rig) for _ in range(TRIPS)]
            worker = rig.host.stats()[0]
            parked = []
            for _ in range(PARKED_TRIPS):
                time.sleep(PARK_S)
                parked.append(_trip_us(rig))
    finally:
        rig.host.stop()
    return TripResult(spinning, parked, worker["busy_s"] / worker["tasks"] * 1e6)


def _trip_us(rig: SlotRig) -> float:
    began = time.perf_counter_ns()
    rig.exit()
    rig.wait()
    us = (time.perf_counter_ns() - began) / 1e3
    if rig.take() != 1:
        raise RuntimeError("take did not return the row whose result is there")
    return us
