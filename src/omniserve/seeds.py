"""Seeds and their mixing: SplitMix64's finaliser on Python integers. No torch, no numpy."""

from __future__ import annotations

MASK_64 = 2**64 - 1
# The odd constants of SplitMix64: the step of its counter, and the two multipliers of its finaliser.
GAMMA = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def mix64(value: int) -> int:
    """A bijection of 64-bit integers in which every input bit changes about half of the output bits."""
    value &= MASK_64
    value = (value ^ (value >> 30)) * MULTIPLIERS[0] & MASK_64
    value = (value ^ (value >> 27)) * MULTIPLIERS[1] & MASK_64
    return value ^ (value >> 31)


def position_key(seed: int, position: int) -> int:
    """The 64-bit key of the noise of one position in the sequence of one seed."""
    return mix64(mix64(seed + GAMMA) + (position + 1) * GAMMA)


def derive_seed(seed: int, index: int) -> int:
    """The seed in [0, 2**63) of the index-th of several texts that share `seed`; the 0-th keeps it.

    Mixed rather than added, so that text 1 of seed 5 is not text 0 of seed 6.
    """
    return seed if index == 0 else mix64(mix64(seed) ^ mix64(index * GAMMA)) >> 1
