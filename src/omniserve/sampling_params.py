"""SamplingParams: how to choose the tokens of one request. Names, defaults and meanings are vLLM's."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from numbers import Real
from typing import NoReturn, TypeGuard

from omniserve.errors import RequestError

logger = logging.getLogger("omniserve")

# A temperature above 0 is at least this: logits are divided by it.
MIN_TEMPERATURE = 0.01
MAX_TEMPERATURE = 100.0
MAX_BIAS = 100.0
MAX_N = 16384
# Of counts that the engine gets; no context and no vocabulary is as large.
MAX_COUNT = 2**31 - 1
# Of a token id that is a key of JSON; one that is longer is in no vocabulary.
MAX_DIGITS = 10


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose the tokens of one request; docs/sampling.md has ranges, order and what a seed promises.

    n: texts for one prompt, each with a seed of its own. temperature 0 is greedy, and then n must be 1.
    top_k (0 or -1: off), top_p (1: off), min_p (0: off) restrict the choice to likely tokens.
    presence_penalty, frequency_penalty: subtracted from the logits of generated tokens, the latter times
    their count; repetition_penalty divides those of tokens in prompt or output (1: off).
    logit_bias: token id -> added to its logit, clamped to [-100, 100]. bad_words: never completed.
    seed fixes the noise: the same text whatever else is in the batch. None or -1: the engine chooses one.
    stop strings end the text before them, stop_token_ids at them; include_stop_str_in_output keeps either in
    the text. Neither ends it within the first min_tokens tokens, nor does the model's end of text, which
    ignore_eos takes as any other token. max_tokens None: as many as max_model_len allows.
    logprobs, prompt_logprobs: so many most likely tokens besides the chosen one, at each output and prompt
    position (0: the chosen one alone, -1: all, None: off).
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    bad_words: Sequence[str] | None = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        """Bring fields to their exact types; RequestError naming the first that is wrong."""
        self._check_counts()
        self._check_penalties()
        self._check_choice()
        self._check_stops()
        self._check_flags()
        self._check_bias()

    def _refuse(self, name: str, must: str) -> NoReturn:
        raise RequestError(name, f"must {must}, got {getattr(self, name)!r:.200}")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _number(self, name: str, must: str, low: float, high: float) -> float:
        value: object = getattr(self, name)
        if type(value) is bool or not isinstance(value, Real) or not low <= _as_float(value) <= high:
            self._refuse(name, must)
        self._set(name, _as_float(value))
        return _as_float(value)

    def _check_counts(self) -> None:
        if not _is_int(self.n, 1, MAX_N):
            self._refuse("n", f"be an integer in [1, {MAX_N}]")
        if self.max_tokens is not None and not _is_int(self.max_tokens, 1, MAX_COUNT):
            self._refuse("max_tokens", f"be an integer in [1, {MAX_COUNT}], or None")
        if not _is_int(self.min_tokens, 0, MAX_COUNT):
            self._refuse("min_tokens", f"be an integer in [0, {MAX_COUNT}]")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            self._refuse("min_tokens", f"be at most max_tokens {self.max_tokens}; raise that or lower this")
        for name in ("logprobs", "prompt_logprobs"):
            value: object = getattr(self, name)
            if value is True:  # OpenAI chat requests say so
                self._set(name, 1)
            elif value is not None and not _is_int(value, -1, MAX_COUNT):
                must = f"be an integer in [0, {MAX_COUNT}], -1 for the whole vocabulary, or None"
                self._refuse(name, must)

    def _check_penalties(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            self._number(name, "be a number in [-2, 2]", -2.0, 2.0)
        name, must = "repetition_penalty", "be a finite number above 0 (1 is off)"
        penalty = self._number(name, must, 0.0, float("inf"))
        if penalty == 0 or not isfinite(penalty):
            self._refuse(name, must)

    def _check_choice(self) -> None:
        must = f"be a number in [0, {MAX_TEMPERATURE:g}] (0 is greedy)"
        temperature = self._number("temperature", must, 0.0, MAX_TEMPERATURE)
        if 0 < temperature < MIN_TEMPERATURE:
            logger.warning("temperature %s is raised to %s", temperature, MIN_TEMPERATURE)
            self._set("temperature", MIN_TEMPERATURE)
        if self._number("top_p", "be a number in (0, 1] (1 is off)", 0.0, 1.0) == 0:
            self._refuse("top_p", "be a number in (0, 1] (1 is off)")
        if not _is_int(self.top_k, -1, MAX_COUNT):
            self._refuse("top_k", f"be an integer in [1, {MAX_COUNT}], or 0 (or -1) for off")
        self._set("top_k", max(0, self.top_k))
        self._number("min_p", "be a number in [0, 1] (0 is off)", 0.0, 1.0)
        if temperature == 0:
            if self.n > 1:
                self._refuse("n", "be 1 when temperature is 0 (greedy texts are equal); raise temperature")
            self._set("top_p", 1.0)
            self._set("top_k", 0)
            self._set("min_p", 0.0)
        if self.seed is not None and not _is_int(self.seed, -(2**63), 2**63 - 1):
            self._refuse("seed", "be an integer in [-2**63, 2**63), or None")
        if self.seed == -1:
            self._set("seed", None)

    def _check_stops(self) -> None:
        if isinstance(self.stop, str):
            self._set("stop", (self.stop,))
        for name in ("stop", "bad_words"):
            words: object = () if getattr(self, name) is None else getattr(self, name)
            is_list = isinstance(words, Sequence) and not isinstance(words, str)
            if not is_list or not all(_is_text(w) and w for w in words):  # type: ignore[attr-defined]
                self._refuse(name, "be a list of non-empty texts" + (", or one" if name == "stop" else ""))
            self._set(name, tuple(dict.fromkeys(words)))  # type: ignore[call-overload]
        ids: object = () if self.stop_token_ids is None else self.stop_token_ids
        if not isinstance(ids, Sequence) or not all(_is_int(t, 0, MAX_COUNT) for t in ids):
            self._refuse("stop_token_ids", f"be a list of integers in [0, {MAX_COUNT}]")
        self._set("stop_token_ids", tuple(dict.fromkeys(ids)))

    def _check_flags(self) -> None:
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if type(getattr(self, name)) is not bool:
                self._refuse(name, "be True or False")

    def _check_bias(self) -> None:
        bias: object = self.logit_bias
        if bias is None:
            return
        if not isinstance(bias, Mapping):
            self._refuse("logit_bias", "map token ids to numbers")
        clean: dict[int, float] = {}
        for token, value in bias.items():
            if type(value) is bool or not isinstance(value, Real):
                self._refuse("logit_bias", "map token ids to numbers")
            added = _as_float(value)
            if added != added:
                self._refuse("logit_bias", "map token ids to numbers in [-100, 100]")
            clean[self._token_id(token)] = min(MAX_BIAS, max(-MAX_BIAS, added))
        self._set("logit_bias", clean or None)

    def _token_id(self, key: object) -> int:
        """Of logit_bias, where keys of JSON are text."""
        if isinstance(key, str) and len(key) <= MAX_DIGITS and key.isdecimal():
            key = int(key)
        if not _is_int(key, 0, MAX_COUNT):
            self._refuse("logit_bias", f"map token ids, integers in [0, {MAX_COUNT}], to numbers")
        return key


def _as_float(value: Real) -> float:
    """Infinite where an integer is beyond every float."""
    try:
        return float(value)
    except OverflowError:
        return inf if abs(value) == value else -inf


def _is_int(value: object, low: int, high: int) -> TypeGuard[int]:
    """An exact integer within these bounds: True and 1.0 are none."""
    return type(value) is int and low <= value <= high


def _is_text(value: object) -> bool:
    """Text that can leave this process: a lone surrogate cannot."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
