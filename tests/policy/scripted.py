"""A stand-in for device and host: it answers steps from integers alone, in an order a script chooses.

Every page has content: at each offset, which text the token there ends. A row may only attend to its own
text, and only writes to pages that nobody else has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from omniserve.engine.page_hashes import PageHashes
from omniserve.policy.budget import FixedBudget, Policy
from omniserve.policy.pages import PagePool
from omniserve.policy.plan import DeviceRows, NewToken, PageCopy, Plan, Step, StepResult
from omniserve.policy.request import Limits, Phase, Request
from omniserve.policy.scheduler import schedule
from omniserve.policy.state import State
from omniserve.types import SLO

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


class Memory:
    """What the pages of one pool hold."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self._content: dict[tuple[int, int], int] = {}

    def _place(self, pages: Sequence[int], position: int) -> tuple[int, int]:
        return pages[position // self.pool.page_size], position % self.pool.page_size

    def read(self, pages: Sequence[int], first: int, last: int) -> list[int | None]:
        """Content at positions first..last-1 of a page table."""
        return [self._content.get(self._place(pages, p)) for p in range(first, last)]

    def write(self, pages: Sequence[int], first: int, content: Sequence[int | None]) -> None:
        for position, value in enumerate(content, first):
            page, offset = self._place(pages, position)
            assert self.pool.hash_of(page) is None, "a known page is read-only"
            assert self.pool.references(page) <= 1, "a shared page is read-only"
            assert value is not None, "something is copied that was never written"
            self._content[page, offset] = value


@dataclass
class LaneTask:
    """A lane's token in flight."""

    request_id: int
    position: int
    layers_done: int = 0


@dataclass
class World:
    """State plus what the outside knows: texts, tokens still owed, tasks and copies under way.

    policy: None for a fixed budget of `chunk_tokens`. A step takes as long as its plan expects, on `now`.
    """

    limits: Limits
    chunk_tokens: int = 8
    caches_prefixes: bool = True
    policy: Policy | None = None
    state: State = field(init=False)
    remaining: dict[int, int] = field(default_factory=dict)
    produced: dict[int, int] = field(default_factory=dict)
    texts: dict[int, list[int]] = field(default_factory=dict)
    salts: dict[int, str | None] = field(default_factory=dict)
    lanes: dict[int, LaneTask] = field(default_factory=dict)  # by slot
    cancelled: set[int] = field(default_factory=set)
    cancelled_fetches: set[int] = field(default_factory=set)
    copies: dict[int, PageCopy] = field(default_factory=dict)
    slot_pages: dict[int, list[int]] = field(default_factory=dict)
    finished: list[int] = field(default_factory=list)
    lanes_unserved: int = 0  # what the next steps report while a lane is in flight
    next_id: int = 0
    now: float = 0.0
    plans: list[Plan] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state = State(self.limits)
        if self.limits.host_offload != "never":
            self.state.host_started()
        self.cost: Policy = self.policy or FixedBudget(self.chunk_tokens, self.limits.max_lane_rows)
        self.device = Memory(self.state.device)
        self._new_host()
        self._hashes: dict[int, tuple[PageHashes, PageHashes]] = {}
        self._frames: dict[int, list[int | None]] = {}  # content of copies on their way to the host
        self._ends: dict[tuple[object, int], int] = {}  # (end of the text before, token) -> end of the text

    def add(
        self,
        prompt: int | Sequence[int],
        output: int,
        best_effort: bool,
        salt: str | None = None,
        slo: SLO | None = None,
    ) -> int:
        """A request; a prompt given by its length begins like no other."""
        request_id = self.next_id
        self.next_id += 1
        text = [1000 + request_id] * prompt if isinstance(prompt, int) else list(prompt)
        self.texts[request_id] = text
        self.salts[request_id] = salt
        self.remaining[request_id] = output
        self.produced[request_id] = 0
        rank = 10 if best_effort else 0
        request = Request(
            request_id, rank, best_effort, len(text), output, len(text), slo=slo, arrival_s=self.now
        )
        sizes = (self.limits.page_size, self.limits.host_page_size)
        self._hashes[request_id] = (PageHashes(sizes[0], salt), PageHashes(sizes[1], salt))
        self._extend_hashes(request, text)
        self.state.note_arrival(request, self.now)
        self.state.add(request)
        return request_id

    def _extend_hashes(self, request: Request, tokens: Sequence[int]) -> None:
        if self.caches_prefixes:
            device, host = self._hashes[request.id]
            request.device_hashes += device.extend(tokens)
            request.host_hashes += host.extend(tokens)

    def abort(self, request_id: int) -> None:
        self.state.abort(request_id)
        self.remaining.pop(request_id, None)
        self._cancel(*self.state.take_cancels())

    def lose_host(self) -> None:
        self.state.host_lost()
        self.lanes.clear()
        self.cancelled.clear()
        self.copies.clear()
        self._new_host()

    def _new_host(self) -> None:
        self.host = Memory(self.state.host)
        self._watch_host_pages()

    def host_pages_under_way(self) -> set[int]:
        """Host pages that a copy or a task in flight will read or write."""
        pages = {page for copy in self.copies.values() for page in copy.host_pages}
        return pages | {page for slot in self.lanes for page in self.slot_pages[slot]}

    def _watch_host_pages(self) -> None:
        """From now on no page is handed out while a copy to or from it, or a task on it, is outstanding."""
        allocate = self.state.host.allocate

        def watched(count: int, near: int | None = None, keep: int = 0) -> list[int]:
            ids = allocate(count, near, keep)
            assert not self.host_pages_under_way().intersection(ids), "a page under a copy or task is free"
            return ids

        self.state.host.allocate = watched  # type: ignore[method-assign]

    def _cancel(self, slots: tuple[int, ...], fetches: tuple[int, ...]) -> None:
        for slot in slots:
            assert slot in self.lanes, "only a slot in flight is cancelled"
            self.cancelled.add(slot)
        self.cancelled_fetches |= set(fetches)

    # ------------------------------------------------------------ steps

    def step(self, host_serves: Callable[[str, int], bool] = lambda kind, key: True) -> bool:
        """One scheduler step; `host_serves(kind, id)` decides what the host gets done.

        False when there is nothing to do.
        """
        plan = schedule(self.state, self.now, self.cost)
        if plan.is_empty and not self.lanes and not self.copies:
            return False
        step = self.state.commit(plan, self.now)
        self.state.check()
        result = self._carry_out(step, host_serves)
        self.now += plan.why.predicted_s if plan.why is not None else 0.0
        self.plans.append(plan)
        requests = dict(self.state.requests)
        for request in self.state.apply(step, result, self.now):
            self.finished.append(request.id)
        for token in result.tokens:
            self._extend_hashes(requests[token.request_id], [token.token_id])
        self._cancel(*self.state.take_cancels())
        self.state.check()
        return True

    def _carry_out(self, step: Step, host_serves: Callable[[str, int], bool]) -> StepResult:
        self._cancel(step.cancel_slots, step.cancel_fetches)
        total = sum(r.num_tokens for r in step.rows)
        if self.policy is None:
            assert total <= self.chunk_tokens, "a plan keeps its token budget"
        assert len(step.rows) <= self.limits.max_num_seqs
        assert len(step.lane_starts) <= self.limits.max_lane_rows
        for copy in step.copies_out:
            end = copy.device_offset + copy.num_tokens
            self._frames[copy.copy_id] = self.device.read([copy.device_page], copy.device_offset, end)
        for copy in (*step.copies_out, *step.copies_in):
            self.copies[copy.copy_id] = copy
        assert len(self.copies) <= self.limits.num_frames, "copies need frames"
        for rows in step.rows:
            self._device_rows(rows)
        tokens = [self._token(r.request_id, False) for r in step.rows if r.samples]
        for start in step.lane_starts:
            assert start.slot not in self.lanes, "one row in flight per lane"
            self.lanes[start.slot] = LaneTask(start.request_id, start.position)
            self.slot_pages.setdefault(start.slot, [])[start.first_page :] = start.new_pages
        drained = []
        for slot in sorted(self.lanes):
            if not host_serves("task", slot):
                continue
            if slot in self.cancelled:
                drained.append(slot)
            elif self._serve_lane(slot):
                tokens.append(self._token(self.lanes.pop(slot).request_id, True))
        for slot in drained:
            del self.lanes[slot]
            self.cancelled.discard(slot)
        arrived = [c for c in self.copies if host_serves("copy", c)]
        for copy_id in arrived:
            self._arrive(self.copies.pop(copy_id))
        staged = tuple(c.copy_id for c in step.copies_out)
        unserved = self.lanes_unserved if self.lanes else 0
        return StepResult(tuple(tokens), staged, tuple(arrived), tuple(drained), unserved)

    # ------------------------------------------------------------ content

    def _text_ends(self, request_id: int, num_tokens: int) -> list[int]:
        """What the KV of a request's first tokens holds: each value stands for the text up to there."""
        end: object = self.salts[request_id]
        ends = []
        for token in self.texts[request_id][:num_tokens]:
            end = self._ends.setdefault((end, token), len(self._ends))
            ends.append(end)
        return ends

    def _device_rows(self, rows: DeviceRows) -> None:
        end = rows.start + rows.num_tokens
        ends = self._text_ends(rows.request_id, end)
        assert self.device.read(rows.pages, 0, rows.start) == ends[: rows.start], "attends to another text"
        self.device.write(rows.pages, rows.start, ends[rows.start :])

    def _serve_lane(self, slot: int) -> bool:
        """One layer of a lane's token; True when it was the last one."""
        lane, pages = self.lanes[slot], self.slot_pages[slot]
        ends = self._text_ends(lane.request_id, lane.position + 1)
        assert self.host.read(pages, 0, lane.position) == ends[:-1], "a lane attends to another text"
        self.host.write(pages, lane.position, ends[-1:])
        lane.layers_done += 1
        return lane.layers_done == self.limits.num_layers

    def _arrive(self, copy: PageCopy) -> None:
        if copy.copy_id in self._frames:
            self.host.write(copy.host_pages, copy.host_offset, self._frames.pop(copy.copy_id))
            return
        content = self.host.read(copy.host_pages, copy.host_offset, copy.host_offset + copy.num_tokens)
        if copy.copy_id not in self.cancelled_fetches:
            self.device.write([copy.device_page], copy.device_offset, content)

    def _token(self, request_id: int, by_lane: bool) -> NewToken:
        """The next token follows from the text alone."""
        self.remaining[request_id] -= 1
        self.produced[request_id] += 1
        text = self.texts[request_id]
        text.append(sum(text) % 2)
        is_last = self.remaining[request_id] == 0
        return NewToken(request_id, text[-1], by_lane, "length" if is_last else None)

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
