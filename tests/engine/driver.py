"""Runs an engine in this process, step by step, with its books checked after every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from engine.reference import Reference
from omniserve.attention.cpu import dtype_name, kv_geometry
from omniserve.config import EngineConfig, Quantization, split_cpus
from omniserve.engine import cpu_executor
from omniserve.engine.build import make_engine
from omniserve.engine.cpu_executor import CpuExecutor
from omniserve.engine.loop import Engine
from omniserve.host.supervisor import Host, HostSupervisor
from omniserve.model.decoder import Decoder
from omniserve.model.loading import load_decoder
from omniserve.model.sampling import Chooser, sample
from omniserve.policy.latency import LearningPrediction
from omniserve.policy.request import Phase
from omniserve.types import SamplingParams

MAX_STEPS = 20_000
# An engine that waits for its host looks up at least this often.
SLEEP_S = 0.2

LS = "latency_sensitive"
BE = "best_effort"


class Subject:
    """A model under test and its reference."""

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype = torch.float32,
        max_model_len: int = 2048,
        quantization: Quantization = "none",
        reference_path: Path | None = None,
    ) -> None:
        """reference_path: where the reference's weights are, if they are others than in `path`."""
        self.decoder = load_decoder(path, dtype, max_model_len=max_model_len, quantization=quantization)
        self.reference = Reference(reference_path or path, dtype)
        self.max_model_len = max_model_len

    def kv_bytes(self, num_pages: int, page_size: int) -> int:
        """Memory that holds exactly `num_pages` pages of `page_size` tokens."""
        return num_pages * kv_page_bytes(self.decoder, page_size)


def kv_page_bytes(decoder: Decoder, page_size: int) -> int:
    heads, head_dim = decoder.num_kv_heads, decoder.head_dim
    return kv_geometry(decoder.num_layers, heads, head_dim, page_size, dtype_name(decoder.dtype)).page_bytes


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that comes before step `step` of the engine."""

    step: int
    prompt: tuple[int, ...]
    max_tokens: int
    service_class: str = LS

    @property
    def best_effort(self) -> bool:
        return self.service_class == BE


@dataclass(slots=True)
class Outcome:
    """What a run brought, in order of `arrivals`. logits[i] is [num tokens, vocab] float32."""

    arrivals: list[Arrival]
    tokens: list[list[int]]
    num_lane_tokens: list[int]
    logits: list[Tensor]
    stats: dict[str, Any]
    num_parked: int


@dataclass(slots=True)
class LogitRecorder:
    """Logits of every token chosen, by (index of the arrival, index in its text).

    The arrival's index is its sampling seed, which greedy choice does not use.
    """

    rows: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @contextmanager
    def recording(self) -> Iterator[None]:
        def recorded(logits: Tensor, choosers: Sequence[Chooser], positions: Sequence[int]) -> list[int]:
            seeds = [c.seed for c in choosers]
            for row, key in zip(logits, zip(seeds, positions, strict=True), strict=True):
                assert key not in self.rows, f"the token at {key} was chosen twice"
                self.rows[key] = row.clone()
            return sample(logits, choosers, positions)

        with patch.object(cpu_executor, "sample", recorded):
            yield

    def of(self, index: int, first: int, count: int) -> Tensor:
        return torch.stack([self.rows[index, first + i] for i in range(count)])


def build_engine(
    subject: Subject,
    config: EngineConfig,
    host: Callable[..., Host] = HostSupervisor,
    host_partitions: int | None = None,
    latency: LearningPrediction | None = None,
) -> Engine:
    split = split_cpus(config)
    torch.set_num_threads(1)  # as device_decoder does
    return make_engine(
        config,
        subject.decoder,
        subject.max_model_len,
        split,
        host=host,
        host_partitions=host_partitions,
        latency=latency,
    )


def executor_of(engine: Engine) -> CpuExecutor:
    assert isinstance(engine.executor, CpuExecutor)
    return engine.executor


def run(
    subject: Subject,
    config: EngineConfig,
    arrivals: Sequence[Arrival],
    after_step: Callable[[Engine], None] = lambda engine: None,
    latency: LearningPrediction | None = None,
) -> Outcome:
    """Serve `arrivals` with a real host process, assert that nothing is left behind, and close the engine."""
    engine = build_engine(subject, config, latency=latency)
    try:
        return _Drive(engine, list(arrivals), after_step).outcome()
    finally:
        engine.close()


class _Drive:
    """One run from the first arrival to the last page given back."""

    def __init__(self, engine: Engine, arrivals: list[Arrival], after_step: Callable[[Engine], None]) -> None:
        self.engine = engine
        self.arrivals = arrivals
        self.after_step = after_step
        self.recorder = LogitRecorder()
        self.index_of: dict[int, int] = {}
        self.tokens: list[list[int]] = [[] for _ in arrivals]
        self.num_lane_tokens = [0] * len(arrivals)
        self.num_parked = 0

    def outcome(self) -> Outcome:
        with self.recorder.recording():
            self._await_host()
            self._serve()
        stats = self.engine.stats()
        self._drain()
        assert_nothing_is_left(self.engine)
        return Outcome(
            self.arrivals,
            self.tokens,
            self.num_lane_tokens,
            [
                self.recorder.of(i, len(arrival.prompt), len(self.tokens[i]))
                for i, arrival in enumerate(self.arrivals)
            ],
            stats,
            self.num_parked,
        )

    def _await_host(self) -> None:
        """Scenarios count steps from a host that is ready, so that they do not depend on its start-up."""
        while not (self.engine.state.host_ready or self.engine.state.host_failed):
            self.engine.step()
            self.engine.sleep(timeout_s=SLEEP_S)

    def _serve(self) -> None:
        todo = sorted(range(len(self.arrivals)), key=lambda i: self.arrivals[i].step)
        for step in range(MAX_STEPS):
            while todo and self.arrivals[todo[0]].step <= step:
                self._add(todo.pop(0))
            if not todo and self.engine.is_idle:
                return
            self._step()
        raise AssertionError(f"no end after {MAX_STEPS} steps: {list(self.engine.state.requests.values())}")

    def _add(self, index: int) -> None:
        arrival = self.arrivals[index]
        params = SamplingParams(temperature=0.0, max_tokens=arrival.max_tokens, ignore_eos=True, seed=index)
        self.index_of[self.engine.add(arrival.prompt, params, arrival.service_class)] = index

    def _step(self) -> None:
        prefills = {r.id: r.kv_tokens for r in self.engine.state.in_phase(Phase.PREFILL)}
        output = self.engine.step()
        self.engine.state.check()
        parked = self.engine.state.in_phase(Phase.PREFILL)
        self.num_parked += any(r.kv_tokens and prefills.get(r.id) == r.kv_tokens for r in parked)
        for token in output.tokens:
            self.tokens[self.index_of[token.request_id]].append(token.token_id)
            self.num_lane_tokens[self.index_of[token.request_id]] += token.by_lane
        self.after_step(self.engine)
        if output.was_idle and not self.engine.is_idle:
            self.engine.sleep(timeout_s=SLEEP_S)

    def _drain(self) -> None:
        """Copies under way and cancelled tasks end some time after the last token."""
        while self.engine.state.waits_for_host:
            self.engine.step()
            self.engine.sleep(timeout_s=SLEEP_S)


def assert_nothing_is_left(engine: Engine) -> None:
    """All pages, slots, frames and records are free."""
    state = engine.state
    state.check()
    assert state.is_idle
    assert not state.waits_for_host
    assert state.device.num_free == state.device.num_pages
    assert state.host.num_free == state.host.num_pages
    assert len(state.free_slots) == state.limits.max_lanes
    assert state.num_free_frames == state.limits.num_frames
    executor = executor_of(engine)
    assert executor.records == {}
    if executor.segment is not None:
        port = executor.segment.port.stats()
        assert (port["waiting_lanes"], port["draining_lanes"]) == (0, 0)
        assert port["free_frames"] == state.limits.num_frames


def assert_exact(subject: Subject, outcome: Outcome) -> None:
    """Every token and every logit is the reference's."""
    for i, arrival in enumerate(outcome.arrivals):
        assert len(outcome.tokens[i]) == arrival.max_tokens
        subject.reference.check(arrival.prompt, outcome.tokens[i])
        subject.reference.check_logits(arrival.prompt, outcome.tokens[i], outcome.logits[i])
