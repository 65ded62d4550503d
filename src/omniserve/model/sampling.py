"""Next-token choice: pure functions of logits, temperature, seed and position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
from torch import Tensor

_UINT64 = 2**64
# Smallest exponential draw: keeps the noise finite where the uniform draw is exactly 0.
_TINY = 2.0**-60


def sample(
    logits: Tensor, temperatures: Sequence[float], seeds: Sequence[int], positions: Sequence[int]
) -> list[int]:
    """One token id for each row of logits [n, vocab] float32.

    Temperature 0 takes the largest logit, the lowest id on an exact tie. A temperature above 0 draws from
    softmax(logits / temperature) by the Gumbel-max rule with noise that depends on (seed, position, token id)
    alone. `positions[i]` is the index in its sequence of the token being chosen; equal seeds thus give equal
    text whatever else is in the batch, on lanes and after a re-prefill too.
    """
    ids = cast("list[int]", logits.argmax(dim=-1).tolist())
    for row, temperature in enumerate(temperatures):
        if temperature > 0.0:
            ids[row] = _draw(logits[row], temperature, seeds[row], positions[row])
    return ids


def _draw(logits: Tensor, temperature: float, seed: int, position: int) -> int:
    scores = logits.double().numpy(force=True) / temperature
    return int(np.argmax(scores + gumbel_noise(seed, position, len(scores))))


def gumbel_noise(seed: int, position: int, size: int) -> npt.NDArray[np.float64]:
    """Standard Gumbel noise [size] for token ids 0..size-1: -ln(-ln u), u from Philox-4x64.

    The key is the seed; the position is the counter's second word, so that positions are 2**64 blocks apart.
    """
    bits = np.random.Philox(key=seed % _UINT64, counter=[0, position, 0, 0])
    exponential = -np.log1p(-np.random.Generator(bits).random(size))
    return cast("npt.NDArray[np.float64]", -np.log(np.maximum(exponential, _TINY)))
