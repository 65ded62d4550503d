"""What a request must keep to. Checked where requests arrive, before anything runs for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from omniserve.config import EngineConfig, is_number
from omniserve.errors import RequestError
from omniserve.policy.baselines import RULES
from omniserve.types import SLO, SamplingParams, ServiceClass, service_class_named

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


def check_service(
    config: EngineConfig, service_class: object, slo: object, completion_window_s: object
) -> ServiceClass:
    """The class of that name; RequestError when it is unknown, not served, or may not have what is asked."""
    kind = service_class_named(service_class, config.classes)
    if slo is not None and not isinstance(slo, SLO):
        raise RequestError("slo", f"must be an SLO(ttft_s, tpot_s) or None, got {slo!r}")
    kind.slo_of(slo)
    if kind.best_effort and not RULES[config.policy].takes_best_effort:
        raise RequestError(
            "service_class", f"policy {config.policy!r} serves no best-effort work; choose another"
        )
    if completion_window_s is not None:
        if not kind.best_effort:
            raise RequestError("completion_window_s", f"class {kind.name!r} has none; use slo")
        if not is_number(completion_window_s) or not completion_window_s > 0:
            raise RequestError(
                "completion_window_s", f"must be a number of seconds above 0, got {completion_window_s!r}"
            )
    return kind


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Limits of one request.

    max_tokens_total: tokens (prompt + max_tokens) that the smallest KV memory it may need can hold;
    limited_by: the setting behind that. max_logprobs: most likely tokens reported per position; -1: any.
    """

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_tokens_total: int
    limited_by: str
    max_logprobs: int = 20

    def max_tokens(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Tokens that may be generated; None in the parameters means all that the model and memory allow."""
        if params.max_tokens is not None:
            return params.max_tokens
        return max(1, min(self.max_model_len, self.max_tokens_total) - len(prompt))

    def stop_ids(self, params: SamplingParams) -> frozenset[int]:
        """Token ids that end the request."""
        own = frozenset(params.stop_token_ids or ())
        return own if params.ignore_eos else own.union(self.eos_token_ids)

    def check(
        self, prompt: Sequence[int], params: SamplingParams, bad_words: Sequence[Sequence[int]] = ()
    ) -> None:
        """Raise RequestError naming the field and the limit when the request can never be served.

        bad_words: those of the parameters as token ids.
        """
        if len(prompt) == 0:
            raise RequestError("prompt", "must hold at least one token")
        self._check_ids("prompt", prompt)
        self._check_ids("stop_token_ids", params.stop_token_ids or ())
        self._check_ids("logit_bias", params.logit_bias or ())
        self._check_bad_words(params, bad_words)
        self._check_logprobs("logprobs", params.logprobs)
        self._check_logprobs("prompt_logprobs", params.prompt_logprobs)
        max_tokens = self.max_tokens(prompt, params)
        if params.min_tokens > max_tokens:
            raise RequestError(
                "min_tokens",
                f"{params.min_tokens} exceed the {max_tokens} tokens that max_model_len leaves; lower it",
            )
        self._check_size(prompt, max_tokens)

    def _check_size(self, prompt: Sequence[int], max_tokens: int) -> None:
        total = len(prompt) + max_tokens
        sizes = f"{len(prompt)} prompt tokens + max_tokens {max_tokens}"
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

    def _check_bad_words(self, params: SamplingParams, bad_words: Sequence[Sequence[int]]) -> None:
        for word in bad_words:
            self._check_ids("bad_words", word)
            if not word:
                raise RequestError("bad_words", "each must hold at least one token; leave empty ones out")
        banned = {word[0] for word in bad_words if len(word) == 1}
        if params.min_tokens:
            banned |= self.stop_ids(params).union(self.eos_token_ids)
        if len(banned) >= self.vocab_size:
            raise RequestError(
                "bad_words", f"leave none of the {self.vocab_size} token ids of the vocabulary; name fewer"
            )

    def _check_logprobs(self, field: str, count: int | None) -> None:
        if count is None or self.max_logprobs < 0:
            return
        if (self.vocab_size if count < 0 else count) > self.max_logprobs:
            raise RequestError(
                field,
                f"{count} exceeds max_logprobs {self.max_logprobs}; ask for fewer or raise max_logprobs",
            )

    def _check_ids(self, field: str, ids: Iterable[int]) -> None:
        for token in ids:
            if type(token) is not int or not 0 <= token < self.vocab_size:
                raise RequestError(
                    field, f"token id {token!r} is out of range, the vocabulary has {self.vocab_size} ids"
                )
