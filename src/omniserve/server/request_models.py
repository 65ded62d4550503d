"""Bodies of /v1/chat/completions and /v1/completions: their supported fields, and what they mean.

Types are checked strictly: "5" is no number. Ranges are SamplingParams' affair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from omniserve.errors import RequestError
from omniserve.server.errors import ApiError, invalid
from omniserve.types import SamplingParams

DEFAULT_COMPLETION_TOKENS = 16
MAX_TEXTS = 256
# Of SamplingParams, by the same name and meaning in both requests.
_SAME = (
    "n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k",
    "min_p", "seed", "stop", "stop_token_ids", "bad_words", "include_stop_str_in_output", "ignore_eos",
    "min_tokens", "skip_special_tokens", "logit_bias",
)  # fmt: skip
# What a field that may be one of several kinds must be; pydantic would tell of every kind by itself.
_MUST = {
    "prompt": "must be text, a list of texts, a list of token ids, or a list of lists of token ids",
    "stop": "must be text or a list of texts",
    "content": 'must be text or a list of parts {"type": "text", "text": ...}; nothing else is supported',
}
# How pydantic calls what is of the right type and still wrong.
_OUT_OF_RANGE = ("greater_than", "less_than", "finite_number", "literal_error")
_TOO_LONG_OR_SHORT = ("too_short", "too_long")
_STRICT = ConfigDict(strict=True)
_OPEN = ConfigDict(strict=True, extra="allow")


def extras(found: BaseModel | None) -> list[str]:
    """Fields that nobody knows and that have a value."""
    extra = (found and found.model_extra) or {}
    return [name for name, value in extra.items() if value is not None]


class TextPart(BaseModel):
    """Other fields than these are ignored."""

    model_config = _OPEN
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message. Other fields than these are ignored, but for calls of tools, which are refused."""

    model_config = _OPEN
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "\n".join(p.text for p in self.content)

    def for_template(self) -> dict[str, str]:
        return {"role": "system" if self.role == "developer" else self.role, "content": self.text}


class StreamOptions(BaseModel):
    """Other keys than these are ignored."""

    model_config = _OPEN
    include_usage: bool = False


class TextRequest(BaseModel):
    """What both endpoints share."""

    model_config = _STRICT
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    service_tier: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_TEXTS)] = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def names(self) -> dict[str, str]:
        """Names here of fields of SamplingParams that are called otherwise there."""
        return {"prompt_logprobs": "logprobs"}

    @property
    def ignored(self) -> list[str]:
        """Fields inside others that are without effect."""
        return [f"stream_options.{name}" for name in extras(self.stream_options)]

    def _params(self, **more: Any) -> SamplingParams:
        try:
            return SamplingParams(**{name: getattr(self, name) for name in _SAME}, **more)
        except RequestError as error:
            name = self.names.get(error.field, error.field)
            raise invalid(name, f"{name}: {error.reason}") from None

    def check(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "stream_options: only with stream; set stream to true")
        return self


class ChatRequest(TextRequest):
    """A chat; its fields by support: docs/api.md."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0)] | None = None

    @property
    def names(self) -> dict[str, str]:
        limit = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return {"max_tokens": limit, "logprobs": "top_logprobs"}

    def params(self) -> SamplingParams:
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._params(max_tokens=limit, logprobs=(self.top_logprobs or 0) if self.logprobs else None)

    def check(self) -> Self:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs", "top_logprobs: only with logprobs; set logprobs to true")
        for i, message in enumerate(self.messages):
            for name in ("tool_calls", "function_call", "audio"):
                if (message.model_extra or {}).get(name):
                    path = f"messages[{i}].{name}"
                    raise ApiError(400, f"{path}: is not supported", param=path, code="unsupported_parameter")
        return self

    @property
    def ignored(self) -> list[str]:
        names = {f"messages[].{name}" for message in self.messages for name in extras(message)}
        parts = [
            one for message in self.messages if isinstance(message.content, list) for one in message.content
        ]
        names |= {f"messages[].content[].{name}" for part in parts for name in extras(part)}
        return [*super().ignored, *sorted(names)]


Prompt = str | list[str] | list[int] | list[list[int]]


class CompletionRequest(TextRequest):
    """A completion; its fields by support: docs/api.md."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0)] = DEFAULT_COMPLETION_TOKENS
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool = False

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(token, int) for token in self.prompt):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [one for one in self.prompt if not isinstance(one, int)]

    @property
    def is_score_only(self) -> bool:
        """Nothing is to be generated: the prompt comes back, with log probabilities if asked for."""
        return self.max_tokens == 0

    def params(self) -> SamplingParams:
        """The engine generates one token at least, which is left out of an answer that has none."""
        params = self._params(max_tokens=max(1, self.max_tokens), logprobs=self.logprobs)
        return replace(params, prompt_logprobs=self.logprobs) if self.echo else params

    def check(self) -> Self:
        super().check()
        if self.max_tokens == 0 and not self.echo:
            raise invalid("max_tokens", "max_tokens: must be at least 1, or 0 with echo")
        if not self.prompt:
            raise invalid("prompt", "prompt: must hold at least one token")
        if len(self.prompts) * self.n > MAX_TEXTS:
            message = (
                f"prompt: {len(self.prompts)} prompts times n {self.n} exceed {MAX_TEXTS} texts; send fewer"
            )
            raise invalid("prompt", message)
        return self


class ErrorInside(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every error looks like; here for the OpenAPI document."""

    error: ErrorInside


M = TypeVar("M", bound=TextRequest)


def validated(model: type[M], values: Mapping[str, Any]) -> M:
    """The request; ApiError 400 naming the first field that is wrong."""
    try:
        return model.model_validate(values).check()
    except ValidationError as error:
        raise as_invalid(error.errors(include_url=False, include_context=False)) from None


def as_invalid(found: list[Any]) -> ApiError:
    """The refusal for what pydantic found."""
    first = found[0]
    path, last = "", ""
    for part in first["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
        last = str(part)
        if last in _MUST:
            break
    if first["type"] == "json_invalid":
        return invalid(None, f"the body is not valid JSON: {first['ctx']['error']}", "invalid_json")
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_type"
    if first["type"].startswith(_OUT_OF_RANGE) or first["type"].endswith(_TOO_LONG_OR_SHORT):
        code = "invalid_value"
    must = first["msg"] if last not in _MUST or code != "invalid_type" else _MUST[last]
    return invalid(path or None, f"{path or 'body'}: {must}", code)
