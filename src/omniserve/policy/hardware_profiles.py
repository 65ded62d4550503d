"""LatencyFit of hardware that is not here: fits of others' measurements.

The figures are in hardware_profiles.json with their sources; docs/latency-model.md has the formulas. Kernel
times only: gaps between kernels are not in them, nor what a busy host costs the device.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from omniserve.policy.latency_model import LatencyFit, WalkCosts
from omniserve.policy.staircase import Staircase, never_falling

BYTES = 2  # of an element: everything is 16-bit
MAX_ROWS = 4096
_TILE = 128  # measured times jump behind multiples of it: points on both sides


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the times depend on. `name` finds measured layers; any other goes by the formulas."""

    name: str
    num_layers: int
    hidden: int
    intermediate: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def kv_bytes(self) -> int:
        """Of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * BYTES


def hardware_fit(
    device: str, shape: ModelShape, host: str, link: str, tensor_parallel: int = 1, sockets: int = 1
) -> LatencyFit:
    """Costs of a model on `tensor_parallel` such devices, its lanes on a host of so many sockets.

    device, host, link: names in hardware_profiles.json. Raises KeyError for another name or degree.
    """
    data = _profiles()
    gpu, cpu, wire = data["devices"][device], data["hosts"][host], data["links"][link]
    layers, tp = shape.num_layers, tensor_parallel
    latency_s = data["links"]["gpu_copy_latency_s"]
    to_host, to_device = wire["d2h_bytes_per_s"], wire["h2d_bytes_per_s"]
    q_bytes = shape.q_heads * shape.head_dim * BYTES / tp
    costs = WalkCosts(
        dense=_dense(gpu, shape, tp),
        head=_stairs(_points(), lambda n: _gemm_s(gpu, n, shape.hidden, shape.vocab / tp)),
        decode_token_s=layers * shape.kv_bytes / tp / _read_bytes_per_s(gpu),
        decode_request_s=0.0,
        decode_s=layers * gpu["attention_decode"]["overhead_s"],
        prefill_load_s=layers * 4 * shape.head_dim * shape.q_heads / tp / _prefill_flops_per_s(gpu),
        prefill_context_s=0.0,
        prefill_chunk_s=layers * gpu["attention_prefill"]["overhead_s"],
        lane_row_s=(q_bytes + shape.kv_bytes / tp) / to_host + q_bytes / to_device,
        lane_walk_s=2 * layers * latency_s,
        overhead_s=0.0,
        row_overhead_s=0.0,
        copy_token_s=0.0,
    )
    group = shape.q_heads / shape.kv_heads
    memory = cpu["read_bytes_per_s"] * cpu["fraction_of_read_bandwidth"]
    arithmetic = (cpu["bf16_amx_flops_per_s"] or cpu["fp32_simd_flops_per_s"]) / 2 / group
    return LatencyFit(
        key={"model": shape.name, "device": device, "tensor_parallel": tp, "host": host, "link": link},
        num_layers=layers,
        idle=costs,
        busy=costs,
        pass_s=2 * latency_s,
        host_bytes_per_s=sockets * min(memory, arithmetic),
        host_row_s=cpu["overhead_s_per_call"] + 2 * latency_s,
        copy_bytes_per_s=min(to_host, to_device),
        copy_s=latency_s,
        source={
            "how": "from published measurements of others, not validated here",
            **_sources(gpu, cpu, wire),
        },
    )


@cache
def _profiles() -> dict[str, Any]:
    text = files("omniserve.policy").joinpath("hardware_profiles.json").read_text(encoding="utf-8")
    profiles: dict[str, Any] = json.loads(text)
    return profiles


def _sources(gpu: dict[str, Any], cpu: dict[str, Any], wire: dict[str, Any]) -> dict[str, str]:
    return {
        "dense": gpu["dense_analytic"]["source"],
        "attention": gpu["attention_source"],
        "licence": gpu["licence"],
        "host": cpu["source"],
        "link": wire["source"],
    }


# ---------------------------------------------------------------- parts


def _dense(gpu: dict[str, Any], shape: ModelShape, tp: int) -> Staircase:
    """All layers: measured where this model and degree were, by formula elsewhere; with two all-reduces."""
    measured = gpu.get("dense_measured", {"models": {}})["models"].get(shape.name, {}).get(f"tp{tp}")
    points: Sequence[int] = _points() if measured is None else measured["tokens"]

    def seconds(n: int) -> float:
        if measured is None:
            layer_s = layer_dense_s(gpu, shape, n, tp)
        else:
            layer_s = measured["layer_s"][measured["tokens"].index(n)]
        return shape.num_layers * (layer_s + 2 * _all_reduce_s(gpu, n * shape.hidden * BYTES, tp))

    return _stairs(points, seconds)


def layer_dense_s(gpu: dict[str, Any], shape: ModelShape, n: int, tp: int) -> float:
    """Four products and five element-wise kernels of one layer over n rows."""
    q_size, kv_size = shape.q_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    products = (
        (shape.hidden, (q_size + 2 * kv_size) / tp),
        (q_size / tp, shape.hidden),
        (shape.hidden, 2 * shape.intermediate / tp),
        (shape.intermediate / tp, shape.hidden),
    )
    per_row = (
        4 * shape.hidden,
        4 * shape.hidden,
        6 * shape.hidden,
        6 * shape.intermediate / tp,
        4 * (q_size + kv_size) / tp,
    )
    fit, memory = gpu["dense_analytic"], gpu["peak"]["hbm_bytes_per_s"]
    rate = memory * fit["elementwise_hbm_efficiency"]
    element_wise: float = sum(fit["elementwise_overhead_s"] + n * num_bytes / rate for num_bytes in per_row)
    return element_wise + sum(_gemm_s(gpu, n, k, width) for k, width in products)


def _gemm_s(gpu: dict[str, Any], n: float, k: float, width: float) -> float:
    """[n, k] times [k, width]: between what memory and what arithmetic takes."""
    fit, peak = gpu["dense_analytic"], gpu["peak"]
    p = fit["gemm_pnorm_exponent"]
    memory = BYTES * (k * width + n * k + n * width) / (peak["hbm_bytes_per_s"] * fit["gemm_hbm_efficiency"])
    arithmetic = 2 * n * k * width / (peak["dense_bf16_flops_per_s"] * fit["gemm_flops_efficiency"])
    return float(fit["gemm_overhead_s"] + (memory**p + arithmetic**p) ** (1 / p))


def _all_reduce_s(gpu: dict[str, Any], num_bytes: float, tp: int) -> float:
    """Interpolated in bytes; below the first size as the first, beyond the last in proportion."""
    if tp == 1:
        return 0.0
    table = gpu["all_reduce"][f"tp{tp}"]
    sizes, times = table["table_bytes"], table["table_s"]
    i = bisect_left(sizes, num_bytes)
    if i == 0:
        return float(times[0])
    if i == len(sizes):
        return float(times[-1] * num_bytes / sizes[-1])
    share = (num_bytes - sizes[i - 1]) / (sizes[i] - sizes[i - 1])
    return float(times[i - 1] + share * (times[i] - times[i - 1]))


def _read_bytes_per_s(gpu: dict[str, Any]) -> float:
    return float(gpu["peak"]["hbm_bytes_per_s"] * gpu["attention_decode"]["hbm_efficiency"])


def _prefill_flops_per_s(gpu: dict[str, Any]) -> float:
    return float(gpu["peak"]["dense_bf16_flops_per_s"] * gpu["attention_prefill"]["flops_efficiency"])


def _points() -> list[int]:
    tiles = [n for edge in range(_TILE, 8 * _TILE + 1, _TILE) for n in (edge, edge + 1)]
    return [1, 2, 4, 8, 16, 32, 64, 96, *tiles, 1536, 2048, 3072, MAX_ROWS]


def _stairs(points: Sequence[int], seconds: Callable[[int], float]) -> Staircase:
    return Staircase(tuple(points), never_falling([seconds(n) for n in points]))
