"""LaneSegment: one memory shared by the engine and one host process, and the engine's port to it.

The memory is a nameless file (memfd) handed down as a file descriptor: it ends with the last process that
holds it, so nothing is left behind by a kill. The eventfd wakes a sleeping engine. Layout: csrc/segment.h.
"""

from __future__ import annotations

import contextlib
import mmap
import os

import numpy as np
from torch import Tensor

import omniserve._native as _native


def address_of(memory: mmap.mmap) -> int:
    """Address of a writable mapping; valid while the mapping is open."""
    return int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)


class LaneSegment:
    """Slots, queues and frames shared with one host process. A new host gets a new segment."""

    def __init__(self, geometry: _native.LaneGeometry) -> None:
        self.geometry = geometry
        self.num_bytes = _native.segment_bytes(geometry)
        self.memory_fd = os.memfd_create("omniserve-lanes")
        os.truncate(self.memory_fd, self.num_bytes)
        self.memory = mmap.mmap(self.memory_fd, self.num_bytes)
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.address = address_of(self.memory)
        self.port = _native.LanePort(geometry, self.address)
        # What a scan fills, per layer; kept here so that a call allocates nothing.
        self._ready = np.zeros(geometry.num_layers, dtype=np.int32)
        self._waiting = np.zeros(geometry.num_layers, dtype=np.int32)
        self._oldest = np.zeros(geometry.num_layers, dtype=np.uint64)

    def exit(self, layer: int, slots: np.ndarray, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> None:
        """Lane rows leave the batch at `layer`.

        slots int32 [n]; q [n, h hd], k, v [n, kvh hd], x [n, H] in the model's dtype, rows contiguous.
        """
        self.port.exit(
            layer,
            len(slots),
            slots.ctypes.data,
            q.data_ptr(),
            q.stride(0),
            k.data_ptr(),
            k.stride(0),
            v.data_ptr(),
            v.stride(0),
            x.data_ptr(),
            x.stride(0),
        )

    def take(
        self, layer: int, cap: int, same_iteration: bool, slots: np.ndarray, attn: Tensor, x: Tensor
    ) -> int:
        """Lanes whose result for `layer` is there enter the batch; returns how many.

        Fills slots int32 [>= cap], attn [>= cap, h hd] with results and x [>= cap, H] with residuals.
        """
        assert cap <= len(slots), "the row buffers hold every row that may enter"
        assert cap <= attn.shape[0], "the row buffers hold every row that may enter"
        return self.port.take(
            layer,
            cap,
            same_iteration,
            slots.ctypes.data,
            attn.data_ptr(),
            attn.stride(0),
            x.data_ptr(),
            x.stride(0),
        )

    def scan(self) -> tuple[list[int], list[int], list[int]]:
        """Per layer: lanes ready to enter, lanes waiting, submission number of the oldest ready one."""
        self.port.scan(self._ready.ctypes.data, self._waiting.ctypes.data, self._oldest.ctypes.data)
        return self._ready.tolist(), self._waiting.tolist(), self._oldest.tolist()

    def counts(self) -> dict[str, float]:
        """What the port counted, and the sums over this host's workers."""
        port = self.port.stats()
        workers = port["workers"]
        return {
            "lane_entries": port["lane_entries"],
            "same_iteration_entries": port["same_iteration_entries"],
            "cancelled_rows": port["cancelled_rows"],
            "landed_pages": port["landed_pages"],
            "fetched_pages": port["fetched_pages"],
            "host_busy_s": sum(w["busy_s"] for w in workers),
            "host_kv_bytes_read": sum(w["kv_bytes_read"] for w in workers),
        }

    def memory_usage(self) -> dict[str, int]:
        """Bytes of the host's KV memory; resident and huge as the host last looked (every ten seconds)."""
        port = self.port.stats()
        return {
            "arena_bytes": port["arena_bytes"],
            "resident_bytes": port["arena_resident_bytes"],
            "huge_page_bytes": port["arena_huge_bytes"],
        }

    def clear_event(self) -> None:
        """Take back a wake-up; harmless when there is none."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.event_fd)

    def close(self) -> None:
        """Close the descriptors. The mapping itself goes with the last reference to it."""
        for fd in (self.memory_fd, self.event_fd):
            os.close(fd)
