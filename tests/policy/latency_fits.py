"""A small machine made up for tests: every cost is a round number."""

from __future__ import annotations

from dataclasses import replace

from omniserve.policy.latency import WalkLoad
from omniserve.policy.latency_model import LatencyFit, WalkCosts
from omniserve.policy.staircase import Staircase

MS = 1e-3
NUM_LAYERS = 4

IDLE = WalkCosts(
    dense=Staircase((1, 8, 16, 32), (10 * MS, 10 * MS, 20 * MS, 40 * MS)),
    head=Staircase((1, 8, 16), (2 * MS, 2 * MS, 3 * MS)),
    decode_token_s=0.001 * MS,
    decode_request_s=0.01 * MS,
    decode_s=0.1 * MS,
    prefill_load_s=0.0001 * MS,
    prefill_context_s=0.001 * MS,
    prefill_chunk_s=0.2 * MS,
    lane_row_s=0.05 * MS,
    lane_walk_s=0.3 * MS,
    overhead_s=0.5 * MS,
    row_overhead_s=0.02 * MS,
    copy_token_s=0.01 * MS,
)
BUSY = replace(IDLE, dense=Staircase((1, 8, 16, 32), (15 * MS, 15 * MS, 28 * MS, 50 * MS)))


def small_fit(**changes: object) -> LatencyFit:
    fit = LatencyFit(
        key={"model": "made-up", "device_threads": 1},
        num_layers=NUM_LAYERS,
        idle=IDLE,
        busy=BUSY,
        pass_s=0.1 * MS,
        host_bytes_per_s=10e9,
        host_row_s=0.02 * MS,
        copy_bytes_per_s=5e9,
        copy_s=0.1 * MS,
    )
    return replace(fit, **changes)  # type: ignore[arg-type]


def decodes(count: int, context: int) -> WalkLoad:
    load = WalkLoad()
    for _ in range(count):
        load.add_decode(context)
    return load
