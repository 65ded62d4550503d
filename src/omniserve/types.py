"""The values users hand in and get back. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from omniserve.errors import RequestError

FinishReason = Literal["stop", "length", "abort"]
Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class SLO:
    """Targets of a service class, in seconds: time to first token, time per later token."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class ServiceClass:
    """A class of requests. Lower `rank` goes first; a class is best-effort when `best_effort` is set.

    Best-effort classes have no targets: their KV and decode attention may move to the host.
    """

    name: str
    rank: int
    best_effort: bool
    slo: SLO | None = None


LATENCY_SENSITIVE = ServiceClass("latency_sensitive", rank=0, best_effort=False)
BEST_EFFORT = ServiceClass("best_effort", rank=10, best_effort=True)
SERVICE_CLASSES = {c.name: c for c in (LATENCY_SENSITIVE, BEST_EFFORT)}


def service_class_named(name: str) -> ServiceClass:
    """The class called `name`; RequestError naming the known ones otherwise."""
    try:
        return SERVICE_CLASSES[name]
    except (KeyError, TypeError):
        known = ", ".join(SERVICE_CLASSES)
        raise RequestError("service_class", f"unknown class {name!r}; known classes: {known}") from None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens of one request.

    temperature 0 is greedy. `seed` fixes the noise: the same text whatever else is in the batch; None takes
    the engine's seed plus the request's number.
    `stop` strings end the text before their first occurrence; `stop_token_ids` end it at that token.
    """

    temperature: float = 0.0
    max_tokens: int = 16
    ignore_eos: bool = False
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise RequestError("max_tokens", f"must be an integer of at least 1, got {self.max_tokens!r}")
        if not 0.0 <= self.temperature <= 100.0:
            raise RequestError("temperature", f"must lie in [0, 100], got {self.temperature!r}")
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise RequestError("stop", "stop strings must be non-empty text")
        if any(not isinstance(t, int) or t < 0 for t in self.stop_token_ids):
            raise RequestError("stop_token_ids", "must be token ids, integers of at least 0")
        if self.seed is not None and (not isinstance(self.seed, int) or not 0 <= self.seed < 2**63):
            raise RequestError("seed", f"must be an integer in [0, 2**63), got {self.seed!r}")


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """What one request experienced. Times in seconds, from arrival at the API.

    tpot_s leaves the first token out; None when fewer than two tokens came.
    num_lane_tokens: tokens decoded with host attention (the rest were decoded on the device).
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    num_lane_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The state of one request: cumulative tokens and text; `finish_reason` is None while it runs."""

    request_id: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: FinishReason | None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None
