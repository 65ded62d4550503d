"""Cost of decisions: `schedule` and `admit` at 64 chats, 400 lanes and 1,000 queued jobs, without any device.

`python -m omniserve.bench.policy [--json FILE]`. Two scenes: all batch work that runs decodes as
lanes (`host_offload="always"`), and, as is the default, some of it has rows on the device as well ("auto",
under the key of that name in the JSON file). The state is the real one, filled by the real scheduler; a
step's results are made up at once: every row gives a token, every copy arrives, a lane's token is there after
two steps. The latency model is the engine's own, for a model and a device that are not here, and learns from
every walk. Seconds are CPU time of the deciding thread: what another process does meanwhile does not count.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omniserve.bench.measure import machine, percentile, seconds_of, write_json
from omniserve.config import HostOffload
from omniserve.policy.hardware_profiles import ModelShape, hardware_fit
from omniserve.policy.latency_model import LatencyModel
from omniserve.policy.plan import LaneStart, NewToken, Step, StepResult
from omniserve.policy.request import Limits, Phase, Request
from omniserve.policy.scheduler import schedule
from omniserve.policy.slo import SloPolicy
from omniserve.policy.state import State
from omniserve.policy.terms import WALK_BOUND_SHARE, Terms
from omniserve.types import SLO

NUM_CHATS, NUM_LANES, NUM_QUEUED = 64, 400, 1000
MODEL = ModelShape("made up", 30, 7168, 20480, 56, 8, 128, 64000)
HARDWARE = ("a100-sxm-80g", MODEL, "xeon-gold-6342", "pcie4_x16")
NOISE = 0.03  # of a walk's time, relative
CHAT_PROMPT, BATCH_PROMPT = 161, 400
BATCH_OUTPUT, ENDLESS = 2000, 1_000_000
TARGETS = SLO(ttft_s=1.0, tpot_s=0.1)
ROUNDS = 300
SCENES: tuple[HostOffload, ...] = ("always", "auto")
# What the figures must stay under, in seconds.
SCHEDULE_LIMIT_S, ADMISSION_LIMIT_S = 1e-3, 0.2e-3


@dataclass(slots=True)
class Stand:
    """The state, and an outside that answers every step at once."""

    model: LatencyModel
    policy: SloPolicy
    state: State
    random: random.Random = field(default_factory=lambda: random.Random(0))
    now: float = 0.0
    next_id: int = 0
    in_flight: list[tuple[LaneStart, int]] = field(default_factory=list)
    arriving: list[int] = field(default_factory=list)

    @property
    def best_effort_on_device(self) -> int:
        """Batch requests that decode on the device."""
        return sum(r.best_effort and r.phase is Phase.DEVICE for r in self.state.requests.values())

    def add(self, best_effort: bool) -> Request:
        request = self.request(best_effort)
        self.state.note_arrival(request, self.now)
        self.state.add(request)
        return request

    def request(self, best_effort: bool) -> Request:
        prompt = BATCH_PROMPT if best_effort else CHAT_PROMPT
        request = Request(
            self.next_id,
            10 if best_effort else 0,
            best_effort,
            prompt,
            BATCH_OUTPUT if best_effort else ENDLESS,
            prompt,
            service_class="best_effort" if best_effort else "latency_sensitive",
            slo=None if best_effort else TARGETS,
            arrival_s=self.now,
        )
        self.next_id += 1
        return request

    def step(self) -> float:
        """One plan carried out; returns the CPU seconds that deciding took."""
        began = time.thread_time()
        plan = schedule(self.state, self.now, self.policy)
        decided_s = time.thread_time() - began
        step = self.state.commit(plan, self.now)
        result = self._result(step)
        if plan.why is not None and plan.kind == "walk":
            seconds = plan.why.predicted_s * self.random.gauss(1.0, NOISE)
            self.model.observe(plan.why.load, plan.why.host_is_busy, seconds)
            self.now += seconds
        self.state.apply(step, result, self.now)
        return decided_s

    def _result(self, step: Step) -> StepResult:
        tokens = [NewToken(r.request_id, 1, False) for r in step.rows if r.samples]
        self.in_flight = [(start, left - 1) for start, left in self.in_flight]
        tokens += [NewToken(start.request_id, 1, True) for start, left in self.in_flight if left == 0]
        self.in_flight = [(start, left) for start, left in self.in_flight if left > 0]
        self.in_flight += [(start, 2) for start in step.lane_starts]
        arrived, self.arriving = self.arriving, [c.copy_id for c in (*step.copies_out, *step.copies_in)]
        share, rest = divmod(len(self.in_flight), MODEL.num_layers)
        return StepResult(
            tokens=tuple(tokens),
            staged=tuple(c.copy_id for c in step.copies_out),
            arrived=tuple(arrived),
            lane_rows=len(self.in_flight),
            lanes_waiting=tuple(share + (layer < rest) for layer in range(MODEL.num_layers)),
        )


def make_stand(host_offload: HostOffload) -> Stand:
    """All chats decode, all slots hold lanes, and the queue is full. With "auto", lanes come when the device
    is full, and what batch work decodes there by then goes on."""
    limits = Limits(
        num_layers=MODEL.num_layers,
        num_device_pages=8000,
        num_host_pages=40_000,
        page_size=16,
        host_page_size=64,
        watermark_pages=400,
        max_num_seqs=128,
        max_lanes=NUM_LANES,
        max_lane_rows=64,
        num_frames=512,
        max_copies_per_step=256,
        host_offload=host_offload,
    )
    terms = Terms(
        max_num_batched_tokens=512,
        max_lane_rows=64,
        pass_budget_s=0.05,
        walk_bound_s=WALK_BOUND_SHARE * TARGETS.ttft_s,
        kv_token_bytes=MODEL.kv_bytes,
    )
    model = LatencyModel(hardware_fit(*HARDWARE))
    stand = Stand(model, SloPolicy(model, terms), State(limits))
    stand.state.host_started()
    for _ in range(NUM_CHATS):
        stand.add(best_effort=False)
    while stand.state.num_in_phase(Phase.LANE) < NUM_LANES:
        while stand.state.num_in_phase(Phase.WAITING) < NUM_CHATS:
            stand.add(best_effort=True)
        stand.step()
    while stand.state.num_in_phase(Phase.WAITING) < NUM_QUEUED:
        stand.add(best_effort=True)
    return stand


def measure(host_offload: HostOffload, rounds: int | None = None) -> dict[str, Any]:
    """CPU seconds of each decision: median and 99th percentile over `rounds` steps of a moving state.

    best_effort_on_device: batch requests decoding there, at the first and the last of these steps.
    """
    rounds = rounds or ROUNDS
    stand = make_stand(host_offload)
    counts = {phase.value: stand.state.num_in_phase(phase) for phase in Phase}
    first = stand.best_effort_on_device
    decisions = [stand.step() for _ in range(rounds)]
    last = stand.best_effort_on_device
    newcomer = stand.request(best_effort=False)
    admissions = _cpu_times(rounds, lambda: stand.policy.admit(stand.state, newcomer, stand.now))
    for _ in range(4):
        stand.add(best_effort=False)
    arrivals = _cpu_times(rounds, lambda: schedule(stand.state, stand.now, stand.policy))
    crowded = _cpu_times(rounds, lambda: stand.policy.admit(stand.state, newcomer, stand.now))
    return {
        "requests": {name: count for name, count in counts.items() if count},
        "best_effort_on_device": [first, last],
        "schedule": _summary(decisions, SCHEDULE_LIMIT_S),
        "schedule_with_4_arrivals": _summary(arrivals, SCHEDULE_LIMIT_S),
        "admission": _summary(admissions, ADMISSION_LIMIT_S),
        "admission_behind_4_prompts": _summary(crowded, ADMISSION_LIMIT_S),
    }


def _cpu_times(rounds: int, work: Callable[[], object]) -> list[float]:
    return [seconds_of(work, time.thread_time) for _ in range(rounds)]


def _summary(times: Sequence[float], limit_s: float) -> dict[str, float]:
    return {
        "median_s": percentile(times, 0.5),
        "p99_s": percentile(times, 0.99),
        "limit_s": limit_s,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="omniserve.bench.policy", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    options = parser.parse_args(arguments)
    found = {scene: measure(scene) for scene in SCENES}
    for scene, measured in found.items():
        _print(scene, measured)
    if options.json:
        write_json(options.json, {"machine": machine(), **found["always"], "auto": found["auto"]})
    return 0


def _print(scene: str, found: dict[str, Any]) -> None:
    requests = ", ".join(f"{count} {name}" for name, count in found["requests"].items())
    first, last = found["best_effort_on_device"]
    print(f"host_offload {scene}: {requests}; best-effort on the device {first}, at the end {last}")
    for name, times in found.items():
        if "limit_s" in times:
            median_ms, p99_ms, limit_ms = (1e3 * times[key] for key in ("median_s", "p99_s", "limit_s"))
            print(f"{name:28s} median {median_ms:.3f} ms, p99 {p99_ms:.3f} ms (limit {limit_ms:g} ms)")


if __name__ == "__main__":
    raise SystemExit(main())
