"""Which fields of a request are supported, ignored or refused. docs/api.md shows these tables; a test holds
it to them.

A known field whose absence would change the answer is refused by name, unless its value asks for nothing.
Harmless ones and names that nobody knows are ignored, and the answer says so.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from omniserve.server.errors import ApiError

logger = logging.getLogger("omniserve.server")

Support = Literal["supported", "ignored", "refused"]
IGNORED_HEADER = "x-omniserve-ignored"
# The header names so many fields at most; names in it are of plain characters.
MAX_NAMED, MAX_NAME = 20, 64
MAX_LOGGED = 1000
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9_.\-\[\]]")


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a request. neutral: values of a refused field that ask for nothing. note: for the docs."""

    name: str
    support: Support
    note: str = ""
    neutral: tuple[Any, ...] = ()

    def is_neutral(self, value: object) -> bool:
        return any(type(value) is type(one) and value == one for one in self.neutral)


def _supported(*names: str, note: str = "") -> tuple[Field, ...]:
    return tuple(Field(name, "supported", note) for name in names)


def _ignored(*names: str, note: str = "") -> tuple[Field, ...]:
    return tuple(Field(name, "ignored", note) for name in names)


_SHARED = (
    Field("model", "supported", "unset: the first served name"),
    Field("stream", "supported", "server-sent events, a comment line every 15 s"),
    Field(
        "stream_options",
        "supported",
        "`include_usage`; other keys are ignored and named; refused without `stream`",
    ),
    Field("service_tier", "supported", "`flex` is best-effort, all others latency-sensitive"),
    Field("temperature", "supported", "0 is greedy, and then `n` must be 1"),
    *_supported("top_p", "presence_penalty", "frequency_penalty"),
    Field("logit_bias", "supported", "clamped to [-100, 100]"),
    Field("n", "supported", "prompts times n: at most 256 texts"),
    Field("seed", "supported", "the same text whatever else runs (docs/sampling.md)"),
    Field("stop", "supported", "text or list of texts, at most 256"),
    *_supported("top_k", "min_p", "repetition_penalty", "stop_token_ids", "min_tokens", note="as in vLLM"),
    *_supported("ignore_eos", "skip_special_tokens", "bad_words", note="as in vLLM"),
    Field("include_stop_str_in_output", "supported", "as in vLLM"),
    Field(
        "cache_salt", "supported", "as in vLLM: prefixes are shared only within a salt, and within an owner"
    ),
    Field("priority", "supported", "as in vLLM: inside a class, lower goes first"),
    *_ignored("user", "store", "metadata", "prompt_cache_key", "safety_identifier"),
    *_ignored("prompt_cache_retention", note="prefixes are kept while there is room"),
    *_ignored("request_id", note="send the header `x-request-id`"),
    Field("logits_processors", "refused", neutral=([],)),
    Field("allowed_token_ids", "refused"),
    Field("use_beam_search", "refused", neutral=(False,)),
    Field("length_penalty", "refused", neutral=(1, 1.0)),
    Field("truncate_prompt_tokens", "refused"),
    Field(
        "add_special_tokens", "refused", "text prompts get what the model wants, chats what the template says"
    ),
    Field("prompt_logprobs", "refused", "use `echo` and `logprobs` of /v1/completions"),
    Field("response_format", "refused", '`{"type": "text"}` is accepted', ({"type": "text"},)),
    *(
        Field(name, "refused")
        for name in ("structured_outputs", "guided_json", "guided_regex", "guided_choice")
    ),
    Field("guided_grammar", "refused"),
    *_ignored(
        "guided_decoding_backend",
        "guided_whitespace_pattern",
        note="without a grammar, which is refused, it says nothing",
    ),
    Field("spaces_between_special_tokens", "refused", "`true` is accepted", (True,)),
    *(
        Field(name, "refused", "`false` is accepted", (False,))
        for name in ("return_tokens_as_token_ids", "return_token_ids")
    ),
)

CHAT_FIELDS = (
    Field(
        "messages", "supported", "roles system, developer (as system), user, assistant; text and text parts"
    ),
    Field("max_completion_tokens", "supported", "unset: all that the context leaves"),
    Field("max_tokens", "supported", "the older name of `max_completion_tokens`"),
    *_supported("logprobs"),
    Field("top_logprobs", "supported", "at most the server's `--max-logprobs` (20)"),
    *_SHARED,
    Field("parallel_tool_calls", "ignored"),
    Field("prediction", "ignored", "a hint for speed"),
    Field("tools", "refused", "an empty list is ignored", ([],)),
    Field("tool_choice", "refused", "`none` and `auto` are ignored", ("none", "auto")),
    Field("functions", "refused", neutral=([],)),
    Field("function_call", "refused", neutral=("none", "auto")),
    Field("modalities", "refused", '`["text"]` is accepted', (["text"],)),
    Field("audio", "refused"),
    Field("reasoning_effort", "refused", "`none` is accepted", ("none",)),
    Field("verbosity", "refused", "`medium` is accepted", ("medium",)),
    Field("web_search_options", "refused"),
    Field("echo", "refused", neutral=(False,)),
    Field("add_generation_prompt", "refused", neutral=(True,)),
    Field("continue_final_message", "refused", neutral=(False,)),
    *(Field(name, "refused") for name in ("chat_template", "chat_template_kwargs", "documents")),
)

COMPLETION_FIELDS = (
    Field("prompt", "supported", "text, list of texts, token ids, or list of token ids"),
    Field("max_tokens", "supported", "unset: 16; 0 only with `echo`"),
    Field("logprobs", "supported", "at most the server's `--max-logprobs` (20)"),
    Field("echo", "supported", "with `logprobs` the prompt is scored too"),
    *_SHARED,
    Field("best_of", "refused", "1 is accepted", (1,)),
    Field("suffix", "refused", neutral=("",)),
    Field("prompt_embeds", "refused", "send text or token ids"),
)


def plain(name: str) -> str:
    """A client's name for a field as it may stand in a header and in a log."""
    return _NOT_PLAIN.sub("?", name[:MAX_NAME])


class FieldLog:
    """Tells of each ignored field once."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def note(self, ignored: Sequence[str]) -> None:
        for name in ignored:
            if name not in self._told and len(self._told) < MAX_LOGGED:
                self._told.add(name)
                logger.info("requests bring field %s, which is ignored (told once)", name)


def sort_out(fields: Sequence[Field], body: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Supported fields that have a value, and names of those ignored; ApiError for a refused one."""
    known = {field.name: field for field in fields}
    supported: dict[str, Any] = {}
    ignored: list[str] = []
    for name, value in body.items():
        field = known.get(name)
        if value is None:
            continue
        if field is None or field.support == "ignored" or field.is_neutral(value):
            ignored.append(name)
        elif field.support == "refused":
            hint = f" ({field.note})" if field.note else ""
            message = f"{name}: is not supported, and leaving it out would change the answer{hint}"
            raise ApiError(400, message, param=name, code="unsupported_parameter")
        else:
            supported[name] = value
    return supported, ignored


def ignored_headers(ignored: Sequence[str]) -> dict[str, str]:
    """The response header that names ignored fields; none where there are none."""
    if not ignored:
        return {}
    names = ", ".join(ignored[:MAX_NAMED])
    more = len(ignored) - MAX_NAMED
    return {IGNORED_HEADER: f"{names}, and {more} more" if more > 0 else names}
