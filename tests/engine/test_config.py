"""Sizes come from the cgroup, not from the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from omniserve import config


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
