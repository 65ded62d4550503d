"""Before a run against a server: is it there, what does it serve, how are prompts of its model made."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import httpx
from rich.console import Console

from omniserve.bench.http_api import ServedModel
from omniserve.bench.http_names import NO_TOKENIZER
from omniserve.bench.load import Refused
from omniserve.bench.prompts import UNMEASURED, Pool, measured_pool
from omniserve.errors import ModelError, OmniServeError

if TYPE_CHECKING:
    from omniserve.model.tokenizer import Tokenizer

ASK_AGAIN_S = 1.0
T = TypeVar("T")


class Patience:
    """How long a server may take until it answers. seconds: 0 is one try."""

    def __init__(self, seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._deadline_s = self._loop.time() + seconds

    async def until_answered(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask again while there is no connection or no room. OmniServeError when patience ends."""
        while True:
            try:
                return await ask()
            except (httpx.TransportError, Refused) as error:
                if self._loop.time() >= self._deadline_s:
                    reason = str(error) or type(error).__name__
                    raise OmniServeError(
                        f"base-url: the server is not ready ({reason}); see --ready-check-timeout-sec"
                    ) from error
            await asyncio.sleep(ASK_AGAIN_S)


def find_tokenizer(wanted: str | None, model: ServedModel, console: Console) -> Tokenizer | None:
    """The one named (ModelError when it is not there), or the model's; without any, says what that means."""
    from omniserve.model.sources import ensure_model
    from omniserve.model.tokenizer import load_tokenizer

    if wanted == NO_TOKENIZER:
        return None
    try:
        return load_tokenizer(ensure_model(wanted or model.root, with_weights=False))
    except ModelError as error:
        if wanted is not None:
            raise
        console.print(
            f"no tokenizer for {model.root} ({error}): prompts are common words, about as many as tokens are "
            "wanted, and the report gives the server's own count. Name one with --tokenizer",
            style="yellow",
            markup=False,
        )
        return None


def make_pool(tokenizer: Tokenizer | None, is_chat: bool) -> Pool:
    """Words to make prompts of; without a tokenizer nobody knows how many tokens they are."""
    return UNMEASURED if tokenizer is None else measured_pool(tokenizer, _added_tokens(tokenizer, is_chat))


def _added_tokens(tokenizer: Tokenizer, is_chat: bool) -> int:
    """What a server adds to a prompt: special tokens, or the chat template."""
    word = "a"
    prompt = word
    if is_chat and tokenizer.has_chat_template:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": word}])
    with_added = tokenizer.encode(prompt, add_special_tokens=not is_chat)
    return len(with_added) - len(tokenizer.encode(word, add_special_tokens=False))
