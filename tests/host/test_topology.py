"""NUMA nodes read from a folder that stands for /sys. No machine with several nodes has run this yet."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from omniserve.host.topology import Placement, nodes_of, num_partitions, place


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """Two nodes of four CPUs each, siblings numbered far apart, and a node of memory alone."""
    for node, cpus in enumerate(["0-1,4-5\n", "2-3,6,7\n", "\n"]):
        folder = tmp_path / f"devices/system/node/node{2 * node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpus)
    (tmp_path / "devices/system/node/possible").write_text("0-4\n")
    return tmp_path


def test_every_cpu_has_the_node_that_lists_it(sysfs: Path) -> None:
    assert nodes_of(range(8), sysfs) == [0, 0, 2, 2, 0, 0, 2, 2]


def test_there_are_as_many_partitions_as_the_cpus_span_nodes(sysfs: Path) -> None:
    assert num_partitions([0, 1, 2], sysfs) == 2
    assert num_partitions([2, 7], sysfs) == 1


def test_workers_belong_to_the_partition_of_their_cpus_node(sysfs: Path) -> None:
    assert place([5, 2, 0, 7], 2, sysfs) == Placement(nodes=(0, 2), partitions=(0, 1, 0, 1))


def test_one_partition_or_another_number_than_there_are_nodes_is_not_placed(sysfs: Path) -> None:
    assert place([0, 1], 1, sysfs) == Placement()
    assert place([0, 2], 3, sysfs) == Placement()


def test_workers_that_are_not_pinned_have_no_partition_of_their_own(
    sysfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3})
    assert num_partitions([], sysfs) == 2
    assert place([], 2, sysfs) == Placement(nodes=(0, 2))


def test_a_kernel_without_numa_is_one_node(tmp_path: Path) -> None:
    assert num_partitions([0, 9], tmp_path) == 1
    assert num_partitions([], tmp_path) == 1


def test_this_machine_is_read_alike_by_engine_and_host() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    count = num_partitions(cpus)
    placement = place(cpus, count)
    assert len(placement.nodes) == (count if count > 1 else 0)
    assert all(0 <= partition < count for partition in placement.partitions)
