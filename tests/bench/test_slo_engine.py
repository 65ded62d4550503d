"""One run of bench-slo on a real engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from omniserve.bench.slo_run import Timing, Traffic, Trial, run_trial
from omniserve.bench.slo_variants import Variant
from omniserve.bench.workloads import SHAREGPT, BatchJobs


@pytest.mark.slow
def test_both_classes_are_served_and_accounted_for(smollm2_path: Path) -> None:
    trial = Trial(
        Variant("omniserve", 1, "auto"), seed=1, rate=2.0, jobs=BatchJobs(32, 64),
        device_memory_bytes=64 << 20,
    )  # fmt: skip
    traffic = Traffic(SHAREGPT.scaled(0.03))
    result = run_trial(trial, Timing(1.0, 4.0, 100.0), traffic, 4, str(smollm2_path))
    report = result.as_dict({})
    chat, batch = result.ls(), result.be()
    assert chat.outcomes == {"finished": len(result.due("latency_sensitive"))}
    assert chat.ttft.count > 0
    assert batch.tokens_per_s > 0
    assert set(batch.outcomes) <= {"finished", "unfinished"}
    assert batch.context is not None
    assert 8 <= batch.context < 64
    assert result.device_pages * 16 * 46_080 <= 64 << 20  # 16 tokens a page, bytes of one token in float32
    assert 0 < max(result.pages) <= result.device_pages
    assert report["engine"]["device_tokens"] > 0
