"""Lines of a batch answered by an engine of one's own, without a server: fields that both endpoints share.

A field that would change the answer and is not known here is refused by name, never passed over.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from omniserve.batch.line_runner import EngineGone, LineResponse, failure
from omniserve.engine.async_llm import AsyncLLM
from omniserve.errors import EngineDeadError, RequestError
from omniserve.types import CompletionOutput, RequestOutput, SamplingParams

CHAT = "/v1/chat/completions"
# Of SamplingParams, by the same name and meaning as in the API.
_SAMPLING = ("temperature", "top_p", "n", "seed", "stop", "presence_penalty", "frequency_penalty")
_LENGTH = ("max_completion_tokens", "max_tokens")
# Accepted and without any effect on the answer.
_HARMLESS = ("user", "store", "metadata", "service_tier", "prompt_cache_key", "safety_identifier")
DEFAULT_COMPLETION_TOKENS = 16


class EngineLines:
    """A LineRunner over AsyncLLM; every line is best-effort work."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm

    async def run_line(
        self, owner: str, endpoint: str, body: Mapping[str, Any], request_id: str, seconds_left: float
    ) -> LineResponse:
        try:
            ids, params = self._request(endpoint, body)
            arrived_s = time.monotonic()
            last: RequestOutput | None = None
            service = ("best_effort", request_id, arrived_s)
            async for output in self._llm.stream(ids, params, *service):
                last = output
        except RequestError as error:
            return failure(400, str(error), "invalid_request_error", "invalid_value")
        except EngineDeadError as error:
            raise EngineGone(str(error)) from error
        assert last is not None
        return LineResponse(200, _response(endpoint, str(body["model"]), request_id, last))

    def _request(self, endpoint: str, body: Mapping[str, Any]) -> tuple[list[int], SamplingParams]:
        asked = "messages" if endpoint == CHAT else "prompt"
        known = {"model", asked, "stream", *_SAMPLING, *_LENGTH, *_HARMLESS}
        for name, value in body.items():
            if name not in known and value is not None:
                raise RequestError(name, "is not supported in an offline run; leave it out")
        if body.get("stream"):
            raise RequestError("stream", "a line of a batch is answered as a whole; leave it out")
        if not isinstance(body.get(asked), str if asked == "prompt" else list):
            raise RequestError(asked, "must be text" if asked == "prompt" else "must be a list of messages")
        ids = (
            self._llm.encode_chat(body["messages"]) if endpoint == CHAT else self._llm.encode(body["prompt"])
        )
        return ids, _params(endpoint, body)


def _params(endpoint: str, body: Mapping[str, Any]) -> SamplingParams:
    """A chat without a limit may use all the room there is."""
    values = {name: body[name] for name in _SAMPLING if body.get(name) is not None}
    limits = [body[name] for name in _LENGTH if body.get(name) is not None]
    otherwise = None if endpoint == CHAT else DEFAULT_COMPLETION_TOKENS
    return SamplingParams(max_tokens=limits[0] if limits else otherwise, **values)


def _response(endpoint: str, model: str, request_id: str, output: RequestOutput) -> dict[str, Any]:
    num_prompt = len(output.prompt_token_ids)
    num_made = sum(len(one.token_ids) for one in output.outputs)
    is_chat = endpoint == CHAT
    return {
        "id": ("chatcmpl-" if is_chat else "cmpl-") + request_id.removeprefix("batch_req_"),
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "service_tier": "flex",
        "choices": [_choice(one, index, is_chat) for index, one in enumerate(output.outputs)],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_made,
            "total_tokens": num_prompt + num_made,
        },
    }


def _choice(one: CompletionOutput, index: int, is_chat: bool) -> dict[str, Any]:
    text = {"message": {"role": "assistant", "content": one.text}} if is_chat else {"text": one.text}
    return {"index": index, **text, "logprobs": None, "finish_reason": one.finish_reason}
