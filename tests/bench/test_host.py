"""The host benchmark measures what it says: cold pages, every case, a report that holds together."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omniserve.bench import host, host_lanes, host_memory, host_report, host_scaling, host_slots
from omniserve.bench.host import Case, Sweep, page_tables
from omniserve.bench.host_targets import Target, add_over_bf16, verdicts
from omniserve.bench.measure import Rounds, percentile
from omniserve.cli import main
from omniserve.host.others import busy_ticks

MIB = 1 << 20


@given(
    context=st.integers(1, 3000),
    lanes=st.sampled_from([1, 3, 8]),
    num_pages=st.integers(1, 200),
)
def test_a_page_comes_round_only_after_all_others(context: int, lanes: int, num_pages: int) -> None:
    case = Case("bfloat16", 4, 128, context, lanes, threads=1)
    walk = page_tables(case, num_pages, np.random.default_rng(0)).ravel()
    assert len(walk) >= num_pages
    for start in range(0, len(walk), num_pages):
        part = walk[start : start + num_pages]
        assert len(set(part.tolist())) == len(part)
    assert walk.min() == 0
    assert walk.max() == num_pages - 1


def test_a_cached_case_stays_on_one_page() -> None:
    case = Case("bfloat16", 4, 128, 1024, 2, threads=1, cached=True)
    assert not page_tables(case, 100, np.random.default_rng(0)).any()


def test_the_whole_sweep_holds_every_combination_once() -> None:
    cases = [c for c in Sweep(threads=(1, 2)).cases() if not c.cached]
    assert len(set(cases)) == len(cases) == 4 * 4 * 2 * 4 * 3 * 2


def test_bytes_and_intensity_of_a_case() -> None:
    case = Case("bfloat16", 4, 128, 1000, 3, threads=1)
    assert case.num_bytes == 3 * 1000 * host_memory.NUM_KV_HEADS * 128 * 2 * 2
    assert case.intensity == 4.0  # 8 flop per element of 2 bytes


def test_the_benchmark_reads_the_attention_it_claims() -> None:
    """Our reader and SDPA give the same result where they read the same numbers: equal keys and values."""
    arena = host_memory.Arena(4 * MIB)
    arena.bytes.view(torch.float32).fill_(0.5)
    case = Case("float32", 3, 64, 100, 2, threads=1)
    reader = host.OurReader(case, arena, host._native.ThreadTeam(1))
    reader()
    np.testing.assert_allclose(reader.out, 0.5, rtol=1e-6)


FLOAT_DTYPES = [name for name, torch_dtype in host_memory.TORCH_DTYPES.items() if torch_dtype is not None]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_every_page_holds_random_tokens(dtype: str) -> None:
    case = Case(dtype, 1, 64, 64, 1, threads=1)
    arena = host_memory.Arena(12 * MIB)
    kv = arena.paged(case.geometry)
    host_memory.fill_pages(kv)
    torch_dtype = host_memory.TORCH_DTYPES[dtype]
    k, v = torch.empty(2, host_memory.NUM_KV_HEADS, 64, 64, dtype=torch_dtype)
    for page in (0, kv.num_pages // 2, kv.num_pages - 1):
        kv.gather(0, np.array([page], np.int32).ctypes.data, 64, k.data_ptr(), v.data_ptr())
        for values in (k.float(), v.float()):
            assert 0.95 < values.std() < 1.05
            assert abs(values.mean()) < 0.05


def test_int8_pages_hold_numbers_with_finite_scales() -> None:
    """Queries of zero average the values of 64 tokens: normal numbers, an eighth as wide."""
    case = Case("int8", 1, 64, 64, 1, threads=1)
    arena = host_memory.Arena(12 * MIB)
    kv = arena.paged(case.geometry)
    host_memory.fill_pages(kv)
    q = np.zeros((host_memory.NUM_KV_HEADS, 64), np.float32)
    for page in (0, kv.num_pages // 2, kv.num_pages - 1):
        out, _ = host._native.attention_pieces(kv, 0, q, np.array([page], np.int32), [0, 64], 0.125)
        assert 0.1 < out.std() < 0.15


def test_readers_are_compared_round_by_round() -> None:
    rounds = Rounds()
    for ours, stream in ((10.0, 20.0), (40.0, 50.0), (6.0, 10.0)):
        rounds.add("ours", ours)
        rounds.add("stream", stream)
    rounds.add("ours", 1.0)  # a round that the other one sat out
    assert rounds.ratio("ours", "stream").as_dict() == {"median": 0.6, "low": 0.5, "high": 0.8}


def test_a_percentile_is_a_measured_value() -> None:
    assert percentile([5.0, 1.0, 3.0, 2.0, 4.0], 0.5) == 3.0
    assert percentile([1.0] * 98 + [7.0, 9.0], 0.99) == 9.0


def test_busy_time_holds_what_is_stolen_and_no_idling() -> None:
    assert busy_ticks("cpu  1 20 300 7777 8888 4000 50000 600000 0 0\ncpu0 9 9 9 9 9 9 9 9 9 9\n") == 654321


@pytest.fixture
def small_bench(monkeypatch: pytest.MonkeyPatch) -> Sweep:
    sweep = Sweep(
        dtypes=("bfloat16",), groups=(1, 3), head_dims=(64,), contexts=(100,), lanes=(2,),
        threads=(1, 2), rounds=3, round_s=0.0,
    )  # fmt: skip
    case = Case("float32", 2, 64, 130, 2, threads=2)
    monkeypatch.setattr(host_report, "quick_sweep", lambda: sweep)
    lanes = [case, replace(case, lanes=1, threads=3)]  # one has more threads than the sweep
    monkeypatch.setattr(host_report, "lane_cases", lambda *_: lanes)
    monkeypatch.setattr(host_report, "prefix_cases", lambda *_: [replace(case, context=200)])
    monkeypatch.setattr(host_report, "scaling_cases", lambda _: [case])
    monkeypatch.setattr(host_lanes, "PREFIX_TOKENS", 128)
    for module in (host_lanes, host_scaling):
        monkeypatch.setattr(module, "ROUNDS", 2)
    monkeypatch.setattr(host_lanes, "FULL_S", 0.0)
    monkeypatch.setattr(host_slots, "SLOT_ROUNDS", 2)
    monkeypatch.setattr(host_slots, "TRIPS", 20)
    monkeypatch.setattr(host_slots, "PARKED_TRIPS", 3)
    monkeypatch.setattr(host_memory, "last_level_cache_bytes", lambda: MIB)
    monkeypatch.setattr(host_memory, "MIN_ARENA_BYTES", 8 * MIB)
    return sweep


def run_small(tmp_path: Path, *flags: str) -> dict[str, Any]:
    path = tmp_path / "new" / "host.json"
    main(["bench-host", "--quick", "--json", str(path), *flags])
    report = json.loads(path.read_text())
    assert isinstance(report, dict)
    return report


@pytest.mark.usefixtures("small_bench")
def test_the_report_holds_every_case_and_marks_cached_ones(tmp_path: Path) -> None:
    report = run_small(tmp_path)
    assert report["arena_bytes"] == 8 * MIB
    assert [(c["group"], c["threads"], c["cached"], c["counts"]) for c in report["cases"]] == [
        (group, threads, cached, not cached)
        for group in (1, 3)
        for threads in (1, 2)
        for cached in (True, False)
    ]
    for case in report["cases"]:
        assert case["rounds"]["ours"] == case["rounds"]["stream"] == 3
        share = case["share_of_stream"]
        assert 0 < share["low"] <= share["median"] <= share["high"]
        assert ("sdpa" in case["gbps"]) == (not case["cached"])
        assert ("sdpa_grouped" in case["gbps"]) == (not case["cached"] and case["group"] > 1)
    assert [s["threads"] for s in report["stream_check"]] == [1, 2]


@pytest.mark.usefixtures("small_bench")
def test_the_report_holds_lanes_prefixes_scaling_slots_and_the_trip(tmp_path: Path) -> None:
    report = run_small(tmp_path)
    assert [(r["lanes"], r["view"]) for r in report["host_workers"]] == [
        (2, host_lanes.LAYERWISE),
        (2, host_lanes.FULL),
        (1, host_lanes.LAYERWISE),  # its queue is never full
    ]
    assert [r["shared_over_private"]["median"] > 0 for r in report["shared_prefix"]] == [True]
    (scaling,) = report["scaling"]
    assert scaling["ours_over_stream"]["low"] <= scaling["ours_over_stream"]["high"]
    assert len(report["slots"]) == len(host_slots.SLOT_SHAPES)
    for slots in report["slots"]:
        for way in ("exit", "take"):
            assert slots[way]["gbps"] == pytest.approx(slots[way]["bytes"] / slots[way]["us"]["median"] / 1e3)
    assert report["trip"]["spinning_us"]["samples"] == 20
    assert report["trip"]["spinning_us"]["p99"] >= report["trip"]["spinning_us"]["median"]
    assert report["targets"] == verdicts(report)
    assert all(cores >= 0 for cores in report["others_busy_cores"].values())


@pytest.mark.usefixtures("small_bench")
@pytest.mark.skipif(find_spec("matplotlib") is None, reason="the extra `plots` is not installed")
@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_plot_is_a_small_file(tmp_path: Path, suffix: str) -> None:
    plot = tmp_path / f"host.{suffix}"
    run_small(tmp_path, "--plot", str(plot))
    assert 1000 < plot.stat().st_size < 300_000


@pytest.mark.usefixtures("small_bench")
def test_a_plot_without_matplotlib_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host_report, "find_spec", lambda _: None)
    run_small(tmp_path, "--plot", str(tmp_path / "host.svg"))
    assert "pip install 'omniserve[plots]'" in capsys.readouterr().out
    assert not (tmp_path / "host.svg").exists()


def test_a_type_that_torch_cannot_read_is_compared_with_bf16(
    small_bench: Sweep, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(host_memory.TORCH_DTYPES, "float32", None)
    sweep = replace(small_bench, dtypes=("float32", "bfloat16"))
    monkeypatch.setattr(host_report, "quick_sweep", lambda: sweep)
    cases = run_small(tmp_path)["cases"]
    assert all("sdpa" not in c["gbps"] and "over_bf16" in c for c in cases if c["dtype"] == "float32")
    assert all("over_bf16" not in c for c in cases if c["dtype"] == "bfloat16")


def test_tokens_are_compared_with_bf16_at_the_same_streaming_rate() -> None:
    shape = {"group": 4, "head_dim": 128, "context": 4096, "lanes": 8, "threads": 2, "cached": False}
    cases: list[dict[str, Any]] = [
        {**shape, "dtype": "int8", "token_bytes": 2080.0, "share_of_stream": {"median": 0.6}},
        {**shape, "dtype": "bfloat16", "token_bytes": 4160.0, "share_of_stream": {"median": 0.8}},
    ]
    add_over_bf16(cases)
    assert cases[0]["over_bf16"] == {"median": pytest.approx(1.5)}  # half the bytes at 3/4 of the rate
    assert "over_bf16" not in cases[1]


def spread(median: float) -> dict[str, float]:
    return {"median": median, "low": median / 2, "high": median * 2}


def test_the_worst_case_decides_a_target() -> None:
    cases = (("a", spread(0.9)), ("b", spread(0.7)), ("c", spread(0.8)))
    verdict = Target("share", 0.8, "of streaming", cases).as_dict()
    assert (verdict["met"], verdict["worst_at"], verdict["cases_met"]) == (False, "b", 2)
    assert Target("share", 0.7, "of streaming", cases).as_dict()["met"]


def test_an_upper_limit_is_kept_from_below() -> None:
    cases = (("a", spread(3.0)), ("b", spread(6.0)))
    verdict = Target("trip", 5.0, "us", cases, at_most=True).as_dict()
    assert (verdict["met"], verdict["worst_at"], verdict["best"]) == (False, "b", 3.0)
    assert Target("trip", 6.0, "us", cases, at_most=True).as_dict()["met"]


def test_what_was_not_measured_is_neither_met_nor_unmet() -> None:
    assert Target("int8", 1.6, "times", ()).as_dict()["met"] is None


@pytest.mark.usefixtures("small_bench")
def test_an_unmet_target_does_not_fail_the_run_and_a_slow_streaming_loop_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unmet = Target("speed", 2.0, "times", (("here", spread(1.0)),)).as_dict()
    monkeypatch.setattr(host_report, "verdicts", lambda _: [unmet])
    for holds in (True, False):
        ratio = {"threads": 1, "ratio": spread(1.0), "holds": holds}
        rates = {"stream_gbps": spread(9.0), "torch_sum_gbps": spread(9.0)}
        monkeypatch.setattr(host.HostBench, "check_stream", lambda *_, r={**ratio, **rates}: r)
        assert host_report.run_bench_host(True, None, None) == (0 if holds else 1)


@pytest.mark.usefixtures("small_bench")
def test_nothing_counts_when_the_arena_fits_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(host_memory, "memory_limit_bytes", lambda: 12 * MIB)
    assert not any(case["counts"] for case in run_small(tmp_path)["cases"])


def lane_rig(case: Case, shared_tokens: int = 0) -> host_lanes.LaneRig:
    """With 0.5 everywhere: whatever a lane attends to, its result is 0.5."""
    rig = host_lanes.LaneRig(case, MIB, host_lanes.shared_tables(case, shared_tokens))
    memory = host_memory.memory_at(rig.host.kv.page_address(0), rig.host.arena_bytes)
    memory.view(torch.float32).fill_(0.5)
    rig.kv[:] = 0.5
    return rig


@pytest.mark.parametrize("shared_tokens", [0, 64])
def test_lanes_come_back_with_the_attention_of_their_pages(shared_tokens: int) -> None:
    rig = lane_rig(Case("float32", 2, 64, 100, 3, threads=1), shared_tokens)
    try:
        for _ in range(3):
            rig.attn[:] = np.nan
            rig.one_layer()
            np.testing.assert_allclose(rig.attn, 0.5, rtol=1e-6)
    finally:
        rig.close()


def test_a_queue_kept_full_serves_every_lane_and_leaves_nothing_behind() -> None:
    rig = lane_rig(Case("float32", 2, 64, 100, 3, threads=2))
    try:
        for _ in range(2):
            assert rig.kept_full(0.0) > 0
            stats = rig.port.stats()
            assert stats["waiting_lanes"] == 0
            assert stats["lane_entries"] == stats["submitted_rows"] >= 3 * 3
    finally:
        rig.close()


def test_lanes_share_the_pages_of_their_prefix_and_no_others() -> None:
    case = Case("bfloat16", 4, 128, 2048 + 256, 16, threads=1)
    tables = host_lanes.shared_tables(case, 2048)
    assert tables.shape == (16, 36)
    assert (tables[:, :32] == tables[0, :32]).all()
    own = tables[:, 32:].ravel().tolist()
    assert sorted({*tables[0, :32].tolist(), *own}) == list(range(32 + 16 * 4))
    assert len(set(own)) == len(own)


def test_slots_move_what_a_copy_of_as_many_bytes_would() -> None:
    shape = host_slots.SLOT_SHAPES[2]
    q, kv, x = 16 * 128, 2 * 128, 8192
    assert shape.exit_bytes == 2 * (q + 2 * kv + x)
    assert shape.take_bytes == 2 * (q + x)
