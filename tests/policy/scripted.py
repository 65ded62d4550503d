"""A stand-in for device and host: it answers steps from integers alone, in an order a script chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from omniserve.policy.latency import FixedBudget
from omniserve.policy.plan import NewToken, Step, StepResult
from omniserve.policy.request import Limits, Phase, Request
from omniserve.policy.scheduler import schedule
from omniserve.policy.state import State

NUM_LAYERS = 2


def make_limits(**changes: object) -> Limits:
    values: dict[str, object] = {
        "num_layers": NUM_LAYERS,
        "num_device_pages": 12,
        "num_host_pages": 16,
        "page_size": 4,
        "host_page_size": 4,
        "watermark_pages": 1,
        "max_num_seqs": 8,
        "max_lanes": 4,
        "max_lane_rows": 3,
        "num_frames": 4,
        "max_copies_per_step": 3,
        "host_offload": "auto",
    }
    return Limits(**(values | changes))  # type: ignore[arg-type]


@dataclass
class World:
    """State plus what the outside knows: tokens still owed, tasks and copies under way."""

    limits: Limits
    chunk_tokens: int = 8
    state: State = field(init=False)
    remaining: dict[int, int] = field(default_factory=dict)
    produced: dict[int, int] = field(default_factory=dict)
    lane_progress: dict[int, int] = field(default_factory=dict)  # slot -> layers done, of a token in flight
    slot_request: dict[int, int] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)
    copies: dict[int, tuple[int, ...]] = field(default_factory=dict)  # id -> host pages
    slot_pages: dict[int, list[int]] = field(default_factory=dict)
    finished: list[int] = field(default_factory=list)
    lanes_unserved: int = 0  # what the next steps report while a lane is in flight
    next_id: int = 0

    def __post_init__(self) -> None:
        self.state = State(self.limits)
        if self.limits.host_offload != "never":
            self.state.host_started()
        self._watch_host_pages()
        self.cost = FixedBudget(self.chunk_tokens, self.limits.max_lane_rows)

    def add(self, prompt: int, output: int, best_effort: bool) -> int:
        request_id = self.next_id
        self.next_id += 1
        self.remaining[request_id] = output
        self.produced[request_id] = 0
        rank = 10 if best_effort else 0
        self.state.add(Request(request_id, rank, best_effort, prompt, output, prompt))
        return request_id

    def abort(self, request_id: int) -> None:
        self.state.abort(request_id)
        self.remaining.pop(request_id, None)
        self._cancel(*self.state.take_cancels())

    def lose_host(self) -> None:
        self.state.host_lost()
        self.lane_progress.clear()
        self.slot_request.clear()
        self.cancelled.clear()
        self.copies.clear()
        self._watch_host_pages()

    def host_pages_under_way(self) -> set[int]:
        """Host pages that a copy or a task in flight will read or write."""
        pages = {page for pages in self.copies.values() for page in pages}
        return pages | {page for slot in self.lane_progress for page in self.slot_pages[slot]}

    def _watch_host_pages(self) -> None:
        """From now on no page is handed out while a copy to or from it, or a task on it, is outstanding."""
        allocate = self.state.host.allocate

        def watched(count: int, near: int | None = None) -> list[int]:
            ids = allocate(count, near)
            assert not self.host_pages_under_way().intersection(ids), "a page under a copy or task is free"
            return ids

        self.state.host.allocate = watched  # type: ignore[method-assign]

    def _cancel(self, slots: tuple[int, ...], fetches: tuple[int, ...]) -> None:
        for slot in slots:
            assert slot in self.lane_progress, "only a slot in flight is cancelled"
            self.cancelled.add(slot)

    def step(self, host_serves: Callable[[str, int], bool] = lambda kind, key: True) -> bool:
        """One scheduler step; `host_serves(kind, id)` decides what the host gets done.

        False when there is nothing to do.
        """
        plan = schedule(self.state, 0.0, self.cost)
        if plan.is_empty and not self.lane_progress and not self.copies:
            return False
        step = self.state.commit(plan)
        self.state.check()
        result = self._carry_out(step, host_serves)
        for request in self.state.apply(step, result):
            self.finished.append(request.id)
        self._cancel(*self.state.take_cancels())
        self.state.check()
        return True

    def _carry_out(self, step: Step, host_serves: Callable[[str, int], bool]) -> StepResult:
        self._cancel(step.cancel_slots, step.cancel_fetches)
        total = sum(r.num_tokens for r in step.rows)
        assert total <= self.chunk_tokens, "a plan keeps its token budget"
        assert len(step.rows) <= self.limits.max_num_seqs
        assert len(step.lane_starts) <= self.limits.max_lane_rows
        for copy in (*step.copies_out, *step.copies_in):
            self.copies[copy.copy_id] = copy.host_pages
        assert len(self.copies) <= self.limits.num_frames, "copies need frames"
        tokens = [self._token(r.request_id, False) for r in step.rows if r.samples]
        for start in step.lane_starts:
            assert start.slot not in self.lane_progress, "one row in flight per lane"
            self.lane_progress[start.slot] = 0
            self.slot_request[start.slot] = start.request_id
            self.slot_pages.setdefault(start.slot, [])[start.first_page :] = start.new_pages
        drained = []
        for slot in sorted(self.lane_progress):
            if not host_serves("task", slot):
                continue
            if slot in self.cancelled:
                drained.append(slot)
                continue
            self.lane_progress[slot] += 1
            if self.lane_progress[slot] == self.limits.num_layers:
                tokens.append(self._token(self.slot_request[slot], True))
                del self.lane_progress[slot]
        for slot in drained:
            del self.lane_progress[slot]
            self.cancelled.discard(slot)
        arrived = [c for c in self.copies if host_serves("copy", c)]
        for copy_id in arrived:
            del self.copies[copy_id]
        staged = tuple(c.copy_id for c in step.copies_out)
        unserved = self.lanes_unserved if self.lane_progress else 0
        return StepResult(tuple(tokens), staged, tuple(arrived), tuple(drained), unserved)

    def _token(self, request_id: int, by_lane: bool) -> NewToken:
        self.remaining[request_id] -= 1
        self.produced[request_id] += 1
        is_last = self.remaining[request_id] == 0
        return NewToken(request_id, 7, by_lane, "length" if is_last else None)

    def phases(self) -> dict[int, Phase]:
        return {r.id: r.phase for r in self.state.requests.values()}

    def run(self, max_steps: int = 2000) -> None:
        """Steps with a host that serves everything, until every request has finished."""
        for _ in range(max_steps):
            if self.state.is_idle:
                break
            assert self.step() or not self.state.requests, f"standstill: {self.phases()}"
        assert self.state.is_idle, f"no end after {max_steps} steps: {self.phases()}"
        for _ in range(10):
            self.step()
