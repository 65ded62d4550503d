"""What a request must keep to. Checked where requests arrive, before anything runs for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omniserve.errors import RequestError
from omniserve.types import SamplingParams

MAX_CACHE_SALT = 4096


def check_cache_salt(salt: object) -> None:
    """Raise RequestError unless `salt` is None or text of 1 to MAX_CACHE_SALT bytes."""
    if salt is None:
        return
    size = len(salt.encode(errors="replace")) if isinstance(salt, str) else 0
    if (
        not isinstance(salt, str)
        or not 1 <= size <= MAX_CACHE_SALT
        or any("\ud800" <= c <= "\udfff" for c in salt)
    ):
        raise RequestError(
            "cache_salt",
            f"must be text of 1 to {MAX_CACHE_SALT} bytes of UTF-8; None shares prefixes with all others "
            "that have none",
        )


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Limits of one request.

    max_tokens_total: tokens (prompt + max_tokens) that the smallest KV memory it may need can hold;
    limited_by: the setting behind that.
    """

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_tokens_total: int
    limited_by: str

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raise RequestError naming the field and the limit when the request can never be served."""
        if len(prompt) == 0:
            raise RequestError("prompt", "must hold at least one token")
        self._check_ids("prompt", prompt)
        self._check_ids("stop_token_ids", params.stop_token_ids)
        total = len(prompt) + params.max_tokens
        sizes = f"{len(prompt)} prompt tokens + max_tokens {params.max_tokens}"
        if total > self.max_model_len:
            field = "prompt" if len(prompt) >= self.max_model_len else "max_tokens"
            raise RequestError(
                field,
                f"{sizes} exceed max_model_len {self.max_model_len}; shorten the prompt or lower max_tokens",
            )
        if total > self.max_tokens_total:
            raise RequestError(
                "max_tokens",
                f"{sizes} need more KV memory than there is: {self.limited_by} holds {self.max_tokens_total} "
                "tokens of one request; raise it or lower max_tokens",
            )

    def _check_ids(self, field: str, ids: Sequence[int]) -> None:
        for token in ids:
            if type(token) is not int or not 0 <= token < self.vocab_size:
                raise RequestError(
                    field, f"token id {token!r} is out of range, the vocabulary has {self.vocab_size} ids"
                )
