"""Hardware profiles beside their formulas worked out by hand, and beside published headline times."""

from __future__ import annotations

import pytest

from omniserve.policy.hardware_profiles import ModelShape, hardware_fit
from omniserve.policy.latency import WalkLoad
from omniserve.policy.latency_model import LatencyModel

LLAMA_70B = ModelShape("Llama-2-70B", 80, 8192, 28672, 64, 8, 128, 32000)
YI_34B = ModelShape("Yi-34B", 60, 7168, 20480, 56, 8, 128, 64000)
US = 1e-6


def dense_us(device: str, shape: ModelShape, tp: int, rows: int) -> float:
    """A layer, microseconds."""
    fit = hardware_fit(device, shape, "xeon-gold-6342", "pcie4_x16", tp)
    return fit.idle.dense.at(rows) / shape.num_layers / US


@pytest.mark.parametrize(
    ("device", "tp", "rows", "expected"),
    [
        ("a100-sxm-80g", 1, 1, 1118),
        ("a100-sxm-80g", 4, 1, 352),
        ("a100-sxm-80g", 4, 128, 529),
        ("h100-sxm-80g", 1, 2048, 5333),
        ("h100-sxm-80g", 2, 512, 801),
    ],
)
def test_measured_layers_are_what_was_measured(device: str, tp: int, rows: int, expected: float) -> None:
    """With all-reduces above one device; 8 % for what monotone interpolation smooths."""
    assert dense_us(device, LLAMA_70B, tp, rows) == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize(
    ("device", "tp", "rows", "expected"),
    [
        ("a100-sxm-80g", 1, 1, 715),
        ("a100-sxm-80g", 1, 2048, 10688),
        ("a100-sxm-80g", 2, 128, 684),
        ("h100-sxm-80g", 4, 512, 420),
        ("h200-sxm-141g", 1, 128, 396),
        ("h200-sxm-141g", 2, 1, 176),
    ],
)
def test_other_models_go_by_the_formula(device: str, tp: int, rows: int, expected: float) -> None:
    assert dense_us(device, YI_34B, tp, rows) == pytest.approx(expected, rel=0.005)


def test_attention_of_a_batch_is_its_overhead_and_its_bytes() -> None:
    fit = hardware_fit("a100-sxm-80g", LLAMA_70B, "xeon-gold-6342", "pcie4_x16", 4)
    model = LatencyModel(fit)
    without = WalkLoad(num_tokens=8, num_samples=8)
    decodes = WalkLoad(num_tokens=8, num_samples=8, num_decodes=8, decode_context=8000)
    layer_s = 15.5 * US + 8000 * 2 * (8 / 4) * 128 * 2 / (2039e9 * 0.78)
    assert model.walk_s(decodes, False) - model.walk_s(without, False) == pytest.approx(80 * layer_s)


def test_a_chunk_is_its_overhead_and_its_pairs_of_tokens() -> None:
    fit = hardware_fit("a100-sxm-80g", LLAMA_70B, "xeon-gold-6342", "pcie4_x16", 1)
    model = LatencyModel(fit)
    chunk = WalkLoad()
    chunk.add_chunk(2048, 512)
    flops = 4 * 128 * 64 * (512 * 2048 + 512**2 / 2 + 512 / 2)  # the sum of i counts the diagonal whole
    layer_s = 40.5 * US + flops / (312e12 * 0.517)
    without = model.walk_s(WalkLoad(num_tokens=512), False)
    assert model.walk_s(chunk, False) - without == pytest.approx(80 * layer_s)


def test_the_host_reads_at_a_share_of_its_memorys_rate_until_arithmetic_limits_it() -> None:
    two = LatencyModel(hardware_fit("h100-sxm-80g", LLAMA_70B, "epyc-genoa", "pcie5_x16", sockets=2))
    begin = 10 * US + 2 * 6 * US
    assert two.host_attention_s(4096 * 4096) == pytest.approx(begin + 4096**2 / (378e9 * 0.75 * 2), rel=1e-6)
    many = ModelShape("many queries", 80, 8192, 28672, 512, 8, 128, 32000)
    bound = LatencyModel(hardware_fit("h100-sxm-80g", many, "xeon-gold-6342", "pcie5_x16", sockets=8))
    assert bound.host_attention_s(1 << 24) == pytest.approx(begin + 2**24 * 64 / (8 * 4.3e12 / 2), rel=1e-6)


def test_a_copy_is_the_links_latency_and_its_slower_way() -> None:
    fit = hardware_fit("a100-sxm-80g", LLAMA_70B, "xeon-gold-6342", "pcie4_x16")
    assert LatencyModel(fit).copy_s(10**9) == pytest.approx(6 * US + 1e9 / 24.8e9)


def test_unknown_hardware_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="tpu"):
        hardware_fit("tpu", LLAMA_70B, "xeon-gold-6342", "pcie4_x16")


def test_sources_and_licence_come_along() -> None:
    source = hardware_fit("h200-sxm-141g", YI_34B, "grace", "pcie5_x16").source
    assert "MIT" in source["licence"]
    assert all(source.values())
