"""Measures what a model costs on this machine, within a minute: the fit behind LatencyModel.

Every part is measured on the engine's own executor beside an idle host and beside a host that reads memory
at full speed, in turns, so that what the machine does meanwhile hits both.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from omniserve.config import CpuSplit, EngineConfig
from omniserve.engine.host_probe import NO_HOST, HostRates, measure_host
from omniserve.engine.latency_fit import WalkSample, fit_costs
from omniserve.engine.sandbox import Mix, Sandbox
from omniserve.host.load import HostLoad, host_load
from omniserve.host.others import Others
from omniserve.model.decoder import Decoder
from omniserve.policy.correction import accuracy
from omniserve.policy.latency_model import KINDS, LatencyFit, WalkCosts, kind_of
from omniserve.policy.staircase import Staircase, find_steps, never_falling

BUDGET_S = 45.0  # of measuring; start and end take some seconds more
TOLERANCE = 0.03  # of a staircase between two points, relative; more where times themselves vary more
MOST_POINTS = 16  # of a staircase: each is measured several times
LOAD_BYTES = 256 << 20  # what the busy host reads again and again: more than caches hold
_REPEATS = 3  # of a point while steps are searched
_NOISE_REPEATS = 7
_MIN_WALKS = 24
# Shares of the budget.
_STEPS, _ROUNDS, _HEAD, _WALKS = 0.12, 0.24, 0.1, 0.54

Progress = Callable[[str, float], None]


class Profiler:
    """One profile in the making. `progress(what, share done)` is told how far it is."""

    def __init__(
        self,
        config: EngineConfig,
        decoder: Decoder,
        split: CpuSplit,
        max_model_len: int,
        budget_s: float = BUDGET_S,
        progress: Progress = lambda what, share: None,
    ) -> None:
        self.config = config
        self.split = split
        self.budget_s = budget_s
        self._progress = progress
        self._done = 0.0
        self._until = math.inf
        self._random = random.Random(0)
        self.sandbox = Sandbox(config, decoder, split, max_model_len)
        self.max_rows = config.max_device_rows + config.max_lane_rows

    def fit(self, key: dict[str, str | int]) -> LatencyFit:
        """Measure everything. `key` says what the result holds for."""
        others, began = Others(), time.perf_counter()
        self._until = began + self.budget_s
        overhead = self._engine_overhead()
        rates, passes = NO_HOST, [(1, 0.0)]
        if self.split.host_threads:
            rates = measure_host(self.config, self.sandbox.decoder, self.split, self.sandbox.max_model_len)
        geometry = self.sandbox.host.segment.geometry
        with host_load(geometry, LOAD_BYTES, self.split.host_threads, self.split.host_cpus) as load:
            dense = self._dense(load)
            head = self._head(load)
            if load.is_there:
                self.sandbox.use_lanes(True)
                passes = self.sandbox.pass_s()
            samples = self._walks(load)
        costs: list[WalkCosts] = []
        residuals: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for state, walks in enumerate(samples):
            found, errors = fit_costs(walks, dense[state], head[state], self.sandbox.decoder.num_layers)
            costs.append(
                replace(found, overhead_s=found.overhead_s + overhead[0], row_overhead_s=overhead[1])
            )
            for walk, error in zip(walks, errors, strict=True):
                residuals[kind_of(walk.load, state)].append(round(error, 5))
        source = {
            "how": "measured on this machine",
            "seconds": round(time.perf_counter() - began, 1),
            "walks": sum(map(len, samples)),
            "points": len(dense[0].rows),
            "cores_of_others": round(others.cores(), 2),
        }
        return self._result(key, costs[0], costs[-1], passes, rates, residuals, source)

    def _result(
        self,
        key: dict[str, str | int],
        idle: WalkCosts,
        busy: WalkCosts,
        passes: list[tuple[int, float]],
        rates: HostRates,
        residuals: dict[str, list[float]],
        source: dict[str, Any],
    ) -> LatencyFit:
        layers = self.sandbox.decoder.num_layers
        beside = [s - idle.dense.at(n) / layers - n * idle.lane_row_s for n, s in passes]
        pairs = {k: [(1.0, 1.0 + e) for e in errors] for k, errors in residuals.items()}
        pairs["all"] = [pair for found in pairs.values() for pair in found]
        return LatencyFit(
            key=key,
            num_layers=layers,
            idle=idle,
            busy=busy,
            pass_s=max(0.0, statistics.median(beside)),
            host_bytes_per_s=rates.bytes_per_s,
            host_row_s=rates.row_s,
            copy_bytes_per_s=rates.copy_bytes_per_s,
            copy_s=rates.copy_s,
            residuals=residuals,
            accuracy={kind: accuracy(found) for kind, found in pairs.items()},
            source=source,
        )

    # ------------------------------------------------------------ staircases

    def _dense(self, load: HostLoad) -> list[Staircase]:
        self.sandbox.dense_s(1)
        return self._staircases("dense modules", self.sandbox.dense_s, self.max_rows, load, _STEPS, _ROUNDS)

    def _head(self, load: HostLoad) -> list[Staircase]:
        self.sandbox.head_s(1)
        most = min(self.max_rows, self.config.max_num_seqs + self.config.max_lane_rows)
        return self._staircases("logits", self.sandbox.head_s, most, load, _HEAD / 2, _HEAD / 2)

    def _staircases(
        self,
        what: str,
        measure: Callable[[int], float],
        max_rows: int,
        load: HostLoad,
        search_share: float,
        rounds_share: float,
    ) -> list[Staircase]:
        """Beside an idle and a busy host, at the same points: steps are searched beside an idle one."""
        until = self._deadline(search_share)

        def measured(rows: int) -> float:
            self._tell(what)
            return statistics.median(measure(rows) for _ in range(_REPEATS))

        repeated = sorted(measure(min(8, max_rows)) for _ in range(_NOISE_REPEATS))
        noise = (repeated[-2] - repeated[1]) / repeated[_NOISE_REPEATS // 2]
        points = find_steps(
            measured,
            max_rows,
            max(TOLERANCE, noise),
            lambda found: found < MOST_POINTS and time.perf_counter() < until,
        )
        until = self._deadline(rounds_share)
        times: list[dict[int, list[float]]] = [{n: [] for n in points} for _ in range(1 + load.is_there)]
        for number in _rounds(until):
            for state in _states(load):
                for n in points:
                    if number == 0 or time.perf_counter() < until:
                        times[state][n].append(measure(n))
            self._tell(what)
        self._done += search_share + rounds_share
        rows = tuple(points)
        return [Staircase(rows, never_falling([statistics.median(t[n]) for n in rows])) for t in times]

    # ------------------------------------------------------------ whole walks

    def _walks(self, load: HostLoad) -> list[list[WalkSample]]:
        """Random mixes of decodes and chunks, without and with lanes in turns, each in both host states.

        In turns, because what is told apart later must be measured at the same time.
        """
        layers = self.sandbox.decoder.num_layers
        at_least, until = max(_MIN_WALKS, layers), self._deadline(_WALKS)
        found: list[list[WalkSample]] = [[] for _ in range(1 + load.is_there)]
        number = 0
        while number < at_least or time.perf_counter() < until:
            for has_lanes in (False, True)[: 1 + load.is_there]:
                self.sandbox.use_lanes(has_lanes)
                mix = self._lane_mix(number) if has_lanes else self._mix()
                for state in _states(load):
                    found[state].append(WalkSample(*self.sandbox.walk(mix)))
            number += 1
            self._tell("walks")
        self._done += _WALKS
        return found

    def _lane_mix(self, number: int) -> Mix:
        """So many lanes start in each walk that every layer has some in the end; then fewer, more, any."""
        most = self.config.max_lane_rows
        length = max(1, self.sandbox.decoder.num_layers // 4)  # each mix runs in both host states
        phase = number // length % 4
        starts = self._random.randint(0, most) if phase == 3 else (most // 2, most // 8 + 1, most)[phase]
        copied = self._random.choice((0, 0, min(4, self.config.max_copies_per_step)))
        return replace(self._mix(), lane_starts=min(starts, most), copied_pages=copied)

    def _mix(self) -> Mix:
        """Log-uniform counts and lengths: small walks are as frequent as large ones."""
        rows = self.config.max_device_rows
        memory, longest = self.sandbox.kv_tokens - 2 * rows, self.sandbox.max_model_len - 1
        kind = self._random.random()
        num_decodes = 0 if kind < 0.2 else self._upto(min(rows, self.config.max_num_seqs))
        decodes = tuple(self._upto(min(longest, max(1, memory // num_decodes))) for _ in range(num_decodes))
        chunks: list[tuple[int, int, bool]] = []
        left = rows - num_decodes
        while kind < 0.6 and left > 1 and len(chunks) < 4:
            count = max(2, self._upto(min(left, longest)))
            start = self._random.choice((0, self._upto(max(1, longest - count))))
            start = min(start, max(0, (memory - sum(decodes)) // 4 - count), longest - count)
            chunks.append((start, count, self._random.random() < 0.5))
            left -= count
            if self._random.random() < 0.7:
                break
        return Mix(decodes or (() if chunks else (1,)), tuple(chunks))

    def _upto(self, most: int) -> int:
        return max(1, min(most, round(float(np.exp(self._random.uniform(0, np.log(most + 0.5)))))))

    def _engine_overhead(self) -> tuple[float, float]:
        """Of the loop around a walk, and of each request in it: the line through one and a few requests."""
        few = max(2, min(8, self.config.max_num_seqs, self.config.max_device_rows))
        self.sandbox.engine_s(1, 2)
        one = statistics.median(self.sandbox.engine_s(1, 8))
        many = statistics.median(self.sandbox.engine_s(few, 8))
        row = max(0.0, (many - one) / (few - 1))
        return max(0.0, one - row), row

    # ------------------------------------------------------------ time

    def _deadline(self, share: float) -> float:
        return min(self._until, time.perf_counter() + share * self.budget_s)

    def _tell(self, what: str) -> None:
        self._progress(what, min(1.0, self._done))

    def close(self) -> None:
        self.sandbox.close()


def _rounds(until: float) -> Iterable[int]:
    """0, 1, ... while there is time; the first one always."""
    number = 0
    while number == 0 or time.perf_counter() < until:
        yield number
        number += 1


def _states(load: HostLoad) -> Iterable[int]:
    """0 beside an idle host, then 1 beside a busy one where there is a host."""
    yield 0
    if load.is_there:
        load.go()
        try:
            yield 1
        finally:
            load.rest()


def profile(
    config: EngineConfig,
    decoder: Decoder,
    split: CpuSplit,
    max_model_len: int,
    key: dict[str, str | int],
    budget_s: float = BUDGET_S,
    progress: Progress = lambda what, share: None,
) -> LatencyFit:
    """Measure `decoder` under `config`; it comes from `device_decoder`, as this process's place does."""
    profiler = Profiler(config, decoder, split, max_model_len, budget_s, progress)
    try:
        return profiler.fit(key)
    finally:
        profiler.close()
