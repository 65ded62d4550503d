"""What changes a request's logits before a token is chosen: logit bias, bad words, min_tokens, penalties."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class TokenCounts:
    """How often each token was generated, for the tokens that occur at all; grows with one push per token.

    Tokens of the prompt are there with count 0. Memory and the cost of a penalty follow the number of
    distinct tokens, not the vocabulary and not the length.
    """

    def __init__(self, prompt: Iterable[int]) -> None:
        distinct = list(dict.fromkeys(prompt))
        self._index = {token: i for i, token in enumerate(distinct)}
        self._ids: Ids = np.array(distinct, dtype=np.int64)
        self._counts: Floats = np.zeros(len(distinct), dtype=np.float32)

    @property
    def ids(self) -> Ids:
        """Distinct token ids, in order of their first occurrence."""
        return self._ids[: len(self._index)]

    @property
    def counts(self) -> Floats:
        """How often each of `ids` was generated."""
        return self._counts[: len(self._index)]

    def push(self, token: int) -> None:
        """Count a generated token."""
        at = self._index.setdefault(token, len(self._index))
        if at == len(self._ids):
            room = max(64, 2 * at)
            self._ids = np.resize(self._ids, room) if at else np.zeros(room, dtype=np.int64)
            self._counts = np.concatenate([self._counts, np.zeros(room - at, dtype=np.float32)])
        self._ids[at] = token
        self._counts[at] += 1


class TokenRules:
    """The rules of one request and what they need to know of its text: one push per generated token.

    State belongs to the request, not to a row: it stays right on the device, in a lane and after a drop.
    """

    def __init__(
        self,
        *,
        prompt: Sequence[int] = (),
        logit_bias: Mapping[int, float] | None = None,
        bad_words: Sequence[Sequence[int]] = (),
        min_tokens: int = 0,
        stop_ids: Iterable[int] = (),
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
    ) -> None:
        """bad_words: sequences of at least one id. stop_ids: banned before `min_tokens` tokens are there."""
        bias = logit_bias or {}
        self.bias_ids: Ids = np.array(list(bias), dtype=np.int64)
        self.biases: Floats = np.array(list(bias.values()), dtype=np.float32)
        self.penalties = (repetition_penalty, presence_penalty, frequency_penalty)
        self.counts: TokenCounts | None = None
        if self.penalties != (1.0, 0.0, 0.0):
            # Only repetition looks at the prompt.
            self.counts = TokenCounts(prompt if repetition_penalty != 1.0 else ())
        self._min_tokens = min_tokens
        self._num_generated = 0
        always = {word[0] for word in bad_words if len(word) == 1}
        self._always: Ids = np.array(sorted(always), dtype=np.int64)
        self._early: Ids = np.array(sorted(always.union(stop_ids)), dtype=np.int64)
        # Longer bad words by the token that must have come last for their own last one to be banned.
        self._by_last: dict[int, list[tuple[tuple[int, ...], int]]] = {}
        for *head, last in (word for word in bad_words if len(word) > 1):
            self._by_last.setdefault(head[-1], []).append((tuple(head), last))
        self._recent: list[int] = []
        self._reach = max((len(word) - 1 for word in bad_words), default=0)

    @property
    def is_empty(self) -> bool:
        """Whether the logits stay as they are, now and later."""
        bans = len(self._always) or self._by_last or self._min_tokens
        return self.counts is None and not len(self.bias_ids) and not bans

    def push(self, token: int) -> None:
        """Take note of a generated token."""
        self._num_generated += 1
        if self.counts is not None:
            self.counts.push(token)
        if self._reach:
            self._recent = [*self._recent, token][-self._reach :]

    def banned(self) -> Ids:
        """Token ids that must not come next."""
        bans = self._early if self._num_generated < self._min_tokens else self._always
        if not self._recent:
            return bans
        words = self._by_last.get(self._recent[-1], ())
        ends = [last for head, last in words if tuple(self._recent[-len(head) :]) == head]
        return np.append(bans, ends).astype(np.int64) if ends else bans


def apply_rules(logits: Tensor, rows: Sequence[int], rules: Sequence[TokenRules]) -> None:
    """Change the given rows of logits [n, vocab] in place: bias, then bans (-inf), then penalties.

    One gather and one scatter for all rows together; work follows the tokens that the rules name.
    """
    flat, size = logits.view(-1), logits.shape[1]
    pairs = list(zip(rows, rules, strict=True))
    biased = [(row, r) for row, r in pairs if len(r.bias_ids)]
    if biased:
        values = torch.from_numpy(np.concatenate([r.biases for _, r in biased]))
        flat.index_add_(0, _flat_index([(row, r.bias_ids) for row, r in biased], size), values)
    bans = _flat_index([(row, r.banned()) for row, r in pairs], size)
    if len(bans):
        flat.index_fill_(0, bans, float("-inf"))
    _penalise(flat, size, [(row, r) for row, r in pairs if r.counts is not None and len(r.counts.ids)])


def _flat_index(ids_of_rows: Sequence[tuple[int, Ids]], size: int) -> Tensor:
    return torch.from_numpy(np.concatenate([row * size + ids for row, ids in ids_of_rows]))


def _penalise(flat: Tensor, size: int, pairs: Sequence[tuple[int, TokenRules]]) -> None:
    if not pairs:
        return
    counted = [(row, r.counts, r.penalties) for row, r in pairs if r.counts is not None]
    index = _flat_index([(row, c.ids) for row, c, _ in counted], size)
    counts = torch.from_numpy(np.concatenate([c.counts for _, c, _ in counted]))
    lengths = torch.tensor([len(c.ids) for _, c, _ in counted])
    penalties = torch.tensor([p for _, _, p in counted], dtype=torch.float32)
    repetition, presence, frequency = penalties.repeat_interleave(lengths, dim=0).unbind(1)
    values = flat[index]
    values = torch.where(values > 0, values / repetition, values * repetition)
    flat[index] = values - frequency * counts - presence * (counts > 0)
