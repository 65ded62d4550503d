"""The host benchmark measures what it says: cold pages, every case, a report that holds together."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniserve.bench import host, host_lanes, host_report
from omniserve.bench.host import Case, Sweep, page_tables
from omniserve.cli import main

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
    assert len(set(cases)) == len(cases) == 3 * 4 * 2 * 4 * 3 * 2


def test_bytes_and_intensity_of_a_case() -> None:
    case = Case("bfloat16", 4, 128, 1000, 3, threads=1)
    assert case.num_bytes == 3 * 1000 * host.NUM_KV_HEADS * 128 * 2 * 2
    assert case.intensity == 4.0  # 8 flop per element of 2 bytes


def test_the_benchmark_reads_the_attention_it_claims() -> None:
    """Our reader and SDPA give the same result where they read the same numbers: equal keys and values."""
    arena = host.Arena(4 * MIB)
    arena.fill("float32").fill_(0.5)
    case = Case("float32", 3, 64, 100, 2, threads=1)
    reader = host.OurReader(case, arena, host._native.ThreadTeam(1))
    reader()
    np.testing.assert_allclose(reader.out, 0.5, rtol=1e-6)


@pytest.fixture
def small_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = Sweep(
        dtypes=("bfloat16",), groups=(1, 3), head_dims=(64,), contexts=(100,), lanes=(2,),
        threads=(1, 2), rounds=2, round_s=0.0,
    )  # fmt: skip
    monkeypatch.setattr(host_report, "quick_sweep", lambda: sweep)
    monkeypatch.setattr(
        host_report, "lane_cases", lambda threads, _: [Case("float32", 2, 64, 65, 2, threads)]
    )
    monkeypatch.setattr(host, "last_level_cache_bytes", lambda: MIB)
    monkeypatch.setattr(host, "MIN_ARENA_BYTES", 8 * MIB)


@pytest.mark.usefixtures("small_bench")
def test_the_report_holds_every_case_and_marks_cached_ones(tmp_path: Path) -> None:
    path, plot = tmp_path / "new" / "host.json", tmp_path / "host.svg"
    main(["bench-host", "--quick", "--json", str(path), "--plot", str(plot)])
    report = json.loads(path.read_text())
    assert report["arena_bytes"] == 8 * MIB
    assert [(c["group"], c["threads"], c["cached"], c["counts"]) for c in report["cases"]] == [
        (group, threads, cached, not cached)
        for group in (1, 3)
        for threads in (1, 2)
        for cached in (True, False)
    ]
    for case in report["cases"]:
        ours, stream = (case["gbps"][reader]["median"] for reader in ("ours", "stream"))
        assert case["share_of_stream"] == pytest.approx(ours / stream)
        assert ("sdpa" in case["gbps"]) == (not case["cached"])
        assert ("sdpa_grouped" in case["gbps"]) == (not case["cached"] and case["group"] > 1)
    assert [s["threads"] for s in report["stream_check"]] == [1, 2]
    assert len(report["host_workers"]) == 1
    assert plot.exists() == (find_spec("matplotlib") is not None)


@pytest.mark.usefixtures("small_bench")
def test_nothing_counts_when_the_arena_fits_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(host, "memory_limit_bytes", lambda: 12 * MIB)
    host_report.run_bench_host(True, str(tmp_path / "host.json"), None)
    report = json.loads((tmp_path / "host.json").read_text())
    assert not any(case["counts"] for case in report["cases"])


def test_lanes_come_back_with_the_attention_of_their_pages() -> None:
    case = Case("float32", 2, 64, 100, 3, threads=1)
    rig = host_lanes.LaneRig(case, MIB)
    try:
        host_lanes.memory_as_tensor(rig.host.kv.page_address(0), rig.host.arena_bytes, "float32").fill_(0.5)
        rig.kv[:] = 0.5
        for _ in range(2):
            rig()
            np.testing.assert_allclose(rig.attn, 0.5, rtol=1e-6)
    finally:
        rig.close()
