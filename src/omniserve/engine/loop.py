"""Engine: one step at a time from requests to tokens. Knows token ids, never text; owns no process."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from omniserve.config import EngineConfig, Quantization
from omniserve.engine.acceptance import Acceptance, check_cache_salt, check_service
from omniserve.engine.choosing import make_chooser
from omniserve.engine.executor import Executor
from omniserve.engine.facts import host_facts, state_facts
from omniserve.engine.history import History
from omniserve.engine.page_hashes import PageHashes
from omniserve.engine.records import Record
from omniserve.engine.refusal import refusal_of, refusal_text
from omniserve.engine.sharing import Sharing, paid_s
from omniserve.errors import SloUnattainableError
from omniserve.host.supervisor import Host
from omniserve.policy.budget import Policy
from omniserve.policy.latency import LearningPrediction
from omniserve.policy.latency_model import load_of
from omniserve.policy.plan import DeviceRows, NewToken, Plan, Step, StepResult
from omniserve.policy.request import Limits, Request
from omniserve.policy.scheduler import schedule
from omniserve.policy.state import State
from omniserve.seeds import derive_seed
from omniserve.types import SLO, SamplingParams, ServiceClass

# Longest sleep without any event: a net under lost wake-ups, not a polling interval.
MAX_SLEEP_S = 1.0

LANE_STATS = (
    "lane_entries",
    "same_iteration_entries",
    "cancelled_rows",
    "landed_pages",
    "fetched_pages",
    "host_busy_s",
    "host_kv_bytes_read",
)


@dataclass(slots=True)
class StepOutput:
    """New tokens of one step. was_idle: nothing could be done; the engine may sleep.

    num_cached: prompt tokens found in the prefix cache, by request, for those with a token. started_s: when
    the prefill began, by request, for those with their first token.
    """

    tokens: list[NewToken] = field(default_factory=list)
    num_cached: dict[int, int] = field(default_factory=dict)
    started_s: dict[int, float] = field(default_factory=dict)
    was_idle: bool = False


class Engine:
    """Requests in, tokens out. `step()` does one plan; `sleep()` waits for the next reason to act."""

    def __init__(
        self,
        executor: Executor,
        host: Host | None,
        limits: Limits,
        policy: Policy,
        acceptance: Acceptance,
        config: EngineConfig,
        host_threads: int = 1,
        host_kv_dtype: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        quantization: Quantization = "none",
        latency: LearningPrediction | None = None,
    ) -> None:
        """latency: what walks cost on this machine, learned from every walk; None: uncalibrated."""
        self.executor = executor
        self.host = host
        self.policy = policy
        self.latency = latency
        self.acceptance = acceptance
        self.config = config
        self.history = History()
        self.sharing = Sharing()
        self._host_threads = max(1, host_threads)
        self._host_kv_dtype = host_kv_dtype
        self._quantization = quantization
        self.state = State(limits)
        self._clock = clock
        self._hashes: dict[int, tuple[PageHashes, PageHashes]] = {}  # of device and host pages, by request
        self._next_id = 0
        self._started_s = clock()
        self._host_deaths = 0
        executor.host_is_gone = self._host_is_gone

    # ------------------------------------------------------------ requests

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        service_class: str,
        bad_words: Sequence[Sequence[int]] = (),
        cache_salt: str | None = None,
        slo: SLO | None = None,
        arrived_s: float | None = None,
        completion_window_s: float | None = None,
        priority: int = 0,
    ) -> int:
        """Accept a request for one text (`params.n` is the caller's affair); returns its id.

        bad_words: those of the parameters as token ids. cache_salt: requests share cached prefixes only with
        those of the same salt. slo, completion_window_s: as for AsyncLLM.submit. arrived_s: when it arrived,
        on the engine's clock; None: now. Raises RequestError naming the field and the limit, and
        SloUnattainableError when its targets, or those of others beside it, cannot be held.
        """
        kind = check_service(self.config, service_class, slo, completion_window_s)
        self.acceptance.check(prompt, params, bad_words)
        check_cache_salt(cache_salt)
        max_tokens = self.acceptance.max_tokens(prompt, params)
        sizes = len(prompt), max_tokens
        request = self._new_request(kind, *sizes, slo, arrived_s, priority, completion_window_s)
        request_id = request.id
        # Prompt logprobs need the logits of every prompt token: such a prompt takes nothing from the cache.
        if self.config.enable_prefix_caching and params.prompt_logprobs is None:
            sizes = (self.state.limits.page_size, self.state.limits.host_page_size)
            device, host = (PageHashes(size, cache_salt) for size in sizes)
            self._hashes[request_id] = device, host
            self._extend_hashes(request, prompt)
        self.state.note_arrival(request, self._clock())
        self._refuse_unattainable(request)
        seed = derive_seed(self.config.seed, request_id + 1) if params.seed is None else params.seed
        self.executor.add(
            Record(
                request_id,
                list(prompt),
                len(prompt),
                max_tokens,
                make_chooser(self.acceptance, prompt, params, bad_words, seed),
                self.acceptance.stop_ids(params),
                params.prompt_logprobs,
            )
        )
        self.state.add(request)
        return request_id

    def check_arrival(
        self,
        num_prompt: int,
        max_tokens: int | None,
        service_class: str,
        slo: SLO | None = None,
        arrived_s: float | None = None,
        priority: int = 0,
    ) -> None:
        """Raise SloUnattainableError for a request that `add` would refuse whatever its prompt is.

        Before anybody has looked at the prompt: `num_prompt` tokens are the fewest that it can have.
        max_tokens: None: not known.
        """
        kind = check_service(self.config, service_class, slo, None)
        if self.config.enable_prefix_caching:
            num_prompt = 1  # all but the last of them may be there already
        request = self._new_request(kind, num_prompt, max_tokens or 1, slo, arrived_s, priority)
        self._refuse_unattainable(request, is_least=True)

    def _new_request(
        self,
        kind: ServiceClass,
        num_prompt: int,
        max_tokens: int,
        slo: SLO | None,
        arrived_s: float | None,
        priority: int,
        window_s: float | None = None,
    ) -> Request:
        """With a number of its own, which it keeps if it is refused."""
        request_id, self._next_id = self._next_id, self._next_id + 1
        arrived_s = self._clock() if arrived_s is None else arrived_s
        return Request(
            request_id,
            kind.rank,
            kind.best_effort,
            num_prompt,
            max_tokens,
            num_prompt,
            service_class=kind.name,
            slo=kind.slo_of(slo),
            arrival_s=arrived_s,
            deadline_s=None if window_s is None else arrived_s + window_s,
            priority=priority,
        )

    def _refuse_unattainable(self, request: Request, is_least: bool = False) -> None:
        """Raise SloUnattainableError, and remember it, when admission says no.

        is_least: the prompt may be longer, and what is not refused for sure is not refused.
        """
        if self.config.admission == "off":
            return
        now = self._clock()
        verdict = self.policy.admit(self.state, request, now)
        if verdict.obstacle is None or (is_least and not verdict.refuses_longer):
            return
        if is_least:  # the others were noted before
            self.state.arrivals.note(request, now, num_tokens=None)
        self._hashes.pop(request.id, None)
        refusal = refusal_of(verdict, request, now)
        self.history.note_refusal(refusal)
        raise SloUnattainableError(refusal_text(verdict), refusal.predicted_ttft_s, refusal.target_ttft_s)

    def _extend_hashes(self, request: Request, tokens: Sequence[int]) -> None:
        if request.id in self._hashes:
            device, host = self._hashes[request.id]
            request.device_hashes += device.extend(tokens)
            if request.best_effort:  # others never move to the host
                request.host_hashes += host.extend(tokens)

    def abort(self, request_id: int) -> bool:
        """Forget a request; its device pages are free now. False when it has already ended."""
        known = self.state.abort(request_id)
        self._hashes.pop(request_id, None)
        self.executor.remove(request_id)
        self.executor.cancel(*self.state.take_cancels())
        return known

    @property
    def is_idle(self) -> bool:
        return self.state.is_idle

    # ------------------------------------------------------------ steps

    def step(self) -> StepOutput:
        """Decide and carry out one plan; empty when nothing can be done now."""
        began, host_busy_s = self._clock(), self._host_busy_s()
        self._heed_host()
        now = self._clock()
        plan = schedule(self.state, now, self.policy)
        if plan.is_empty and not self.executor.has_ready_lanes():
            news = self.executor.acknowledgements()
            self.state.apply_acknowledgements(news)
            return StepOutput(was_idle=not (news.arrived or news.drained))
        self.history.note_plan(now, plan)
        step = self.state.commit(plan, now)
        chats = [] if self.latency is None else self._chats(step)  # some of them end with the step
        result = self.executor.collect(self.executor.launch(step))
        finished = self.state.apply(step, result, self._clock())
        output = self._output(result, finished)
        if step.kind == "walk":
            self._learn(plan, step, chats, result, self._host_busy_s() - host_busy_s, self._clock() - began)
        return output

    def _chats(self, step: Step) -> list[DeviceRows]:
        """The latency-sensitive rows of a step."""
        return [rows for rows in step.rows if not self.state.active[rows.request_id].best_effort]

    def _host_busy_s(self) -> float:
        """Of all host workers so far; 0 when nobody wants to know."""
        return 0.0 if self.latency is None else self.executor.lane_stats().get("host_busy_s", 0.0)

    def _learn(
        self,
        plan: Plan,
        step: Step,
        chats: list[DeviceRows],
        result: StepResult,
        host_busy_s: float,
        seconds: float,
    ) -> None:
        """What ran is what the time is compared with, and what was planned, as far as the margin goes.

        chats: rows of the step that are latency-sensitive. host_busy_s: of all host workers during the walk.
        A walk that took no time teaches nothing.
        """
        if self.latency is None or seconds <= 0:
            return
        share = min(1.0, max(0.0, host_busy_s / (seconds * self._host_threads)))
        num_lane_tokens = sum(token.by_lane for token in result.tokens)
        planned = None if plan.why is None else (plan.why.load, plan.why.host_is_busy)
        load = load_of(step, result.lane_rows, num_lane_tokens)
        self.sharing.paid_s += paid_s(self.latency, step, load, share, chats)
        self.latency.observe(load, share, seconds, planned)

    def _output(self, result: StepResult, finished: list[Request]) -> StepOutput:
        ended = {request.id: request for request in finished}
        output = StepOutput(tokens=list(result.tokens))
        for token in result.tokens:
            request = ended.get(token.request_id) or self.state.requests[token.request_id]
            self._extend_hashes(request, (token.token_id,))
            if request.best_effort:
                self.sharing.note_token(token.by_lane)
            output.num_cached[request.id] = min(request.num_cached_tokens or 0, request.num_prompt)
            if request.num_out == 1 and request.started_s is not None:
                output.started_s[request.id] = request.started_s
        for request in finished:
            self.executor.remove(request.id)
            self._hashes.pop(request.id, None)
        if finished:
            self.executor.cancel(*self.state.take_cancels())
        return output

    def sleep(self, extra_fds: Sequence[int] = (), timeout_s: float = MAX_SLEEP_S) -> None:
        """Wait for one event: a completion or copy of the host, news about the host, or `extra_fds`."""
        began = self._clock()
        fds = list(extra_fds)
        if self.executor.arm():
            return
        fds += [] if self.host is None else self.host.wait_fds()
        try:
            select.select(fds, [], [], timeout_s)
        finally:
            self.executor.disarm()
        if self.state.waits_for_host:
            self.executor.counters.starved_s += self._clock() - began

    # ------------------------------------------------------------ host

    def _heed_host(self) -> None:
        event = self.host.poll() if self.host is not None else None
        if event is None:
            return
        assert self.host is not None
        if event == "started":
            self.executor.attach(self.host.segment)
            self.state.host_started()
            return
        self._host_deaths += 1
        self.executor.detach()
        self.state.host_lost(failed_for_good=event == "failed")

    def _host_is_gone(self) -> bool:
        """Asked by a device that waits for lanes: whether there is news about the host to heed first."""
        if self.host is None:
            return True
        readable, _, _ = select.select(self.host.wait_fds()[:1], [], [], 0)
        return bool(readable)

    # ------------------------------------------------------------ facts

    def is_exact(self, by_lane: bool) -> bool:
        """Whether a token comes from nothing that was rounded: neither weights nor, by a lane, KV."""
        return self._quantization == "none" and not (by_lane and self.state.limits.host_kv_is_lossy)

    def stats(self) -> dict[str, Any]:
        """Counters and gauges as plain data. Seconds, pages, tokens; see docs/design.md for each name."""
        now, state = self._clock(), self.state
        elapsed = max(now - self._started_s, 1e-9)
        stats: dict[str, Any] = dict(asdict(self.executor.counters))
        stats["num_lane_tokens"] = stats.pop("lane_tokens")
        lanes = self.executor.lane_stats()
        stats |= {name: lanes.get(name, 0) for name in LANE_STATS}
        stats["host_busy_share"] = lanes.get("host_busy_s", 0) / (elapsed * self._host_threads)
        for name in ("num_dropped", "num_displaced", "num_swapped_in", "num_broken_promises"):
            stats[name] = getattr(state, name)
        stats |= state_facts(state, now) | host_facts(self.host, state)
        stats["host_deaths"] = self._host_deaths
        stats["host_kv_dtype"] = self._host_kv_dtype
        stats["quantization"] = self._quantization
        stats["harvested_lane_tokens"] = self.sharing.lane_tokens
        stats["harvested_device_tokens"] = self.sharing.device_tokens
        stats["cost_model"] = "uncalibrated" if self.latency is None else "calibrated"
        stats["prediction"] = {} if self.latency is None else self.latency.accuracy()
        stats["slots"] = {"total": state.limits.max_lanes, "free": len(state.free_slots)}
        stats["latency_sensitive_paid_s"] = None if self.latency is None else self.sharing.paid_s
        stats["slack_s"] = self.history.slack_s()
        stats["policy"] = self.policy.rules.name
        stats["promises_slo"] = self.policy.promises_slo
        stats["num_refused"] = self.history.num_refused
        stats["uptime_s"] = elapsed
        return stats

    def explain(self) -> dict[str, Any]:
        """Why the last plans are as they are, and the last refusals, oldest first; see docs/policy.md."""
        return self.history.as_plain()

    def close(self) -> None:
        if self.host is not None:
            self.host.close()
