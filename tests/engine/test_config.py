"""Sizes come from the cgroup, not from the machine."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from omniserve import config
from omniserve.types import BEST_EFFORT, LATENCY_SENSITIVE, SLO

SLOW = SLO(1.0, 0.1)
TARGETS = (replace(LATENCY_SENSITIVE, slo=SLOW), BEST_EFFORT)
# No target of its own, but requests may bring some.
TIGHTEST_ONLY = (replace(LATENCY_SENSITIVE, tightest=SLOW), BEST_EFFORT)


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({}, config.DEVICE_ROWS),
        ({"classes": TARGETS}, config.DEVICE_ROWS_WITH_TARGETS),
        ({"classes": TIGHTEST_ONLY}, config.DEVICE_ROWS_WITH_TARGETS),
        ({"classes": TARGETS, "policy": "paper"}, config.DEVICE_ROWS_WITH_TARGETS),
        ({"classes": TARGETS, "calibrate": "never"}, config.DEVICE_ROWS),
        ({"classes": TARGETS, "policy": "sarathi", "host_offload": "never"}, config.DEVICE_ROWS),
        ({"classes": TARGETS, "calibrate": "never", "max_num_batched_tokens": 9}, 9),
    ],
)
def test_walks_are_large_only_where_predictions_bound_them(settings: dict[str, Any], rows: int) -> None:
    assert config.EngineConfig(**settings).max_device_rows == rows


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for this process's only cgroup."""
    monkeypatch.setattr(config, "_cgroup_folders", lambda: [tmp_path])
    return tmp_path


def test_memory_is_the_cgroups_limit(cgroup: Path) -> None:
    (cgroup / "memory.max").write_text("123456789\n")
    assert config.memory_limit_bytes() == 123456789


def test_without_a_limit_memory_is_the_machines(cgroup: Path) -> None:
    (cgroup / "memory.max").write_text("max\n")
    assert config.memory_limit_bytes() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("quota", "count"), [("max 100000", None), ("150000 100000", 1), ("50000 100000", 1)]
)
def test_cpus_are_the_cgroups_quota_rounded_down(cgroup: Path, quota: str, count: int | None) -> None:
    (cgroup / "cpu.max").write_text(quota)
    budget = config.available_cpus()
    assert set(budget.cpus) == os.sched_getaffinity(0)
    assert budget.count == (len(budget.cpus) if count is None else count)
