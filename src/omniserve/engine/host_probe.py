"""How fast the host serves: lane rows and copies through a real host process, the device waiting for each."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from omniserve.attention.cpu import CpuKvStore, kv_geometry
from omniserve.config import CpuSplit, EngineConfig
from omniserve.dtypes import dtype_name
from omniserve.engine.build import lane_geometry, make_limits
from omniserve.errors import OmniServeError
from omniserve.host.load import FILLING
from omniserve.host.supervisor import START_TIMEOUT_S, HostSupervisor
from omniserve.model.decoder import Decoder

_LONG, _SHORT = 4096, 64  # contexts
_REPEATS = 5
_ANSWER_S = 10.0


@dataclass(frozen=True, slots=True)
class HostRates:
    """Host attention of one lane row, all workers on it; copies of pages to the host; the start of both."""

    bytes_per_s: float
    row_s: float
    copy_bytes_per_s: float
    copy_s: float


NO_HOST = HostRates(0.0, 0.0, 0.0, 0.0)


def measure_host(config: EngineConfig, decoder: Decoder, split: CpuSplit, max_model_len: int) -> HostRates:
    """Start a host process as the engine would, time it while the device is idle, and end it."""
    long = min(_LONG, max_model_len)
    config = replace(config, host_offload="always", max_lanes=1, max_num_seqs=1, host_memory_bytes=1 << 40)
    limits = make_limits(config, decoder.config, decoder.dtype, long)
    geometry = lane_geometry(config, decoder, limits, long)
    host = HostSupervisor(geometry, split.host_cpus, split.host_threads)
    try:
        _await_start(host)
        probe = _Probe(host, decoder, config, limits.num_host_pages)
        return probe.rates(min(_SHORT, max(1, long // 8)), long)
    finally:
        host.close()


def _await_start(host: HostSupervisor) -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while (news := host.poll()) != "started":
        if news == "failed" or time.monotonic() > until:
            raise OmniServeError("no host process starts, so that its speed cannot be measured")
        time.sleep(0.005)


class _Probe:
    """One lane and a few pages."""

    def __init__(self, host: HostSupervisor, decoder: Decoder, config: EngineConfig, num_pages: int) -> None:
        self.port, self.segment = host.segment.port, host.segment
        self.decoder = decoder
        self.page_size = config.page_size
        self.num_pages = num_pages
        dtype = decoder.dtype
        self.slots = np.zeros(1, dtype=np.int32)
        self.q = torch.ones(1, decoder.num_heads * decoder.head_dim, dtype=dtype)
        self.kv = torch.ones(1, decoder.num_kv_heads * decoder.head_dim, dtype=dtype)
        self.x = torch.ones(1, decoder.config.hidden_size, dtype=dtype)
        self.attn = torch.empty_like(self.q)
        shape = (decoder.num_layers, decoder.num_kv_heads, decoder.head_dim, config.page_size)
        geometry = kv_geometry(*shape, dtype_name(dtype))
        self.store = CpuKvStore(geometry, max(2, config.max_copies_per_step))
        self.store.memory.fill_(FILLING)
        self.page_bytes = geometry.page_bytes
        host_kv = host.segment.geometry
        side = (host_kv.num_layers, host_kv.num_kv_heads, host_kv.head_dim, host_kv.host_page_size)
        host_page = kv_geometry(*side, host_kv.host_kv_dtype)
        self.token_bytes = host_page.page_bytes / host_kv.num_layers / host_kv.host_page_size
        self._copies = 0

    def rates(self, short: int, long: int) -> HostRates:
        self._row_s(long)  # fills the pages
        long_s, short_s = self._row_s(long), self._row_s(short)
        bytes_per_s = (long - short) * self.token_bytes / max(1e-9, long_s - short_s)
        many = max(2, self.store.memory.numel() // self.page_bytes)
        self._copy_s(many)
        one_s, many_s = (statistics.median(self._copy_s(n) for _ in range(_REPEATS)) for n in (1, many))
        rate = (many - 1) * self.page_bytes / max(1e-9, many_s - one_s)
        return HostRates(
            bytes_per_s,
            max(0.0, short_s - short * self.token_bytes / bytes_per_s),
            rate,
            max(0.0, one_s - self.page_bytes / rate),
        )

    def _row_s(self, context: int) -> float:
        """Median seconds from a row's exit to its entry over all layers: each has left the caches by then."""
        self.port.reset(0)
        self.port.set_pages(0, 0, list(range(-(-context // self.segment.geometry.host_page_size))))
        self.port.start_token(0, context - 1)
        found = []
        for layer in range(self.decoder.num_layers):
            began = time.perf_counter()
            self.segment.exit(layer, self.slots, self.q, self.kv, self.kv, self.x)
            if not self.port.wait_all(layer, _ANSWER_S):
                raise OmniServeError(f"the host did not answer within {_ANSWER_S} s")
            self.segment.take(layer, 1, True, self.slots, self.attn, self.x)
            found.append(time.perf_counter() - began)
        return statistics.median(found)

    def _copy_s(self, num_pages: int) -> float:
        """Seconds until so many device pages, handed over together, are on the host."""
        began = time.perf_counter()
        size = self.segment.geometry.host_page_size
        for page in range(num_pages):
            self._copies += 1
            count = -(-self.page_size // size)
            first = (page * count) % max(1, self.num_pages - count)
            pages = [(first + i) % self.num_pages for i in range(count)]
            self.port.land(self._copies, self.store.kv.page_address(page), 0, self.page_size, 0, pages)
        left = num_pages
        while left:
            left -= len(self.port.collect_copies())
            if time.perf_counter() - began > _ANSWER_S:
                raise OmniServeError(f"the host did not copy within {_ANSWER_S} s")
        return time.perf_counter() - began
