"""Sizes come from the cgroup and the affinity mask, not from the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from omniserve import machine
from omniserve.config import EngineConfig, split_cpus

PHYSICAL_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of cgroups without any limit; this process is in its root, as in a container."""
    own = tmp_path / "self"
    own.write_text("0::/\n")
    monkeypatch.setattr(machine, "OWN_CGROUP", own)
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    return tmp_path


@pytest.fixture
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def join(cgroups: Path, *lines: str) -> None:
    """Put this process into other cgroups: lines of /proc/self/cgroup."""
    (cgroups / "self").write_text("".join(f"{line}\n" for line in lines))


def test_without_a_limit_all_of_the_machine_counts(cgroups: Path) -> None:
    write(cgroups / "memory.max", "max")
    write(cgroups / "cpu.max", "max 100000")
    assert machine.memory_limit_bytes() == PHYSICAL_BYTES
    budget = machine.available_cpus()
    assert set(budget.cpus) == os.sched_getaffinity(0)
    assert budget.count == len(budget.cpus)


def test_where_there_are_no_cgroups_all_of_the_machine_counts(cgroups: Path) -> None:
    (cgroups / "self").unlink()
    assert machine.memory_limit_bytes() == PHYSICAL_BYTES
    assert machine.available_cpus().count == len(os.sched_getaffinity(0))


def test_memory_is_the_cgroups_limit(cgroups: Path) -> None:
    write(cgroups / "memory.max", "123456789")
    assert machine.memory_limit_bytes() == 123456789


@pytest.mark.parametrize(("quota", "count"), [("250000", 2), ("150000", 1), ("50000", 1), ("1600000", 8)])
def test_cpus_are_the_cgroups_quota_rounded_down(
    cgroups: Path, eight_cpus: None, quota: str, count: int
) -> None:
    write(cgroups / "cpu.max", f"{quota} 100000")
    budget = machine.available_cpus()
    assert set(budget.cpus) == set(range(8)), "which of them is the scheduler's choice"
    assert budget.count == count


def test_the_lowest_limit_counts_of_the_own_cgroup_and_of_those_around_it(
    cgroups: Path, eight_cpus: None
) -> None:
    join(cgroups, "0::/system.slice/omniserve.service")
    write(cgroups / "system.slice" / "cpu.max", "300000 100000")
    write(cgroups / "system.slice" / "omniserve.service" / "cpu.max", "400000 100000")
    write(cgroups / "system.slice" / "memory.max", "2000000")
    write(cgroups / "system.slice" / "omniserve.service" / "memory.max", "1000000")
    assert machine.available_cpus().count == 3
    assert machine.memory_limit_bytes() == 1000000


def test_limits_of_cgroup_v1_count_in_a_container_and_outside(cgroups: Path, eight_cpus: None) -> None:
    join(cgroups, "4:memory:/docker/abc", "2:cpu,cpuacct:/docker/abc", "1:name=systemd:/docker/abc")
    write(cgroups / "cpu" / "cpu.cfs_quota_us", "-1")
    write(cgroups / "cpu" / "cpu.cfs_period_us", "100000")
    write(cgroups / "memory" / "memory.limit_in_bytes", "9223372036854771712")
    assert machine.available_cpus().count == 8
    assert machine.memory_limit_bytes() == PHYSICAL_BYTES
    write(cgroups / "cpu" / "docker" / "abc" / "cpu.cfs_quota_us", "200000")
    write(cgroups / "cpu" / "docker" / "abc" / "cpu.cfs_period_us", "50000")
    write(cgroups / "memory" / "docker" / "abc" / "memory.limit_in_bytes", "5000000")
    assert machine.available_cpus().count == 4
    assert machine.memory_limit_bytes() == 5000000
    write(cgroups / "cpu" / "cpu.cfs_quota_us", "300000")
    assert machine.available_cpus().count == 3, "what a container sees at its mount point"


def test_an_affinity_mask_below_the_quota_bounds_threads_and_their_places(
    cgroups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 5})
    write(cgroups / "cpu.max", "400000 100000")
    split = split_cpus(EngineConfig())
    assert (split.device_threads, split.host_threads) == (1, 1)
    assert {*split.device_cpus, *split.host_cpus} == {2, 5}


def test_threads_of_both_sides_fit_the_quota_and_are_not_pinned(cgroups: Path, eight_cpus: None) -> None:
    write(cgroups / "cpu.max", "300000 100000")
    split = split_cpus(EngineConfig())
    assert split.device_threads + split.host_threads == 3
    assert split.device_cpus == split.host_cpus == ()
