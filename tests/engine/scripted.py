"""An engine whose host does exactly what a test says, when it says so, also in the middle of a walk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor

from engine.driver import BE, Subject, assert_nothing_is_left, build_engine, executor_of
from omniserve.attention.cpu import CpuAttention, DeviceBatch
from omniserve.config import EngineConfig
from omniserve.engine.loop import StepOutput
from omniserve.engine.records import ChosenToken
from omniserve.host.scripted import ScriptedHost
from omniserve.policy.pages import PagePool
from omniserve.policy.plan import Step, StepResult
from omniserve.policy.request import Phase
from omniserve.types import SamplingParams, TokenLogprobs

MAX_STEPS = 3000


class InterruptedAttention:
    """Device attention that hands over to `during(layer)` when it is done: that is when the host works."""

    def __init__(self, attention: CpuAttention, during: Callable[[int], None]) -> None:
        self._attention = attention
        self._during = during
        self.store = attention.store

    def run(self, layer: int, batch: DeviceBatch, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        self._attention.run(layer, batch, q, k, v, out)
        self._during(layer)


@dataclass(slots=True)
class Asked:
    """A request and what came of it so far."""

    prompt: tuple[int, ...]
    max_tokens: int
    best_effort: bool
    tokens: list[int]
    is_aborted: bool = False
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None


class ScriptedEngine:
    """An engine, its scripted host, and every request ever asked of it.

    sampling: parameters of every request that does not say otherwise; greedy, without an end of text.
    during: called with the layer after the device attention of each layer of a walk.

    At every allocation it is asserted that no page handed out is still under a task or a copy that the host
    has not served: what lies in its queues is asked of the host itself.
    """

    def __init__(self, subject: Subject, host_partitions: int = 1, **config: Any) -> None:
        # Passes end when no row is ready, never by the clock: a script has the same effect every time.
        values = {"max_model_len": subject.max_model_len, "pass_budget_s": 1e6, "host_threads": 1} | config
        self.subject = subject
        self.config = EngineConfig(**values)
        self.engine = build_engine(
            subject, self.config, lambda geometry, *_: ScriptedHost(geometry), host_partitions
        )
        assert isinstance(self.engine.host, ScriptedHost)
        self.host = self.engine.host
        self.asked: dict[int, Asked] = {}
        self.sampling: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
        self.during: Callable[[int], None] = lambda layer: None
        self.executor = executor_of(self.engine)
        interrupted = InterruptedAttention(self.executor.attention, self._interrupt)
        self.executor.attention = cast("CpuAttention", interrupted)
        self._copy_pages: dict[int, tuple[int, ...]] = {}
        self._lane_pages: dict[int, list[int]] = {}
        self._launch = self.executor.launch
        self.executor.launch = self._note_and_launch  # type: ignore[method-assign]
        self.step()  # takes note of the host

    # ------------------------------------------------------------ pages under way

    def _note_and_launch(self, step: Step) -> StepResult:
        for copy in (*step.copies_out, *step.copies_in):
            self._copy_pages[copy.copy_id] = copy.host_pages
        for start in step.lane_starts:
            known = self._lane_pages.setdefault(start.slot, [])
            known[start.first_page :] = start.new_pages
        return self._launch(step)

    def pages_under_way(self) -> set[int]:
        """Host pages that a task or a copy in the host's queues will read or write."""
        pages = {p for copy_id in self.host.workers.pending_copies() for p in self._copy_pages[copy_id]}
        return pages | {p for _, slot in self.host.pending() for p in self._lane_pages[slot]}

    def _watch(self, pool: PagePool) -> None:
        allocate = pool.allocate

        def watched(count: int, near: int | None = None, keep: int = 0) -> list[int]:
            ids = allocate(count, near, keep)
            assert not self.pages_under_way().intersection(ids), "a page is handed out under a task or a copy"
            return ids

        pool.allocate = watched  # type: ignore[method-assign]

    def _interrupt(self, layer: int) -> None:
        self.during(layer)

    # ------------------------------------------------------------ what a script can do

    def add(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        service_class: str,
        cache_salt: str | None = None,
        **sampling: Any,
    ) -> int:
        """Raises RequestError like the engine."""
        sampling = self.sampling | sampling
        bad_words = sampling.pop("bad_word_ids", ())
        params = SamplingParams(max_tokens=max_tokens, **sampling)
        request_id = self.engine.add(prompt, params, service_class, bad_words, cache_salt)
        self.asked[request_id] = Asked(tuple(prompt), max_tokens, service_class == BE, [])
        return request_id

    def step(self) -> StepOutput:
        if "allocate" not in vars(self.engine.state.host):  # a host that was lost leaves a new pool
            self._watch(self.engine.state.host)
        decoding = {r.id for r in self.engine.state.in_phase(Phase.DEVICE)}
        output = self.engine.step()
        self.engine.state.check()
        for token in output.tokens:
            asked = self.asked[token.request_id]
            assert not asked.is_aborted, "a token of a request that was given up"
            if self.config.host_offload == "always" and asked.best_effort:
                assert token.by_lane or token.request_id not in decoding, "decoded on the device"
            asked.tokens.append(token.token_id)
            assert isinstance(token, ChosenToken)
            if token.logprobs is not None:
                asked.logprobs.append(token.logprobs)
            if token.prompt_logprobs is not None:
                assert len(asked.tokens) == 1, "they come with the first token, and once"
                asked.prompt_logprobs = token.prompt_logprobs
        return output

    def abort(self, request_id: int) -> None:
        asked = self.asked[request_id]
        is_running = len(asked.tokens) < asked.max_tokens and not asked.is_aborted
        assert self.engine.abort(request_id) == is_running
        asked.is_aborted = asked.is_aborted or is_running

    def serve(self, index: int) -> None:
        """Serve one pending task, the index-th of them, counted round."""
        pending = self.host.pending()
        if pending:
            self.host.serve(pending[index % len(pending)][1])

    def serve_copy(self, index: int) -> None:
        pending = self.host.workers.pending_copies()
        if pending:
            self.host.workers.serve_copy(pending[index % len(pending)])

    @property
    def running(self) -> list[int]:
        return sorted(self.engine.state.requests)

    # ------------------------------------------------------------ what must hold in the end

    def finish(self) -> None:
        """Serve everything from now on, until every request has ended and every page is free."""
        for _ in range(MAX_STEPS):
            if self.engine.is_idle and not self.engine.state.waits_for_host:
                break
            self.host.serve_all()
            self.step()
        requests = list(self.engine.state.requests.values())
        assert not requests, f"no end after {MAX_STEPS} steps: {requests}"
        assert_nothing_is_left(self.engine)

    def assert_exact(self) -> None:
        """All texts are the reference's, those of aborted requests as far as they went; nobody waited."""
        for asked in self.asked.values():
            if asked.tokens:
                self.subject.reference.check(asked.prompt, asked.tokens)
            assert asked.is_aborted or len(asked.tokens) == asked.max_tokens
        assert self.executor.counters.device_wait_s == 0

    def close(self) -> None:
        self.engine.close()
