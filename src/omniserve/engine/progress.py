"""Progress: one request's growing text, with stop strings, on the caller's side of the engine."""

from __future__ import annotations

from collections.abc import Sequence

from omniserve.engine.messages import Token
from omniserve.model.tokenizer import Tokenizer
from omniserve.types import FinishReason, RequestMetrics, RequestOutput, SamplingParams


class Progress:
    """Takes in tokens, gives out cumulative outputs.

    A stop string ends the text before its first occurrence, also when it spans tokens; until it can no
    longer begin there, the end of the text is held back, so that text once given never shrinks.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        name: str,
        prompt: Sequence[int],
        params: SamplingParams,
        arrived_s: float,
    ) -> None:
        self._name = name
        self._prompt = list(prompt)
        self._stops = tuple(params.stop)
        self._stream = tokenizer.stream()
        self._text = ""
        self._tokens: list[int] = []
        self._reason: FinishReason | None = None
        self._num_lane_tokens = 0
        self._is_exact = True
        self._num_cached_tokens = 0
        self._arrived_s = arrived_s
        self._first_s: float | None = None
        self._last_s = arrived_s

    @property
    def is_finished(self) -> bool:
        return self._reason is not None

    def push(self, token: Token, arrived_s: float) -> RequestOutput:
        """The output with one more token, which arrived at `arrived_s` (seconds, time.monotonic())."""
        self._last_s = arrived_s
        if self._first_s is None:
            self._first_s = self._last_s
        self._tokens.append(token.token_id)
        self._reason = token.finish_reason
        self._num_lane_tokens += token.by_lane
        self._is_exact = self._is_exact and token.is_exact
        self._num_cached_tokens = token.num_cached
        searched = max(0, len(self._text) - self._longest_stop + 1)
        self._text += self._stream.push(token.token_id)
        if self._reason is not None:
            self._text += self._stream.finish()
        self._stop_at_string(searched)
        return self._output()

    def abort(self) -> RequestOutput:
        """The output as it stands, ended by the caller."""
        self._reason = "abort"
        return self._output()

    @property
    def _longest_stop(self) -> int:
        return max((len(s) for s in self._stops), default=0)

    def _stop_at_string(self, searched: int) -> None:
        found = [self._text.find(s, searched) for s in self._stops]
        first = min((at for at in found if at >= 0), default=-1)
        if first >= 0:
            self._text = self._text[:first]
            self._reason = "stop"

    def _output(self) -> RequestOutput:
        text = self._text
        if not self.is_finished and self._longest_stop > 1:
            text = text[: max(0, len(text) - self._longest_stop + 1)]
        return RequestOutput(
            self._name, self._prompt, list(self._tokens), text, self._reason, self._metrics()
        )

    def _metrics(self) -> RequestMetrics:
        if self._first_s is None:
            return RequestMetrics()
        later = len(self._tokens) - 1
        tpot_s = (self._last_s - self._first_s) / later if later else None
        ttft_s = self._first_s - self._arrived_s
        return RequestMetrics(ttft_s, tpot_s, self._num_lane_tokens, self._is_exact, self._num_cached_tokens)
