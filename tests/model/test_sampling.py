"""Sampling: greedy, seeded, independent of the batch, and true to the distribution."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniserve.model.sampling import gumbel_noise, sample

NEGATIVE_INFINITY = float("-inf")


def test_greedy_takes_the_largest_and_the_lowest_id_on_a_tie() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 1.0, 5.0, 5.0], [-1.0, -2.0, -3.0, -0.5]])
    assert sample(logits, [0.0] * 3, [0] * 3, [0] * 3) == [1, 0, 3]


def test_greedy_ignores_seed_and_position() -> None:
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(3))
    assert len({sample(logits, [0.0], [seed], [seed * 7])[0] for seed in range(20)}) == 1


@given(
    seed=st.integers(-(2**70), 2**70),
    position=st.integers(0, 2**20),
    temperature=st.floats(0.01, 4.0),
    num_others=st.integers(0, 4),
)
@settings(max_examples=60, deadline=None)
def test_a_row_depends_on_its_own_seed_and_position_alone(
    seed: int, position: int, temperature: float, num_others: int
) -> None:
    logits = torch.randn(num_others + 1, 64, generator=torch.Generator().manual_seed(5))
    alone = sample(logits[:1], [temperature], [seed], [position])
    others = list(range(num_others))
    batch = sample(
        logits,
        [temperature, *(0.0 if i % 2 else 1.0 for i in others)],
        [seed, *others],
        [position, *others],
    )
    assert batch[0] == alone[0]


def test_frequencies_follow_the_softmax() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0, 0.5]])
    temperature, num_draws = 0.8, 20_000
    expected = torch.softmax(logits[0].double() / temperature, 0).numpy()
    draws = [sample(logits, [temperature], [7], [position])[0] for position in range(num_draws)]
    counts = np.bincount(draws, minlength=5)
    # Chi-square with 4 degrees of freedom: 23.5 is exceeded once in 10,000 seeds; this seed is fixed.
    chi_square = float((((counts - num_draws * expected) ** 2) / (num_draws * expected)).sum())
    assert chi_square < 23.5


def test_seeds_draw_independently_of_each_other() -> None:
    logits = torch.zeros(1, 8)
    draws = [sample(logits, [1.0], [seed], [0])[0] for seed in range(8000)]
    assert np.abs(np.bincount(draws, minlength=8) - 1000).max() < 150


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((1, 50), NEGATIVE_INFINITY)
    logits[0, [3, 17, 41]] = torch.tensor([0.0, -1.0, 1.0])
    draws = {sample(logits, [2.0], [1], [position])[0] for position in range(500)}
    assert draws == {3, 17, 41}


def test_a_small_temperature_approaches_greedy() -> None:
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(9))
    best = int(logits.argmax())
    assert all(sample(logits, [1e-4], [2], [position]) == [best] for position in range(50))


def test_noise_is_finite_and_differs_between_positions_and_seeds() -> None:
    noises = [gumbel_noise(seed, position, 1000) for seed in (0, 1, -1) for position in (0, 1)]
    assert all(np.isfinite(noise).all() for noise in noises)
    assert len({noise.tobytes() for noise in noises}) == len(noises)


def test_noise_of_a_token_does_not_depend_on_the_vocabulary() -> None:
    assert np.array_equal(gumbel_noise(4, 2, 100), gumbel_noise(4, 2, 1000)[:100])
