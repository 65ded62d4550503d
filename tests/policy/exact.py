"""ExactModel: a prediction by a formula anyone can check, and states drawn in a few words."""

from __future__ import annotations

from dataclasses import dataclass

from omniserve.policy.latency import Prediction, WalkLoad
from omniserve.policy.request import HostHold, Limits, Phase, Request
from omniserve.policy.slo import SloPolicy
from omniserve.policy.state import State
from omniserve.policy.terms import Terms
from omniserve.types import SLO
from policy.scripted import make_limits

CHAT = SLO(ttft_s=1.0, tpot_s=0.1)


@dataclass(frozen=True)
class ExactModel:
    """Seconds: so much for a walk, a row, a token of context, a unit of prefill load, a lane row, a decode.

    The bound adds `margin`; a streaming host makes everything slower by `host_slowdown`.
    """

    walk: float = 0.01
    row: float = 0.001
    context: float = 0.0
    prefill: float = 0.0
    lane_row: float = 0.0005
    copied: float = 0.0
    margin: float = 0.0
    host_slowdown: float = 0.0
    host_row: float = 0.0001
    host_byte: float = 0.0
    copy: float = 0.001
    sample: float = 0.0
    chunk: float = 0.0
    context_read: float = 0.0
    host_share: float = 0.0
    decode: float = 0.0

    def observe(
        self,
        load: WalkLoad,
        host_is_busy: float,
        seconds: float,
        planned: tuple[WalkLoad, float] | None = None,
    ) -> float:
        """It has nothing to learn."""
        return self.walk_s(load, host_is_busy)

    def accuracy(self) -> dict[str, dict[str, float]]:
        return {}

    def walk_s(self, load: WalkLoad, host_is_busy: float) -> float:
        seconds = (
            self.walk
            + self.row * load.num_tokens
            + self.decode * load.num_decodes
            + self.context * load.decode_context
            + self.prefill * load.prefill_load
            + self.lane_row * load.lane_rows
            + self.copied * load.copied_tokens
            + self.sample * load.num_samples
            + self.chunk * load.num_chunks
            + self.context_read * load.chunk_context
        )
        return seconds * (1 + self.host_slowdown * host_is_busy)

    def bound_s(self, load: WalkLoad, host_is_busy: float) -> float:
        return self.walk_s(load, host_is_busy) * (1 + self.margin)

    def pass_s(self, num_rows: int, host_is_busy: float) -> float:
        return self.lane_row * num_rows

    def host_attention_s(self, kv_bytes: int) -> float:
        return self.host_row + self.host_byte * kv_bytes

    def copy_s(self, num_bytes: int) -> float:
        return self.copy if num_bytes else 0.0


def make_terms(**changes: float) -> Terms:
    values = {
        "max_num_batched_tokens": 256,
        "max_lane_rows": 8,
        "pass_budget_s": 0.05,
        "walk_bound_s": 0.25,
        "kv_token_bytes": 16,
    }
    return Terms(**(values | changes))  # type: ignore[arg-type]


def make_policy(model: Prediction | None = None, **terms: float) -> SloPolicy:
    return SloPolicy(model or ExactModel(), make_terms(**terms))


def roomy(**changes: object) -> Limits:
    """Memory and rows for everybody, so that only time is short."""
    values: dict[str, object] = {
        "num_device_pages": 4000,
        "num_host_pages": 4000,
        "page_size": 16,
        "host_page_size": 16,
        "max_num_seqs": 256,
        "max_lanes": 512,
        "max_lane_rows": 8,
        "watermark_pages": 4,
    }
    return make_limits(**(values | changes))


class Scene:
    """A State put together by hand: requests in the phases a story needs."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.state = State(limits or roomy())
        if self.state.limits.host_offload != "never":
            self.state.host_started()
        self.state.last_walk_s = 0.0  # predictions are fresh
        self._next_id = 0

    def _request(
        self,
        prompt: int,
        out: int,
        best_effort: bool,
        slo: SLO | None,
        arrival_s: float,
        priority: int = 0,
    ) -> Request:
        request = Request(
            self._next_id,
            10 if best_effort else 0,
            best_effort,
            prompt,
            200,
            prompt + out,
            service_class="batch" if best_effort else "chat",
            priority=priority,
            slo=slo,
            arrival_s=arrival_s,
        )
        self._next_id += 1
        return request

    def waiting(
        self,
        prompt: int,
        best_effort: bool = False,
        slo: SLO | None = CHAT,
        arrival_s: float = 0.0,
        priority: int = 0,
    ) -> Request:
        own = None if best_effort else slo
        request = self._request(prompt, 0, best_effort, own, arrival_s, priority)
        self.state.add(request)
        return request

    def newcomer(self, prompt: int, slo: SLO | None = CHAT, arrival_s: float = 0.0) -> Request:
        """Not part of the state yet."""
        return self._request(prompt, 0, False, slo, arrival_s)

    def prefilling(self, prompt: int, done: int, best_effort: bool = False, **timing: object) -> Request:
        request = self.waiting(prompt, best_effort, **timing)  # type: ignore[arg-type]
        self._take_device_pages(request, prompt + 1)
        request.kv_tokens = done
        self._enter(request, Phase.PREFILL)
        return request

    def decoding(
        self,
        prompt: int,
        out: int = 1,
        best_effort: bool = False,
        slo: SLO | None = CHAT,
        last_token_s: float = 0.0,
        first_token_s: float | None = None,
    ) -> Request:
        request = self._request(prompt, out, best_effort, None if best_effort else slo, 0.0)
        self.state.add(request)
        request.kv_tokens = request.num_tokens - 1
        self._take_device_pages(request, request.kv_tokens)
        request.last_token_s = last_token_s
        request.first_token_s = last_token_s if first_token_s is None else first_token_s
        self._enter(request, Phase.DEVICE)
        return request

    def mirrored(self, prompt: int, **timing: object) -> Request:
        """It decodes on the device, and the host has copies of its full pages."""
        request = self.decoding(prompt, **timing)  # type: ignore[arg-type]
        size = self.state.limits.page_size
        copied = request.kv_tokens - request.kv_tokens % size
        pages = self.state.host.allocate(self.state.host.pages_for(copied))
        request.host = HostHold(pages, copied_tokens=copied)
        return request

    def lane(self, prompt: int, out: int = 1, in_flight: bool = False) -> Request:
        state = self.state
        request = self._request(prompt, out, True, None, 0.0)
        state.add(request)
        request.kv_tokens = request.num_tokens - 1
        request.first_token_s = request.last_token_s = 0.0
        pages = state.host.allocate(state.host.pages_for(request.num_tokens + 1))
        slot = state.free_slots.pop()
        request.host = HostHold(pages, slot, copied_tokens=request.kv_tokens, in_flight=in_flight)
        self._enter(request, Phase.LANE)
        return request

    def _take_device_pages(self, request: Request, num_tokens: int) -> None:
        request.device_pages += self.state.device.allocate(self.state.device.pages_for(num_tokens))

    def _enter(self, request: Request, phase: Phase) -> None:
        self.state.active[request.id] = request
        self.state._enter(request, phase)
