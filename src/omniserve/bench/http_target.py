"""An OpenAI-compatible server as a target of the load generator: streamed answers, one try each."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import httpx

from omniserve.bench.http_api import Api, Extras, check, error_text
from omniserve.bench.http_names import CHAT
from omniserve.bench.load import Cancelled, Job, Usage
from omniserve.bench.prompts import Prompts
from omniserve.bench.sse import EventStream
from omniserve.errors import OmniServeError

DONE = "[DONE]"
# How vLLM and SGLang say that they ended a request themselves.
GIVEN_UP = ("abort", "error")


class HttpTarget:
    """One model of one server. extras: by service class; a class that has none is asked as `default` says."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        api: Api,
        prompts: Prompts,
        extras: Mapping[str, Extras],
        default: Extras | None = None,
    ) -> None:
        self._client, self._api, self._prompts, self._extras = client, api, prompts, extras
        self._default = default or Extras()

    async def send(self, job: Job) -> AsyncGenerator[int | Usage, None]:
        extras = self._extras.get(job.service_class, self._default)
        body = self._api.body(job, self._prompts.take(job), extras, is_streamed=True)
        endpoint = self._api.endpoint
        async with self._client.stream("POST", endpoint, json=body, headers=dict(extras.headers)) as response:
            if not response.is_success:
                await response.aread()
            check(response, endpoint)
            answer = Answer(endpoint == CHAT)
            async for received in response.aiter_bytes():
                if count := answer.feed(received):
                    yield count
        answer.check_ended()
        if answer.usage is not None:
            yield answer.usage


class Answer:
    """One streamed answer as it comes in. Pure: bytes in, numbers of new tokens out."""

    def __init__(self, is_chat: bool) -> None:
        self.usage: Usage | None = None
        self._is_chat = is_chat
        self._events = EventStream()
        self._is_ended = False

    def feed(self, received: bytes) -> int:
        """Number of chunks among these bytes that stand for a token.

        Raises Cancelled when the server gave the request up, OmniServeError for an error or for what is no
        chunk of an answer.
        """
        return sum(self._tokens_of(data) for data in self._events.feed(received))

    def check_ended(self) -> None:
        """The connection was closed: raises OmniServeError when the answer was not at its end."""
        if not self._is_ended:
            raise OmniServeError("the connection was closed in the middle of the answer")

    def _tokens_of(self, data: str) -> int:
        if data.strip() == DONE:
            self._is_ended = True
            return 0
        chunk = _object(data)
        if chunk.get("error"):
            raise OmniServeError(f"error in mid-stream: {error_text(chunk)}")
        if chunk.get("usage"):
            self.usage = Usage(chunk["usage"]["prompt_tokens"], chunk["usage"]["completion_tokens"])
        if not chunk.get("choices"):
            return 0
        choice = chunk["choices"][0]
        reason = choice.get("finish_reason")
        if reason in GIVEN_UP:
            raise Cancelled(f"the server ended it: finish_reason {reason!r}")
        self._is_ended = self._is_ended or reason is not None
        return int(self._stands_for_a_token(choice))

    def _stands_for_a_token(self, choice: Mapping[str, Any]) -> bool:
        """Text does, also a chunk without text: a token may be half a character. The two that do not are the
        first chunk of a chat, which only has the role, and a last one that only has the reason."""
        if not self._is_chat:
            return bool(choice.get("text")) or choice.get("finish_reason") is None
        delta = choice.get("delta") or {}
        # `reasoning` and `reasoning_content`: the two names under which servers stream thoughts.
        if any(delta.get(name) for name in ("content", "reasoning", "reasoning_content")):
            return True
        return not delta.get("role") and choice.get("finish_reason") is None


def _object(data: str) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except ValueError:
        chunk = None
    if not isinstance(chunk, dict):
        raise OmniServeError(f"no JSON object in the stream, got {data[:80]!r}")
    return chunk
