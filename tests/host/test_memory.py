"""The host's KV memory: its cap, what happens when the kernel refuses a wish, and partitions."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from host.lane_rig import Rig, lane_geometry
from host.test_supervisor import PATIENCE_S, next_event
from omniserve import _native as native
from omniserve.config import EngineConfig, split_cpus
from omniserve.engine.build import make_engine
from omniserve.errors import ConfigError
from omniserve.host.scripted import ScriptedHost
from omniserve.host.supervisor import HostSupervisor
from omniserve.model.loading import load_decoder
from omniserve.policy.pages import PagePool

OS_PAGE = 4096
# A process that may lock nothing: no right to, and a limit of zero.
MAY_NOT_LOCK = """
import ctypes, resource, sys
libc = ctypes.CDLL(None, use_errno=True)
header = (ctypes.c_uint32 * 2)(0x20080522, 0)
rights = (ctypes.c_uint32 * 6)()
assert libc.capget(header, rights) == 0
rights[0] &= ~(1 << 14)  # effective CAP_IPC_LOCK
assert libc.capset(header, rights) == 0
resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
"""


def touch(rig: Rig) -> None:
    ctypes.memset(rig.host.kv.page_address(0), 1, rig.host.arena_bytes)


def test_resident_memory_grows_with_what_is_touched_up_to_the_cap_and_is_reported() -> None:
    rig = Rig(num_host_pages=200)
    rig.host.publish_memory()
    before = rig.port.stats()
    assert (before["arena_bytes"], before["arena_resident_bytes"]) == (rig.host.arena_bytes, 0)
    touch(rig)
    rig.host.publish_memory()
    after = rig.port.stats()
    cap = -(-rig.host.arena_bytes // OS_PAGE) * OS_PAGE
    assert after["arena_resident_bytes"] == cap
    assert 0 <= after["arena_huge_bytes"] <= cap


def test_a_process_that_may_not_lock_memory_is_warned_and_serves(tmp_path: Path) -> None:
    code = (
        MAY_NOT_LOCK
        + """
sys.path.insert(0, sys.argv[1])
from host.lane_rig import Rig
from omniserve import _native as native
rig = Rig()
rig.host = native.HostWorkers(rig.address, lock=True)
(warning,) = [w for w in rig.host.warnings if "locking" in w]
assert "refused" in warning and "ulimit -l" in warning and "host_mlock" in warning, warning
rig.open_lane(0)
rig.start_token(0)
rig.exit(0, 0)
rig.host.start(1)
assert rig.port.wait_all(0, 60.0)
assert rig.take(0) == [0]
rig.host.stop()
"""
    )
    tests = str(Path(__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", code, tests], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class MayNotLock(HostSupervisor):
    """Its process has lost the right to lock memory before it begins."""

    def _command(self, *fds: int) -> list[str]:
        _, _, _, *arguments = super()._command(*fds)
        start = "from omniserve.host.process import main; sys.exit(main(sys.argv[1:]))"
        return [sys.executable, "-c", MAY_NOT_LOCK + start, *arguments]


def test_warnings_of_the_host_process_reach_statistics_and_standard_error(
    tiny_llama: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    decoder = load_decoder(tiny_llama(), max_model_len=256)
    config = EngineConfig(host_mlock=True, device_memory_bytes=8 << 20, host_memory_bytes=8 << 20)
    engine = make_engine(config, decoder, 256, split_cpus(config), host=MayNotLock)
    deadline = time.monotonic() + PATIENCE_S
    while engine.stats()["host_state"] != "ready":
        assert time.monotonic() < deadline
        engine.step()
        engine.sleep(timeout_s=0.05)
    stats = engine.stats()
    engine.close()
    assert any("locking" in warning for warning in stats["host_warnings"])
    assert 0 < stats["host_memory"]["arena_bytes"] <= 8 << 20
    assert "locking" in capfd.readouterr().err


class OftenAsked(HostSupervisor):
    """Its process looks at its memory all the time."""

    def _command(self, *fds: int) -> list[str]:
        _, _, _, *arguments = super()._command(*fds)
        start = "import sys, omniserve.host.process as p; p.MEMORY_REPORT_S = 0.01; "
        return [sys.executable, "-c", start + "sys.exit(p.main(sys.argv[1:]))", *arguments]


def test_the_host_process_reports_memory_that_became_resident_while_it_ran() -> None:
    host = OftenAsked(lane_geometry(), [], 1)
    assert next_event(host) == "started"
    assert host.segment.memory_usage()["resident_bytes"] == 0
    page = np.zeros(host.segment.geometry.device_page_bytes, np.uint8)
    host.segment.port.land(1, page.ctypes.data, 0, 1, 0, [0])
    deadline = time.monotonic() + PATIENCE_S
    while host.segment.memory_usage()["resident_bytes"] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    host.close()


def test_a_host_that_is_refused_nothing_warns_of_nothing_but_huge_pages() -> None:
    host = HostSupervisor(lane_geometry(), [], 1)
    assert next_event(host) == "started"
    assert [w for w in host.warnings if "huge pages" not in w] == []
    host.close()


def test_host_mlock_is_true_or_false() -> None:
    with pytest.raises(ConfigError, match="host_mlock"):
        EngineConfig(host_mlock=1)  # type: ignore[arg-type]


# Partitions


@pytest.mark.parametrize(("num_pages", "count"), [(24, 1), (24, 5), (7, 3), (32, 32)])
def test_policy_and_host_divide_pages_alike(num_pages: int, count: int) -> None:
    geometry = lane_geometry(num_host_pages=num_pages, num_partitions=count)
    pool = PagePool(num_pages, 4, count)
    pages = range(num_pages)
    assert [pool.partition_of(p) for p in pages] == [geometry.partition_of_page(p) for p in pages]


@pytest.mark.parametrize("count", [0, 33, 25])
def test_partitions_are_at_most_32_and_hold_a_page_each(count: int) -> None:
    with pytest.raises(ValueError, match="num_partitions"):
        lane_geometry(num_partitions=count)


def test_a_worker_belongs_to_a_partition_that_exists() -> None:
    rig = Rig(num_partitions=2)
    with pytest.raises(ValueError, match="partitions"):
        native.HostWorkers(rig.address, partitions=[0, 2])
    with pytest.raises(ValueError, match="nodes"):
        native.HostWorkers(rig.address, nodes=[0])


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_partition_is_served_by_any_number_of_workers(workers: int) -> None:
    """Also by workers that all belong to one of them."""
    rig = Rig(num_partitions=3)
    rig.host = native.HostWorkers(rig.address, partitions=[2])
    rig.host.start(workers)
    table = np.arange(24).reshape(4, 6)
    for slot in range(4):
        rig.open_lane(slot)
        rig.port.set_pages(slot, 0, table[slot].tolist())
        rig.start_token(slot)
    assert {rig.geometry.partition_of_page(int(row[0])) for row in table} == {0, 1, 2}
    for layer in range(rig.geometry.num_layers):
        rig.exit(layer, 0, 1, 2, 3)
        assert rig.port.wait_all(layer, 60.0)
        assert rig.take(layer) == [0, 1, 2, 3]
    rig.host.stop()


def test_pending_work_of_all_partitions_is_listed_oldest_first() -> None:
    rig = Rig(num_partitions=4)
    for slot in (3, 0, 2, 1):
        rig.open_lane(slot)
        rig.port.set_pages(slot, 0, [6 * slot])
        rig.start_token(slot)
        rig.exit(0, slot)
    assert rig.host.pending() == [(0, 3), (0, 0), (0, 2), (0, 1)]
    page = np.zeros(rig.geometry.device_page_bytes, np.uint8)
    for copy_id, host_page in ((9, 23), (4, 0)):
        rig.port.land(copy_id, page.ctypes.data, 0, 1, 0, [host_page])
    assert rig.host.pending_copies() == [9, 4]


def test_an_engine_has_a_partition_for_each_node_and_never_more_than_pages(
    tiny_llama: Callable[..., Path],
) -> None:
    decoder = load_decoder(tiny_llama(), max_model_len=256)
    config = EngineConfig(device_memory_bytes=8 << 20, host_memory_bytes=8 << 20)
    for asked, got in ((1, 1), (3, 3)):
        engine = make_engine(
            config,
            decoder,
            256,
            split_cpus(config),
            host=lambda geometry, *_: ScriptedHost(geometry),
            host_partitions=asked,
        )
        assert engine.state.host.num_partitions == got
        assert engine.host is not None
        assert engine.host.segment.geometry.num_partitions == got
        engine.close()
