"""From the body of a request to what is to be done: one Work, whichever endpoint it came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omniserve.config import EngineConfig
from omniserve.server.auth import Caller
from omniserve.server.errors import ApiError
from omniserve.server.fields import CHAT_FIELDS, COMPLETION_FIELDS, Field, plain, sort_out
from omniserve.server.request_models import (
    ChatRequest,
    CompletionRequest,
    Message,
    TextRequest,
    validated,
)
from omniserve.server.shapes import ChatShape, CompletionShape, Shape
from omniserve.server.tiers import Tier, priority_within, targets
from omniserve.types import SLO, SamplingParams, service_class_named

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
FIELDS: Mapping[str, tuple[Field, ...]] = {CHAT: CHAT_FIELDS, COMPLETIONS: COMPLETION_FIELDS}
TTFT_HEADER, TPOT_HEADER = "x-slo-ttft-ms", "x-slo-tpot-ms"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request comes from. arrived_s: time.monotonic() at its arrival.

    answer_id: of the answer, and of the request in the engine. window_s: seconds until a line of a batch is
    due.
    """

    caller: Caller
    headers: Mapping[str, str]
    arrived_s: float
    request_id: str
    answer_id: str
    window_s: float | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """A validated request. prompts: each a text or token ids; of a chat, one: its messages.

    names: of fields of SamplingParams, and of the prompt, where the request calls them otherwise.
    echo: prompts come back before their texts; shows_output: False where nothing but prompts is asked for.
    """

    prompts: Sequence[str | list[int] | Sequence[Message]]
    params: SamplingParams
    tier: Tier
    shape: Shape
    stream: bool
    ignored: tuple[str, ...]
    slo: SLO | None
    cache_salt: str | None
    priority: int
    names: Mapping[str, str]
    echo: bool = False
    shows_output: bool = True

    @property
    def is_chat(self) -> bool:
        return isinstance(self.shape, ChatShape)


class Reader:
    """Makes Work of bodies. names: those of the model that clients may use, the first one for answers."""

    def __init__(self, names: Sequence[str], config: EngineConfig, is_shared: bool) -> None:
        """is_shared: requests of several owners come, whose cached prefixes are kept apart."""
        self._names, self._config, self._is_shared = tuple(names), config, is_shared

    def slo_of(self, tier: Tier) -> SLO | None:
        """Targets of requests that bring none of their own; None: the class has none."""
        return service_class_named(tier.service_class, self._config.classes).slo

    def read(self, endpoint: str, body: Mapping[str, Any], tier: Tier, origin: Origin) -> Work:
        """ApiError 400 or 404 naming what is wrong."""
        values, ignored = sort_out(FIELDS[endpoint], body)
        if endpoint == CHAT:
            return self._chat(validated(ChatRequest, values), ignored, tier, origin)
        return self._completion(validated(CompletionRequest, values), ignored, tier, origin)

    def _chat(self, asked: ChatRequest, ignored: list[str], tier: Tier, origin: Origin) -> Work:
        params = asked.params()
        return Work(
            prompts=[asked.messages],
            params=params,
            shape=self._shape(ChatShape, asked, tier, origin, params),
            names={"prompt": "messages", **asked.names},
            **self._shared(asked, ignored, tier, origin),
        )

    def _completion(self, asked: CompletionRequest, ignored: list[str], tier: Tier, origin: Origin) -> Work:
        params = asked.params()
        return Work(
            prompts=asked.prompts,
            params=params,
            shape=self._shape(CompletionShape, asked, tier, origin, params),
            names=asked.names,
            echo=asked.echo,
            shows_output=not asked.is_score_only,
            **self._shared(asked, ignored, tier, origin),
        )

    def _shape(
        self, kind: type[Shape], asked: TextRequest, tier: Tier, origin: Origin, params: SamplingParams
    ) -> Shape:
        name = self._checked_name(asked.model)
        return kind(origin.answer_id, name, tier.stated, asked.include_usage, params.logprobs or 0)

    def _shared(self, asked: TextRequest, ignored: list[str], tier: Tier, origin: Origin) -> dict[str, Any]:
        ignored += asked.ignored
        slo_headers = [origin.headers.get(name) for name in (TTFT_HEADER, TPOT_HEADER)]
        slo = None
        if not tier.is_best_effort:
            kind = service_class_named(tier.service_class, self._config.classes)
            slo = targets(kind, slo_headers[0], slo_headers[1], origin.caller.clamps)
        else:  # best-effort work has no targets
            ignored += [
                n for n, v in zip((TTFT_HEADER, TPOT_HEADER), slo_headers, strict=True) if v is not None
            ]
        return {
            "tier": tier,
            "stream": asked.stream,
            "ignored": tuple(map(plain, ignored)),
            "slo": slo,
            "cache_salt": self._salt(asked.cache_salt, origin.caller),
            "priority": priority_within(asked.priority, origin.caller.clamps),
        }

    def _salt(self, asked: str | None, caller: Caller) -> str | None:
        """How fast an answer comes tells what others asked before, unless nothing is shared with them."""
        if not self._is_shared:
            return asked
        # The length says where the owner ends: whatever another is called, and asks for, gives another salt.
        return f"{len(caller.owner)}:{caller.owner}/{asked or ''}"

    def _checked_name(self, name: str | None) -> str:
        if name is None:
            return self._names[0]
        if name not in self._names:
            known = ", ".join(self._names)
            raise ApiError(
                404,
                f"the model {name!r:.200} does not exist; this server has {known}",
                param="model",
                code="model_not_found",
            )
        return name
