"""The values users hand in and get back. Plain data, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from omniserve.errors import RequestError
from omniserve.sampling_params import SamplingParams

__all__ = [
    "BEST_EFFORT",
    "DEFAULT_CLASSES",
    "LATENCY_SENSITIVE",
    "SLO",
    "CompletionOutput",
    "FinishReason",
    "Logprob",
    "Prompt",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "ServiceClass",
    "TokenLogprobs",
    "service_class_named",
]

FinishReason = Literal["stop", "length", "abort"]
Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class SLO:
    """Targets of a service class or a request, in seconds: time to first token, time per later token.

    The first counts from arrival at the API; the second is the mean over all later tokens of a request.
    """

    ttft_s: float
    tpot_s: float

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not (value > 0 and math.isfinite(value)):
                raise RequestError("slo", f"{name} must be a number of seconds above 0, got {value!r}")

    def is_within(self, tightest: SLO | None, loosest: SLO | None) -> bool:
        """Whether neither target is tighter than the one or looser than the other (None: no bound)."""
        is_tight = tightest is not None and (self.ttft_s < tightest.ttft_s or self.tpot_s < tightest.tpot_s)
        is_loose = loosest is not None and (self.ttft_s > loosest.ttft_s or self.tpot_s > loosest.tpot_s)
        return not (is_tight or is_loose)


@dataclass(frozen=True, slots=True)
class ServiceClass:
    """A class of requests. Lower `rank` goes first; a class is best-effort when `best_effort` is set.

    slo: targets of its requests. A request may bring its own, between `tightest` (None: the class's) and
    `loosest` (None: any). Best-effort classes have none: their KV and decode attention may move to the host.
    """

    name: str
    rank: int
    best_effort: bool
    slo: SLO | None = None
    tightest: SLO | None = None
    loosest: SLO | None = None

    def slo_of(self, own: SLO | None) -> SLO | None:
        """Targets of a request that asks for `own`; RequestError naming the clamp when it may not."""
        if own is None:
            return self.slo
        tightest = self.tightest or self.slo
        if tightest is None:
            raise RequestError("slo", f"class {self.name!r} has no targets; leave slo out or set the class's")
        if not own.is_within(tightest, self.loosest):
            upto = "any looser one" if self.loosest is None else _shown(self.loosest)
            raise RequestError(
                "slo",
                f"{_shown(own)} is outside the clamp of class {self.name!r}: {_shown(tightest)} to {upto}",
            )
        return own


def _shown(slo: SLO) -> str:
    return f"ttft_s {slo.ttft_s:g}, tpot_s {slo.tpot_s:g}"


LATENCY_SENSITIVE = ServiceClass("latency_sensitive", rank=0, best_effort=False)
BEST_EFFORT = ServiceClass("best_effort", rank=10, best_effort=True)
DEFAULT_CLASSES = (LATENCY_SENSITIVE, BEST_EFFORT)


def service_class_named(name: object, classes: Iterable[ServiceClass] = DEFAULT_CLASSES) -> ServiceClass:
    """The class called `name`; RequestError naming the known ones otherwise."""
    known = {kind.name: kind for kind in classes}
    if not isinstance(name, str) or name not in known:
        names = ", ".join(known)
        raise RequestError("service_class", f"unknown class {name!r}; known classes: {names}")
    return known[name]


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """What one request experienced. Times in seconds, from arrival at the API.

    tpot_s leaves the first token out; None when fewer than two tokens came.
    num_lane_tokens: tokens decoded with host attention (the rest were decoded on the device).
    num_cached_tokens: prompt tokens whose KV was found in the prefix cache, not computed.
    is_exact: False once a token was decoded from lossy KV (host_kv_dtype="int8") or rounded weights
    (quantization): the text is then outside the exactness promise.
    queued_s: when it was handed to the engine, tokenised; started_s: when the engine began with its prompt,
    of a request that was dropped before its first token the last time; last_token_s: its newest token.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    num_lane_tokens: int = 0
    is_exact: bool = True
    num_cached_tokens: int = 0
    queued_s: float | None = None
    started_s: float | None = None
    last_token_s: float | None = None

    @classmethod
    def over(cls, each: Iterable[RequestMetrics]) -> RequestMetrics:
        """Of texts of one arrival: the first start and token of any, the slowest tpot, the last token of all,
        sums of lane and cached tokens."""
        each = list(each)
        return cls(
            ttft_s=min((m.ttft_s for m in each if m.ttft_s is not None), default=None),
            tpot_s=max((m.tpot_s for m in each if m.tpot_s is not None), default=None),
            num_lane_tokens=sum(m.num_lane_tokens for m in each),
            is_exact=all(m.is_exact for m in each),
            num_cached_tokens=sum(m.num_cached_tokens for m in each),
            queued_s=min((m.queued_s for m in each if m.queued_s is not None), default=None),
            started_s=min((m.started_s for m in each if m.started_s is not None), default=None),
            last_token_s=max((m.last_token_s for m in each if m.last_token_s is not None), default=None),
        )


class TokenLogprobs(NamedTuple):
    """Log probabilities at one position as the engine sends them: chosen token, then the likeliest.

    rank: how many tokens are at least as likely as the chosen one, itself included.
    """

    ids: list[int]
    logprobs: list[float]
    rank: int


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log probability (natural) of one token under the model itself, before any sampling parameter.

    rank: 1 for the most likely token; decoded_token: its text alone.
    """

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One of the `n` texts of a request: cumulative tokens and text; `finish_reason` is None while it runs.

    logprobs: one entry a token (token id -> Logprob, the chosen token first), None when not asked for;
    cumulative_logprob: sum over the chosen tokens. stop_reason: the stop string or stop token id that ended
    the text; None for the model's own end of text.
    """

    index: int
    token_ids: list[int]
    text: str
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The state of one request: `n` completions in order of their index.

    prompt_logprobs: one entry a prompt token, the first one None; None when not asked for or not there yet.
    text, token_ids and finish_reason are those of the first completion.
    """

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        return all(c.finish_reason is not None for c in self.outputs)

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.outputs[0].finish_reason

    @property
    def metrics(self) -> RequestMetrics:
        """Over all completions, as RequestMetrics.over has it."""
        return RequestMetrics.over(c.metrics for c in self.outputs)
