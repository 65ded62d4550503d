"""A busy host without lanes: host attention over memory of its own, on the host's CPUs.

The profiler runs it beside the device to see what a busy host costs the device:
`python -m omniserve.host.load KV_HEADS GROUP HEAD_DIM PAGE_SIZE DTYPE NUM_BYTES THREADS CPUS`. It writes one
line when it reads at full speed, and ends when its standard input does. It imports no torch.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

import omniserve._native as _native
from omniserve.host.process import NICENESS, live_with_the_engine

# Sequences of one call and their length: calls cost nothing, and it looks up often enough.
_LANES, _CONTEXT = 4, 1024
# Of every byte of KV: a plain number in every storage type.
FILLING = 0x3C


def main(arguments: list[str]) -> int:
    kv_heads, group, head_dim, page_size = (int(a) for a in arguments[:4])
    dtype, num_bytes, threads = arguments[4], int(arguments[5]), int(arguments[6])
    cpus = [int(c) for c in arguments[7].split(",") if c]
    live_with_the_engine()
    os.nice(NICENESS)
    if cpus:
        os.sched_setaffinity(0, cpus)
    geometry = _native.KvGeometry(
        num_layers=1, num_kv_heads=kv_heads, head_dim=head_dim, page_size=page_size, dtype=dtype
    )
    per_call = _LANES * -(-_CONTEXT // page_size)
    num_calls = max(1, num_bytes // geometry.page_bytes // per_call)
    memory = np.full(num_calls * per_call * geometry.page_bytes, FILLING, dtype=np.uint8)
    kv = _native.PagedKv(geometry, memory.ctypes.data, num_calls * per_call)
    tables = np.arange(num_calls * per_call, dtype=np.int32).reshape(num_calls, _LANES, -1)
    query = np.ones((_LANES, kv_heads * group * head_dim), dtype=np.float32)
    out, contexts = np.empty_like(query), np.full(_LANES, _CONTEXT, dtype=np.int32)
    team = _native.ThreadTeam(threads, cpus)
    print("reading", flush=True)
    turn = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        table = tables[turn % num_calls]
        _native.paged_attention(
            team, kv, 0, _LANES, query.ctypes.data, table.ctypes.data, table.shape[1], contexts.ctypes.data,
            out.ctypes.data, kv_heads * group, head_dim**-0.5,
        )  # fmt: skip
        turn += 1
    return 0


class HostLoad:
    """The process: at rest or reading, as told. None: a host without threads, which never reads."""

    def __init__(self, process: subprocess.Popen[bytes] | None) -> None:
        self._process = process

    @property
    def is_there(self) -> bool:
        return self._process is not None

    def rest(self) -> None:
        self._signal(signal.SIGSTOP)

    def go(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)


@contextmanager
def host_load(
    geometry: _native.LaneGeometry, num_bytes: int, threads: int, cpus: Sequence[int]
) -> Iterator[HostLoad]:
    """Host attention of the lanes' shape over `num_bytes` of KV, at rest until told to go."""
    if not threads:
        yield HostLoad(None)
        return
    group = geometry.num_heads // geometry.num_kv_heads
    shape = (geometry.num_kv_heads, group, geometry.head_dim, geometry.host_page_size, geometry.host_kv_dtype)
    words = [*map(str, (*shape, num_bytes, threads)), ",".join(map(str, cpus))]
    process = subprocess.Popen(
        [sys.executable, "-m", "omniserve.host.load", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    load = HostLoad(process)
    try:
        if process.stdout.readline() != b"reading\n":
            raise RuntimeError(f"the load on the host's CPUs ended with status {process.wait()}")
        load.rest()
        yield load
    finally:
        process.stdin.close()
        process.stdout.close()
        load.go()
        process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
