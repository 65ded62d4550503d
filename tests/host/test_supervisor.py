"""A host process that never comes up, or never for long: given up after a few starts, and said once."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omniserve import SamplingParams, _native
from omniserve.config import EngineConfig, split_cpus
from omniserve.engine.build import make_engine
from omniserve.host.supervisor import MAX_EARLY_DEATHS, HostSupervisor
from omniserve.model.loading import load_decoder

PATIENCE_S = 60.0


class Stillborn(HostSupervisor):
    """Its process ends at once."""

    def _command(self, *fds: int) -> list[str]:
        return [sys.executable, "-c", "pass"]


def geometry() -> _native.LaneGeometry:
    return _native.LaneGeometry(
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=64,
        hidden_size=64,
        act_dtype="float32",
        kv_dtype="float32",
        max_lanes=1,
        host_page_size=4,
        max_pages_per_lane=1,
        num_host_pages=1,
        device_page_size=4,
        num_frames=1,
    )


def next_event(host: HostSupervisor) -> str:
    deadline = time.monotonic() + PATIENCE_S
    while (event := host.poll()) is None:
        assert time.monotonic() < deadline, "no news of the host"
        time.sleep(0.01)
    return event


def test_a_host_that_never_comes_up_is_given_up_and_said_once() -> None:
    host = Stillborn(geometry(), [], 1)
    assert [next_event(host) for _ in range(MAX_EARLY_DEATHS)] == ["lost"] * (MAX_EARLY_DEATHS - 1) + [
        "failed"
    ]
    assert host.poll() is None
    assert host.wait_fds() == []
    host.close()


def test_a_killed_host_is_replaced_and_its_successor_comes_up() -> None:
    host = HostSupervisor(geometry(), [], 1)
    assert next_event(host) == "started"
    first = host.pid
    host._process.kill()
    assert [next_event(host), next_event(host)] == ["lost", "started"]
    assert host.pid != first
    host.close()


@pytest.mark.parametrize("mode", ["always", "auto"])
def test_without_a_host_batch_decodes_on_the_device(mode: Any, tiny_llama: Callable[..., Path]) -> None:
    decoder = load_decoder(tiny_llama(), max_model_len=256)
    config = EngineConfig(host_offload=mode, device_memory_bytes=8 << 20, host_memory_bytes=8 << 20)
    engine = make_engine(config, decoder, 256, split_cpus(config), host=Stillborn)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    wanted = {engine.add([5, 6, 7], params, kind) for kind in ("best_effort", "latency_sensitive")}
    tokens: dict[int, int] = dict.fromkeys(wanted, 0)
    deadline = time.monotonic() + PATIENCE_S
    while not engine.is_idle:
        assert time.monotonic() < deadline
        output = engine.step()
        for token in output.tokens:
            tokens[token.request_id] += 1
        if output.was_idle:
            engine.sleep(timeout_s=0.2)
    while engine.stats()["host_state"] != "failed":
        assert time.monotonic() < deadline
        engine.step()
        engine.sleep(timeout_s=0.05)
    assert set(tokens.values()) == {8}
    assert engine.stats()["num_lane_tokens"] == 0
    assert engine.stats()["host_deaths"] == MAX_EARLY_DEATHS
    engine.close()
