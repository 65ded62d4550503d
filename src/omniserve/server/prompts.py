"""Prompts to token ids, beside the event loop, and the check that they fit the model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from omniserve.engine.async_llm import AsyncLLM
from omniserve.server.errors import CONTEXT_LENGTH_EXCEEDED, ApiError, invalid
from omniserve.server.request_models import MAX_TEXTS, Message
from omniserve.types import SamplingParams

# Texts up to so many characters are tokenised at once: that takes less than handing them to a thread.
SHORT_CHARS = 4096
# Every new token is searched for these, on the event loop.
MAX_WORDS = 256

T = TypeVar("T")


def num_chars(prompt: str | list[int] | Sequence[Message]) -> int:
    """Characters to be tokenised; none where token ids came."""
    if isinstance(prompt, str):
        return len(prompt)
    return sum(len(one.text) for one in prompt if isinstance(one, Message))


class Tokenising:
    """Long texts wait for each other here, and nobody else for them."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="omniserve-tokenise")

    async def text(self, llm: AsyncLLM, text: str) -> list[int]:
        """Token ids of a prompt; ApiError 400 when it cannot fit however it is cut."""
        check_chars(llm, len(text), "prompt")
        return await self._run(len(text), lambda: llm.encode(text))

    async def chat(self, llm: AsyncLLM, messages: Sequence[Message]) -> list[int]:
        rendered = [message.for_template() for message in messages]
        num_chars = sum(len(message["content"]) for message in rendered)
        check_chars(llm, num_chars, "messages")
        # Templates may look at every message for every message.
        return await self._run(num_chars + 64 * len(rendered), lambda: llm.encode_chat(rendered))

    async def _run(self, num_chars: int, call: Callable[[], T]) -> T:
        if num_chars <= SHORT_CHARS:
            return call()
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def check_counts(body: Mapping[str, Any], max_model_len: int) -> None:
    """Refuse lists that no valid request holds, before each of their items is looked at.

    To look at millions of them takes most of a second, in which no stream gets a token. Of anything else that
    is wrong the checks of the request tell.
    """
    messages, prompt = body.get("messages"), body.get("prompt")
    if isinstance(messages, list):  # templates make a token of each at least
        _check_count("messages", len(messages), max_model_len, CONTEXT_LENGTH_EXCEEDED)
    if isinstance(prompt, list):
        are_ids = bool(prompt) and isinstance(prompt[0], int)
        limit, code = (max_model_len, CONTEXT_LENGTH_EXCEEDED) if are_ids else (MAX_TEXTS, "invalid_value")
        _check_count("prompt", len(prompt), limit, code)
        for one in () if are_ids else prompt:
            if isinstance(one, list):
                _check_count("prompt", len(one), max_model_len, CONTEXT_LENGTH_EXCEEDED)
    for name in ("stop", "bad_words"):
        if isinstance(words := body.get(name), list):
            _check_count(name, len(words), MAX_WORDS, "invalid_value")


def _check_count(name: str, count: int, limit: int, code: str) -> None:
    if count > limit:
        raise invalid(name, f"{name}: {count} items are more than {limit}; send fewer", code)


def check_chars(llm: AsyncLLM, num_chars: int, param: str) -> None:
    """Refuse a text that is too long for the model whatever its tokens are, before it costs anything."""
    limit = llm.acceptance.max_model_len
    if num_chars > limit * llm.tokenizer.longest_token:
        message = (
            f"{param}: {num_chars} characters are more than {limit} tokens (max_model_len) can stand for"
        )
        raise invalid(param, f"{message}; shorten it", CONTEXT_LENGTH_EXCEEDED)


def check_fits(
    llm: AsyncLLM, num_prompt: int, params: SamplingParams, param: str, shows_output: bool = True
) -> None:
    """ApiError 400 for a prompt that, with what may be generated, exceeds the context.

    shows_output: False where nothing but the prompt is asked for, and the engine generates a token all the
    same.
    """
    limit = llm.acceptance.max_model_len
    wanted = 1 if params.max_tokens is None else params.max_tokens
    if num_prompt + wanted <= limit:
        return
    context = f"this model's context holds {limit} tokens (max_model_len)"
    if shows_output:
        message = (
            f"{context}, {num_prompt + wanted} are asked for: {num_prompt} in the {param}, {wanted} to "
            f"generate; shorten the {param}, or ask for fewer"
        )
    else:
        message = (
            f"{context}, and to score a prompt takes one more than it has: of the {num_prompt} in the "
            f"{param} it can score {limit - 1}; shorten the {param}"
        )
    raise ApiError(400, message, param=param, code=CONTEXT_LENGTH_EXCEEDED)
