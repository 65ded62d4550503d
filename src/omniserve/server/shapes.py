"""How texts look in answers: OpenAI's objects, whole or as chunks of a stream.

A chunk is made for every token of every stream, so its constant parts are encoded once.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import msgspec

from omniserve.types import Logprob, RequestOutput

# JSON knows no infinity; what the model holds to be impossible is this (as in vLLM).
LEAST_LOGPROB = -9999.0
DONE = b"data: [DONE]\n\n"
Position = Mapping[int, Logprob]
encode = msgspec.json.encode


@dataclass(frozen=True, slots=True)
class Text:
    """A choice, or what is new of one. logprobs: one entry a token, None when not asked for.

    first_token: text of a prompt's first token, whose entry is None; offset: characters of the choice before.
    """

    index: int
    text: str
    finish_reason: str | None
    logprobs: Sequence[Position | None] | None = None
    first_token: str = ""
    offset: int = 0


def usage_of(outputs: Sequence[RequestOutput], has_text: bool = True) -> dict[str, Any]:
    """Tokens of all prompts and texts. has_text: False where what was generated is not shown."""
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_out = sum(len(one.token_ids) for output in outputs for one in output.outputs) if has_text else 0
    # Of the n texts of one prompt each finds what the others left; the prompt is counted once.
    num_cached = sum(output.outputs[0].metrics.num_cached_tokens for output in outputs)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_out,
        "total_tokens": num_prompt + num_out,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


class Shape(ABC):
    """Answers of one request. answer_id, model, tier: stated in it; num_top: likeliest tokens shown."""

    object_name: str
    chunk_name: str

    def __init__(self, answer_id: str, model: str, tier: str, include_usage: bool, num_top: int) -> None:
        self._common: dict[str, Any] = {
            "id": answer_id,
            "created": int(time.time()),
            "model": model,
            "service_tier": tier,
        }
        self._include_usage, self._num_top = include_usage, num_top
        head = encode({"object": self.chunk_name, **self._common})
        self._head = b"data: " + head[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def whole(self, texts: Sequence[Text], usage: dict[str, Any]) -> dict[str, Any]:
        choices = [self._whole_choice(text) for text in texts]
        return {"object": self.object_name, **self._common, "choices": choices, "usage": usage}

    def chunk(self, new: Text) -> bytes:
        return self._head + self._choice(new) + self._tail

    def last(self, usage: dict[str, Any]) -> bytes:
        """What follows the last text."""
        if not self._include_usage:
            return DONE
        return self._head + b'],"usage":' + encode(usage) + b"}\n\n" + DONE

    def opening(self, index: int) -> bytes:
        """What precedes the first text of a choice."""
        return b""

    @abstractmethod
    def _whole_choice(self, text: Text) -> dict[str, Any]: ...

    @abstractmethod
    def _choice(self, new: Text) -> bytes: ...


class ChatShape(Shape):
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def opening(self, index: int) -> bytes:
        choice = (
            b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
        )
        return self._head + choice % index + self._tail

    def _choice(self, new: Text) -> bytes:
        content = b'{"content":' + encode(new.text) + b"}" if new.text or new.logprobs else b"{}"
        logprobs, reason = encode(self._logprobs(new)), encode(new.finish_reason)
        parts = new.index, content, logprobs, reason
        return b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}' % parts

    def _whole_choice(self, text: Text) -> dict[str, Any]:
        return {
            "index": text.index,
            "message": {"role": "assistant", "content": text.text, "refusal": None},
            "logprobs": self._logprobs(text),
            "finish_reason": text.finish_reason,
        }

    def _logprobs(self, text: Text) -> dict[str, Any] | None:
        if text.logprobs is None:
            return None
        return {"content": [self._position(p) for p in text.logprobs if p is not None], "refusal": None}

    def _position(self, position: Position) -> dict[str, Any]:
        likeliest = sorted((one for one in position.values() if one.rank <= self._num_top), key=_rank)
        chosen = next(iter(position.values()))
        return {**_token(chosen), "top_logprobs": [_token(one) for one in likeliest]}


class CompletionShape(Shape):
    object_name = chunk_name = "text_completion"

    def _choice(self, new: Text) -> bytes:
        parts = new.index, encode(new.text), encode(self._logprobs(new)), encode(new.finish_reason)
        return b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}' % parts

    def _whole_choice(self, text: Text) -> dict[str, Any]:
        return {
            "index": text.index,
            "text": text.text,
            "logprobs": self._logprobs(text),
            "finish_reason": text.finish_reason,
        }

    def _logprobs(self, text: Text) -> dict[str, Any] | None:
        """Nothing precedes the first token of a prompt, so that it has none."""
        if text.logprobs is None:
            return None
        chosen = [(text.first_token, None) if p is None else _chosen(p) for p in text.logprobs]
        offsets = list(accumulate((len(token) for token, _ in chosen), initial=text.offset))[:-1]
        return {
            "tokens": [token for token, _ in chosen],
            "token_logprobs": [logprob for _, logprob in chosen],
            "top_logprobs": [None if p is None else self._likeliest(p) for p in text.logprobs],
            "text_offset": offsets,
        }

    def _likeliest(self, position: Position) -> dict[str, float]:
        """The likeliest tokens, and the chosen one in any case."""
        found = sorted(position.values(), key=_rank)
        chosen = next(iter(position.values()))
        return {
            one.decoded_token: _finite(one.logprob)
            for one in found
            if one.rank <= self._num_top or one is chosen
        }


def _rank(one: Logprob) -> int:
    return one.rank


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def _chosen(position: Position) -> tuple[str, float]:
    one = next(iter(position.values()))
    return one.decoded_token, _finite(one.logprob)


def _token(one: Logprob) -> dict[str, Any]:
    return {
        "token": one.decoded_token,
        "logprob": _finite(one.logprob),
        "bytes": list(one.decoded_token.encode()),
    }
