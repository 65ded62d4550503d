"""The choice of next tokens from logits, and log probabilities: pure functions of rows of logits.

Order for each row: logit bias, bans (bad words, min_tokens), penalties, temperature, min-p, top-k, top-p,
then the draw. Log probabilities are those of the logits as the model gave them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log
from typing import cast

import torch
from torch import Tensor

from omniserve.model.token_rules import TokenRules, apply_rules
from omniserve.seeds import GAMMA, MULTIPLIERS, position_key
from omniserve.types import TokenLogprobs

# Smallest exponential draw: keeps the noise finite where the uniform draw is exactly 0.
_TINY = 2.0**-60
# Most likely tokens looked at first; a row whose choice goes beyond them is looked at again with more.
WIDTHS = (256, 4096)
# Logits that rows drawn at once may have together: their temporaries stay in the cache.
BLOCK_SIZE = 100_000


@dataclass(slots=True)
class Chooser:
    """How to choose the next token of one request. top_k 0, top_p 1, min_p 0 and rules None are off."""

    temperature: float = 0.0
    seed: int = 0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    rules: TokenRules | None = None
    num_logprobs: int | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def is_filtered(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


def sample(logits: Tensor, choosers: Sequence[Chooser], positions: Sequence[int]) -> list[int]:
    """One token id for each row of logits [n, vocab] float32, which stay as they are.

    Temperature 0 takes the largest logit. Above 0 the token is drawn from the softmax of what the filters
    leave, by the Gumbel-max rule with noise that depends on (seed, position, token id) alone. `positions[i]`
    is the index in its sequence of the token being chosen; equal seeds thus give equal text whatever else is
    in the batch, on lanes and after a re-prefill too. On an exact tie the lowest id wins.
    """
    edited = [i for i, c in enumerate(choosers) if c.rules is not None]
    if edited:
        logits = logits.clone()
        apply_rules(logits, edited, [r for c in choosers if (r := c.rules) is not None])
    drawn = [i for i, c in enumerate(choosers) if not c.is_greedy]
    if not drawn:
        return cast("list[int]", logits.argmax(dim=-1).tolist())
    chosen = torch.empty(len(choosers), dtype=torch.int64)
    if len(drawn) < len(choosers):
        greedy = torch.tensor([i for i, c in enumerate(choosers) if c.is_greedy])
        chosen[greedy] = logits[greedy].argmax(dim=-1)
    vocab = logits.shape[1]
    block = max(1, BLOCK_SIZE // vocab)
    for rows in _blocks([i for i in drawn if not choosers[i].is_filtered], block):
        draw = _Draw.of(choosers, positions, rows)
        chosen[draw.rows] = _draw_from_all(logits[draw.rows], draw)
    for rows in _blocks([i for i in drawn if choosers[i].is_filtered], block):
        for width in (*(w for w in WIDTHS if w < vocab), vocab):
            draw = _Draw.of(choosers, positions, rows)
            tokens, is_certain = _draw_from_likely(logits[draw.rows], draw, width)
            chosen[draw.rows[is_certain]] = tokens[is_certain]
            rows = cast("list[int]", draw.rows[~is_certain].tolist())
            if not rows:
                break
    return cast("list[int]", chosen.tolist())


def _blocks(rows: list[int], size: int) -> Iterator[list[int]]:
    return (rows[i : i + size] for i in range(0, len(rows), size))


@dataclass(frozen=True, slots=True)
class _Draw:
    """Parameters of some rows as columns [m, 1]; keys are the noise's (int64), the rest float64 or int64."""

    rows: Tensor
    keys: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    log_min_p: Tensor

    @staticmethod
    def of(choosers: Sequence[Chooser], positions: Sequence[int], rows: Sequence[int]) -> _Draw:
        own = [choosers[i] for i in rows]

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64)[:, None]

        return _Draw(
            torch.tensor(rows, dtype=torch.int64),
            noise_keys([c.seed for c in own], [positions[i] for i in rows]),
            column([c.temperature for c in own]),
            torch.tensor([c.top_k for c in own])[:, None],
            column([c.top_p for c in own]),
            column([log(c.min_p) if c.min_p > 0 else float("-inf") for c in own]),
        )


def _draw_from_all(logits: Tensor, draw: _Draw) -> Tensor:
    """Tokens [m] drawn from rows [m, vocab] without a filter."""
    ids = torch.arange(logits.shape[1])[None]
    return (logits.double().div_(draw.temperature)).add_(gumbel_noise(draw.keys, ids)).argmax(dim=-1)


def _draw_from_likely(logits: Tensor, draw: _Draw, width: int) -> tuple[Tensor, Tensor]:
    """Tokens [m] drawn from the `width` most likely ones of rows [m, vocab], and whether they are certain:
    False where the filters leave more tokens than that.

    What the filters leave is decided by logits alone: tokens as likely as the last one left stay too, so
    that the order of equals plays no part.
    """
    vocab = logits.shape[1]
    if width < vocab:
        values, ids = logits.topk(width, dim=-1)
    else:
        values, ids = logits.sort(dim=-1, descending=True)
    scores = values.double() / draw.temperature
    scores -= scores[:, :1].clone()  # the best one is 0
    last = values.gather(1, (draw.top_k - 1).clamp(0, width - 1))
    has_top_k = draw.top_k > 0
    stays = (scores >= draw.log_min_p) & (~has_top_k | (values >= last)) & (values > float("-inf"))
    is_known = ~has_top_k[:, 0] | ~stays[:, -1]  # top-p needs all that top-k leaves
    if bool((draw.top_p < 1).any()):
        weights = scores.exp() * stays
        mass = weights.sum(dim=-1, keepdim=True)
        if width < vocab:
            more = stays[:, -1] & (draw.top_p[:, 0] < 1)
            mass[more] = _mass(logits[more], draw.temperature[more], draw.log_min_p[more])
        before = weights.cumsum(dim=-1) - weights
        stays &= (before < draw.top_p * mass) | (draw.top_p >= 1)
        least = values.masked_fill(~stays, float("inf")).amin(dim=-1, keepdim=True)
        stays = values >= least
    noisy = (scores + gumbel_noise(draw.keys, ids)).masked_fill_(~stays, float("-inf"))
    winners = ids.masked_fill(noisy < noisy.amax(dim=-1, keepdim=True), vocab)
    return winners.amin(dim=-1), (is_known & ~stays[:, -1]) | (width == vocab)


def _mass(logits: Tensor, temperature: Tensor, log_min_p: Tensor) -> Tensor:
    """Sum [m, 1] of exp(logits / temperature), relative to the largest, over what min-p leaves."""
    scores = (logits - logits.amax(dim=-1, keepdim=True)).div_(temperature.float())
    if bool((log_min_p > float("-inf")).any()):
        scores.masked_fill_(scores < log_min_p, float("-inf"))
    return scores.exp_().sum(dim=-1, keepdim=True, dtype=torch.float64)


# ---------------------------------------------------------------- noise


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit integer; torch's products wrap around."""
    return (value & (2**64 - 1)) - (2**64 if value & 2**63 else 0)


def noise_keys(seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
    """Keys [m, 1] int64, one for each (seed, position)."""
    keys = [_signed(position_key(s, p)) for s, p in zip(seeds, positions, strict=True)]
    return torch.tensor(keys, dtype=torch.int64)[:, None]


def gumbel_noise(keys: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise [m, k] float64 for token ids [m or 1, k] under keys [m, 1]: -ln(-ln u).

    u is the (token id + 1)-th output of a SplitMix64 generator that starts at the key: a hash, so that any
    token's noise can be had alone.
    """
    bits = (ids + 1) * _signed(GAMMA) + keys
    for shift, multiplier in ((30, MULTIPLIERS[0]), (27, MULTIPLIERS[1])):
        bits ^= (bits >> shift) & (2 ** (64 - shift) - 1)
        bits *= _signed(multiplier)
    bits ^= (bits >> 31) & (2**33 - 1)
    uniform = ((bits >> 11) & (2**53 - 1)).double().mul_(-(2.0**-53))
    return uniform.log1p_().neg_().clamp_(min=_TINY).log_().neg_()


# ---------------------------------------------------------------- log probabilities


def logprobs_of(logits: Tensor, ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """Log probabilities under rows of logits [n, vocab] float32 of one chosen id each, and of the most likely
    tokens of the row: counts[i] of them (-1: all)."""
    vocab = logits.shape[1]
    counts = [vocab if c < 0 else min(c, vocab) for c in counts]
    total = logits.logsumexp(dim=-1, keepdim=True)
    own = logits.gather(1, torch.tensor(ids, dtype=torch.int64)[:, None])
    ranks = (logits >= own).sum(dim=-1).tolist()
    chosen = (own - total)[:, 0].tolist()
    values, likely = logits.topk(max(counts), dim=-1)
    values -= total
    found = []
    for i, count in enumerate(counts):
        top_ids, top_values = likely[i, :count].tolist(), values[i, :count].tolist()
        found.append(TokenLogprobs([ids[i], *top_ids], [chosen[i], *top_values], ranks[i]))
    return found
