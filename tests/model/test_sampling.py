"""Sampling: greedy, seeded, independent of the batch, true to the distribution, within the filters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniserve.model.sampling import WIDTHS, Chooser, gumbel_noise, logprobs_of, noise_keys, sample
from omniserve.model.token_rules import TokenRules
from omniserve.seeds import GAMMA, MASK_64, derive_seed, mix64, position_key

NEGATIVE_INFINITY = float("-inf")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine small operations on several threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_logits(rows: int, vocab: int, seed: int = 5, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def draw_many(logits: torch.Tensor, count: int, **chooser: Any) -> list[int]:
    """Tokens of `count` positions for one row of logits [1, vocab]."""
    many = logits.expand(count, -1)
    return sample(many, [Chooser(**{"temperature": 1.0, "seed": 7} | chooser)] * count, range(count))


# ---------------------------------------------------------------- a slow, plain reference


def plain_support(logits: Sequence[float], chooser: Chooser) -> set[int]:
    """Ids that min-p, then top-k, then top-p leave; whoever is as likely as the last one stays too."""
    scores = [x / chooser.temperature for x in logits]
    left = {i for i, x in enumerate(logits) if x > NEGATIVE_INFINITY}
    if chooser.min_p > 0:
        left = {i for i in left if scores[i] >= max(scores) + math.log(chooser.min_p)}
    if chooser.top_k > 0:
        last = sorted((logits[i] for i in left), reverse=True)[: chooser.top_k][-1]
        left = {i for i in left if logits[i] >= last}
    if chooser.top_p < 1:
        mass = math.fsum(math.exp(scores[i] - max(scores)) for i in left)
        before, last = 0.0, math.inf
        for i in sorted(left, key=lambda i: -logits[i]):
            if before >= chooser.top_p * mass:
                break
            before, last = before + math.exp(scores[i] - max(scores)), logits[i]
        left = {i for i in left if logits[i] >= last}
    return left


def plain_noise(seed: int, position: int, token: int) -> float:
    bits = mix64(position_key(seed, position) + (token + 1) * GAMMA)
    exponential = -math.log1p(-(bits >> 11) * 2.0**-53)
    return -math.log(max(exponential, 2.0**-60))


def plain_choice(logits: Sequence[float], chooser: Chooser, position: int) -> int:
    if chooser.temperature == 0:
        return max(range(len(logits)), key=lambda i: (logits[i], -i))
    return max(
        plain_support(logits, chooser),
        key=lambda i: (logits[i] / chooser.temperature + plain_noise(chooser.seed, position, i), -i),
    )


# ---------------------------------------------------------------- greedy


def test_greedy_takes_the_largest_and_the_lowest_id_on_a_tie() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 1.0, 5.0, 5.0], [-1.0, -2.0, -3.0, -0.5]])
    assert sample(logits, [Chooser()] * 3, [0] * 3) == [1, 0, 3]


def test_greedy_ignores_seed_and_position() -> None:
    logits = random_logits(1, 1000)
    assert len({sample(logits, [Chooser(seed=seed)], [seed * 7])[0] for seed in range(20)}) == 1


def test_a_small_temperature_approaches_greedy() -> None:
    logits = random_logits(1, 200)
    assert set(draw_many(logits, 50, temperature=1e-4)) == {int(logits.argmax())}


# ---------------------------------------------------------------- noise


@given(st.integers(-(2**70), 2**70), st.integers(0, 2**31), st.integers(0, 2**20))
def test_noise_is_the_hash_that_plain_integers_give(seed: int, position: int, token: int) -> None:
    noise = gumbel_noise(noise_keys([seed], [position]), torch.tensor([[token]]))
    assert float(noise) == pytest.approx(plain_noise(seed, position, token), rel=1e-12)


def test_noise_is_finite_and_differs_between_positions_and_seeds() -> None:
    ids = torch.arange(1000)[None]
    noises = [gumbel_noise(noise_keys([s], [p]), ids) for s in (0, 1, -1) for p in (0, 1)]
    assert all(bool(noise.isfinite().all()) for noise in noises)
    assert len({noise.numpy().tobytes() for noise in noises}) == len(noises)


def test_noise_has_the_mean_and_variance_of_a_gumbel_distribution_along_each_axis() -> None:
    """Over tokens, positions and seeds: mean 0.5772, variance pi^2 / 6; three draws in a row uncorrelated."""
    count = 200_000
    along_tokens = gumbel_noise(noise_keys([3], [4]), torch.arange(count)[None])[0]
    along_positions = gumbel_noise(noise_keys([3] * 20_000, range(20_000)), torch.tensor([[9]]))[:, 0]
    along_seeds = gumbel_noise(noise_keys(range(20_000), [4] * 20_000), torch.tensor([[9]]))[:, 0]
    for noise in (along_tokens, along_positions, along_seeds):
        deviation = 5 * math.sqrt(math.pi**2 / 6 / len(noise))
        assert abs(float(noise.mean()) - 0.57722) < deviation
        assert abs(float(noise.var()) - math.pi**2 / 6) < 4 * deviation
        for lag in (1, 2, 3):
            both = torch.stack((noise[:-lag], noise[lag:]))
            assert abs(float(torch.corrcoef(both)[0, 1])) < 5 / math.sqrt(len(noise))


def test_derived_seeds_keep_the_first_and_never_meet_those_of_neighbours() -> None:
    seeds = [derive_seed(seed, index) for seed in range(200) for index in range(20)]
    assert [derive_seed(seed, 0) for seed in range(200)] == list(range(200))
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed <= MASK_64 >> 1 for seed in seeds)


# ---------------------------------------------------------------- distribution


def chi_square(draws: Sequence[int], expected: np.ndarray) -> float:
    counts = np.bincount(draws, minlength=len(expected))
    assert not counts[expected == 0].any(), "a token outside the support"
    likely = expected > 0
    return float((((counts - len(draws) * expected) ** 2)[likely] / (len(draws) * expected[likely])).sum())


@pytest.mark.parametrize("temperature", [0.3, 0.8, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0, 0.5]])
    expected = torch.softmax(logits[0].double() / temperature, 0).numpy()
    # Chi-square with 4 degrees of freedom: 23.5 is exceeded once in 10,000 seeds; this seed is fixed.
    assert chi_square(draw_many(logits, 20_000, temperature=temperature), expected) < 23.5


@pytest.mark.parametrize(
    "filters", [{"top_k": 7}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.8, "min_p": 0.02}]
)
def test_frequencies_follow_the_renormalised_softmax_of_what_the_filters_leave(
    filters: dict[str, float],
) -> None:
    logits = random_logits(1, 40)
    support = plain_support(logits[0].tolist(), Chooser(temperature=1.3, **filters))
    assert 3 < len(support) < 15
    expected = torch.softmax(logits[0].double() / 1.3, 0).numpy()
    expected[[i for i in range(40) if i not in support]] = 0
    draws = draw_many(logits, 20_000, temperature=1.3, **filters)
    assert set(draws) <= support
    # At most 13 degrees of freedom: 40.9 is exceeded once in 10,000 seeds.
    assert chi_square(draws, expected / expected.sum()) < 40.9


def test_frequencies_over_a_large_vocabulary_follow_the_softmax() -> None:
    """Grouped into the 50 likeliest tokens and the rest, over seeds instead of positions."""
    logits = random_logits(1, 5000, scale=3.0)
    order = logits[0].argsort(descending=True).tolist()
    groups = {token: min(i, 50) for i, token in enumerate(order)}
    choosers = [Chooser(1.0, seed=seed) for seed in range(3000)]
    draws = [groups[token] for token in sample(logits.expand(3000, -1), choosers, [12] * 3000)]
    expected = np.zeros(51)
    for token, share in enumerate(torch.softmax(logits[0].double(), 0).tolist()):
        expected[groups[token]] += share
    # 50 degrees of freedom: 99.9 is exceeded once in 30,000.
    assert chi_square(draws, expected) < 99.9


def test_seeds_draw_independently_of_each_other() -> None:
    logits = torch.zeros(1, 8)
    choosers = [Chooser(1.0, seed=seed) for seed in range(8000)]
    draws = sample(logits.expand(8000, -1), choosers, [0] * 8000)
    assert np.abs(np.bincount(draws, minlength=8) - 1000).max() < 150


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((1, 50), NEGATIVE_INFINITY)
    logits[0, [3, 17, 41]] = torch.tensor([0.0, -1.0, 1.0])
    for filters in ({}, {"top_k": 5}, {"top_p": 0.99999}, {"min_p": 0.001}):
        assert set(draw_many(logits, 500, temperature=2.0, **filters)) == {3, 17, 41}


# ---------------------------------------------------------------- against the plain reference

# Few distinct values, so that ties at every border occur; the plain softmax sums exactly.
LOGITS = st.lists(
    st.sampled_from([-3.0, -1.0, 0.0, 0.5, 0.75, 2.0, NEGATIVE_INFINITY]), min_size=1, max_size=12
)
CHOOSERS = st.builds(
    Chooser,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    seed=st.integers(-(2**63), 2**63 - 1),
    top_k=st.sampled_from([0, 0, 1, 2, 3, 5, 50]),
    top_p=st.sampled_from([1.0, 1.0, 0.01, 0.33, 0.61, 0.87, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.21, 0.7, 1.0]),
)


@given(logits=LOGITS, chooser=CHOOSERS, position=st.integers(0, 2**20))
@settings(max_examples=400, deadline=None)
def test_any_combination_of_parameters_chooses_as_the_plain_reference(
    logits: list[float], chooser: Chooser, position: int
) -> None:
    values = [*logits, 1.0]  # something is possible
    assert sample(torch.tensor([values]), [chooser], [position]) == [plain_choice(values, chooser, position)]


@pytest.mark.parametrize("shape", ["peaked", "flat", "equal"])
@pytest.mark.parametrize(
    "filters", [{"top_k": 300}, {"top_p": 0.5}, {"min_p": 0.2}, {"top_k": 4300, "top_p": 0.9}]
)
def test_what_lies_beyond_the_tokens_looked_at_first_is_found_too(
    shape: str, filters: dict[str, Any]
) -> None:
    vocab = 4400
    assert WIDTHS[0] < vocab > WIDTHS[1]
    logits = random_logits(1, vocab, scale={"peaked": 5.0, "flat": 0.01, "equal": 0.0}[shape])
    chooser = Chooser(1.0, seed=3, **filters)
    expected = [plain_choice(logits[0].tolist(), chooser, position) for position in range(2)]
    assert sample(logits.expand(2, -1), [chooser] * 2, range(2)) == expected


@given(
    chooser=CHOOSERS,
    others=st.lists(CHOOSERS, max_size=5),
    place=st.integers(0, 5),
    position=st.integers(0, 2**20),
)
@settings(max_examples=150, deadline=None)
def test_a_row_depends_on_itself_alone(
    chooser: Chooser, others: list[Chooser], place: int, position: int
) -> None:
    logits = random_logits(len(others) + 1, 700)
    place = min(place, len(others))
    alone = sample(logits[place : place + 1], [chooser], [position])
    crowd = [*others[:place], chooser, *others[place:]]
    positions = [position if i == place else i for i in range(len(crowd))]
    assert sample(logits, crowd, positions)[place] == alone[0]


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 5.0])
def test_a_draw_from_all_tokens_finds_the_largest_sum_wherever_it_is(scale: float) -> None:
    """Flat logits put the winner far from the likeliest tokens, peaked ones among them."""
    count, vocab = 60, 3000
    logits = random_logits(count, vocab, scale=scale)
    choosers = [Chooser(0.5 + i % 3, seed=i) for i in range(count)]
    temperatures = torch.tensor([c.temperature for c in choosers])[:, None]
    noise = gumbel_noise(noise_keys(range(count), range(count)), torch.arange(vocab)[None])
    expected = (logits.double() / temperatures + noise).argmax(dim=-1).tolist()
    assert sample(logits, choosers, range(count)) == expected


def test_logits_stay_as_they_are() -> None:
    logits = random_logits(3, 300)
    before = logits.clone()
    rules = TokenRules(logit_bias={1: 5.0}, bad_words=[[2]], repetition_penalty=1.5, prompt=[3])
    sample(logits, [Chooser(0.0, rules=rules), Chooser(1.0, top_k=3), Chooser(1.0)], [0, 0, 0])
    assert torch.equal(logits, before)


# ---------------------------------------------------------------- log probabilities


def test_log_probabilities_are_those_of_the_raw_softmax_with_ranks() -> None:
    logits = random_logits(4, 1000)
    expected = torch.log_softmax(logits.double(), -1)
    ids = [5, int(logits[1].argmax()), 999, 0]
    found = logprobs_of(logits, ids, [3, 0, 20, -1])
    assert [len(f.ids) for f in found] == [4, 1, 21, 1001]
    for row, (token, position) in enumerate(zip(ids, found, strict=True)):
        assert position.ids[0] == token
        assert position.rank == 1 + int((logits[row] > logits[row, token]).sum())
        order = logits[row].argsort(descending=True).tolist()
        assert position.ids[1:] == order[: len(position.ids) - 1]
        reference = expected[row, position.ids].tolist()
        assert position.logprobs == pytest.approx(reference, abs=2e-5)
