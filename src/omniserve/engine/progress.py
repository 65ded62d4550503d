"""Progress: one request's growing texts, with stop strings, on the caller's side of the engine."""

from __future__ import annotations

from collections.abc import Sequence

from omniserve.engine.messages import Token
from omniserve.model.tokenizer import Tokenizer
from omniserve.types import (
    CompletionOutput,
    FinishReason,
    Logprob,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)


class Progress:
    """Takes in tokens of the `n` texts of one request. What it holds grows; `output` is how it stands.

    texts: in order of their index.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        name: str,
        prompt: Sequence[int],
        params: SamplingParams,
        arrived_s: float,
        queued_s: float | None = None,
    ) -> None:
        """arrived_s: at the API; queued_s: handed to the engine, None: at once. Both time.monotonic()."""
        self._tokenizer = tokenizer
        self._name = name
        self._prompt = list(prompt)
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self.texts = [Text(tokenizer, i, params, arrived_s, queued_s) for i in range(params.n)]
        self._num_open = params.n

    @property
    def is_finished(self) -> bool:
        """Whether every text has ended."""
        return self._num_open == 0

    def has_ended(self, index: int) -> bool:
        """Whether the text of this index has ended, by itself or by a stop string."""
        return self.texts[index].is_finished

    def push(self, token: Token, arrived_s: float, index: int = 0) -> None:
        """One more token of text `index`, which arrived at `arrived_s` (time.monotonic()).

        A token that was under way when its text ended changes nothing.
        """
        if token.prompt_logprobs is not None:
            self._prompt_logprobs = [p and _by_id(self._tokenizer, p) for p in token.prompt_logprobs]
        text = self.texts[index]
        if not text.is_finished:
            text.push(token, arrived_s)
            self._num_open -= text.is_finished

    def abort(self) -> None:
        """Ended by the caller; texts that had ended before keep their reason."""
        for text in self.texts:
            text.abort()
        self._num_open = 0

    def output(self) -> RequestOutput:
        """As it stands now. It copies all there is: not for every token of a long text."""
        texts = [text.output() for text in self.texts]
        return RequestOutput(self._name, self._prompt, texts, self._prompt_logprobs)


class Text:
    """One growing text. index, token_ids, logprobs, finish_reason: as in CompletionOutput, so far.

    A stop string ends it before its first occurrence, also when it spans tokens; until it can no longer begin
    there, the end of the text is held back, so that text once given never shrinks.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        index: int,
        params: SamplingParams,
        arrived_s: float,
        queued_s: float | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self.index = index
        self._params = params
        self._stops = tuple(params.stop or ())
        self._held = 0
        if not params.include_stop_str_in_output:
            self._held = max((len(s) - 1 for s in self._stops), default=0)
        self._stream = tokenizer.stream(params.skip_special_tokens)
        self._text = ""
        self._searched = 0
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self._sum: float | None = None if params.logprobs is None else 0.0
        self.finish_reason: FinishReason | None = None
        self._stop_reason: int | str | None = None
        self._num_lane_tokens = 0
        self._is_exact = True
        self._num_cached_tokens = 0
        self._arrived_s = arrived_s
        self._queued_s = 0.0 if queued_s is None else queued_s - arrived_s
        self._started_s: float | None = None
        self._first_s: float | None = None
        self._last_s = arrived_s
        self._output: CompletionOutput | None = None

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def push(self, token: Token, arrived_s: float) -> None:
        self._output = None
        self._last_s = arrived_s
        if self._first_s is None:
            self._first_s = self._last_s
            self._started_s = None if token.started_s is None else token.started_s - self._arrived_s
        self.token_ids.append(token.token_id)
        self.finish_reason = token.finish_reason
        self._num_lane_tokens += token.by_lane
        self._is_exact = self._is_exact and token.is_exact
        self._num_cached_tokens = token.num_cached
        if token.logprobs is not None and self.logprobs is not None and self._sum is not None:
            self.logprobs.append(_by_id(self._tokenizer, token.logprobs))
            self._sum += token.logprobs.logprobs[0]
        self._grow(token)
        if len(self.token_ids) > self._params.min_tokens:
            self._stop_at_string()
        self._searched = len(self._text)

    def _grow(self, token: Token) -> None:
        is_stop = token.finish_reason == "stop"
        if is_stop and token.token_id in (self._params.stop_token_ids or ()):
            self._stop_reason = token.token_id
        if not is_stop or self._params.include_stop_str_in_output:
            self._text += self._stream.push(token.token_id)
        if self.finish_reason is not None:
            self._text += self._stream.finish()

    def _stop_at_string(self) -> None:
        """End at the earliest stop string whose last character is new; of two there, the first given."""
        found = [(at, s) for s in self._stops if (at := self._find(s)) >= 0]
        if not found:
            return
        first, stop = min(found, key=lambda f: f[0])
        self._text = self._text[: first + (len(stop) if self._params.include_stop_str_in_output else 0)]
        self.finish_reason, self._stop_reason = "stop", stop

    def _find(self, stop: str) -> int:
        return self._text.find(stop, max(0, self._searched - len(stop) + 1))

    def abort(self) -> None:
        self._output = None
        self.finish_reason = self.finish_reason or "abort"

    @property
    def text(self) -> str:
        """What may be shown."""
        if self.is_finished or not self._held:
            return self._text
        return self._text[: max(0, len(self._text) - self._held)]

    def output(self) -> CompletionOutput:
        """As it stands now; the same object until something is new."""
        if self._output is None:
            self._output = CompletionOutput(
                self.index,
                list(self.token_ids),
                self.text,
                self.finish_reason,
                self._stop_reason,
                None if self.logprobs is None else list(self.logprobs),
                self._sum,
                self._metrics(),
            )
        return self._output

    def _metrics(self) -> RequestMetrics:
        if self._first_s is None:
            return RequestMetrics()
        later = len(self.token_ids) - 1
        tpot_s = (self._last_s - self._first_s) / later if later else None
        ttft_s = self._first_s - self._arrived_s
        return RequestMetrics(
            ttft_s,
            tpot_s,
            self._num_lane_tokens,
            self._is_exact,
            self._num_cached_tokens,
            self._queued_s,
            self._started_s,
            self._last_s - self._arrived_s,
        )


def _by_id(tokenizer: Tokenizer, position: TokenLogprobs) -> dict[int, Logprob]:
    """Token id -> Logprob: the chosen token first, then the most likely ones by rank."""
    ranks = [position.rank, *range(1, len(position.ids))]
    found: dict[int, Logprob] = {}
    for token, logprob, rank in zip(position.ids, position.logprobs, ranks, strict=True):
        if token not in found:
            text = tokenizer.decode([token], skip_special_tokens=False)
            found[token] = Logprob(logprob, rank, text)
    return found
