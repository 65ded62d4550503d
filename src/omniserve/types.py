"""The values users hand in and get back. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
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
        """Bring fields to their exact types; RequestError naming the first that is wrong."""
        stop: object = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or not all(_is_text(s) and s for s in stop):
            raise RequestError("stop", f"must be non-empty text, or a list of it, got {self.stop!r}")
        ids: object = self.stop_token_ids
        if not isinstance(ids, Sequence) or not all(_is_int(t) and t >= 0 for t in ids):
            raise RequestError("stop_token_ids", f"must be a list of integers of at least 0, got {ids!r}")
        heat: object = self.temperature
        if type(heat) is bool or not isinstance(heat, Real) or not 0 <= float(heat) <= 100:
            raise RequestError("temperature", f"must be a number in [0, 100], got {heat!r}")
        if not _is_int(self.max_tokens) or self.max_tokens < 1:
            raise RequestError("max_tokens", f"must be an integer of at least 1, got {self.max_tokens!r}")
        if not isinstance(self.ignore_eos, bool):
            raise RequestError("ignore_eos", f"must be True or False, got {self.ignore_eos!r}")
        if self.seed is not None and (not _is_int(self.seed) or not 0 <= self.seed < 2**63):
            raise RequestError("seed", f"must be an integer in [0, 2**63), got {self.seed!r}")
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "stop_token_ids", tuple(ids))
        object.__setattr__(self, "temperature", float(heat))


def _is_int(value: object) -> bool:
    """An exact integer: True and 1.0 are none."""
    return type(value) is int


def _is_text(value: object) -> bool:
    """Text that can leave this process: a lone surrogate cannot."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """What one request experienced. Times in seconds, from arrival at the API.

    tpot_s leaves the first token out; None when fewer than two tokens came.
    num_lane_tokens: tokens decoded with host attention (the rest were decoded on the device).
    num_cached_tokens: prompt tokens whose KV was found in the prefix cache, not computed.
    is_exact: False once a token was decoded from lossy KV (host_kv_dtype="int8"): the text is then outside
    the exactness promise.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    num_lane_tokens: int = 0
    is_exact: bool = True
    num_cached_tokens: int = 0


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
