"""The filter that corrects a fitted model: what the moment does to it, and that it cannot come apart."""

from __future__ import annotations

import random
from collections.abc import Iterable
from statistics import mean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniserve.policy.correction import PARTS, Correction

WALK = (0.006, 0.002, 0.0015, 0.0005)
FITTED_S = sum(WALK)


def speed(correction: Correction) -> float:
    """How much longer than fitted the next walk is expected to take."""
    return correction.apply(WALK, 0.0) / FITTED_S


def observe(correction: Correction, factors: Iterable[float]) -> None:
    """Walks that take so many times what was fitted."""
    for factor in factors:
        correction.observe(WALK, 0.0, FITTED_S * factor)


def noisy(rng: random.Random, centre: float, count: int) -> list[float]:
    return [rng.gauss(centre, 0.02) for _ in range(count)]


def settled(seed: int) -> tuple[Correction, random.Random]:
    """It has seen a hundred walks as fitted, with the noise of a quiet machine."""
    rng, correction = random.Random(seed), Correction()
    observe(correction, noisy(rng, 1.0, 100))
    return correction, rng


# ---------------------------------------------------------------- the moment


def test_a_burst_of_slow_walks_is_followed_within_a_few_and_over_as_soon() -> None:
    before, inside, after = [], [], []
    for seed in range(40):
        correction, rng = settled(seed)
        before.append(speed(correction))
        observe(correction, noisy(rng, 1.08, 6))
        inside.append(speed(correction))
        observe(correction, noisy(rng, 1.0, 6))
        after.append(speed(correction))
    assert mean(before) == pytest.approx(1.0, abs=0.01)
    assert mean(inside) > 1.04, "most of it"
    assert mean(after) == pytest.approx(1.0, abs=0.02)


def test_the_machine_is_not_taken_for_slow_after_a_short_burst() -> None:
    """Parts keep their own factors: nearly all of the burst went to the moment."""
    dense = []
    for seed in range(40):
        correction, rng = settled(seed)
        observe(correction, noisy(rng, 1.08, 3))
        dense.append(correction.factors[PARTS.index("dense")])
    assert mean(dense) == pytest.approx(1.0, abs=0.04)


def test_an_outlier_does_not_move_the_moment() -> None:
    for factor in (8.0, 0.2):
        correction, rng = settled(1)
        observe(correction, noisy(rng, 1.05, 3))
        moment, before = correction.factors[-1], speed(correction)
        observe(correction, [factor])
        assert 0 < correction.factors[-1] < moment, "it passed by itself"
        assert speed(correction) == pytest.approx(before, abs=0.06)


def test_another_machine_leaves_the_moment_behind() -> None:
    correction, rng = settled(2)
    observe(correction, noisy(rng, 1.1, 3))
    assert correction.factors[-1] > 0.02
    observe(correction, [3.0] * 3)
    assert correction.factors[-1] == 0.0
    assert speed(correction) == pytest.approx(3.0, rel=0.02)


# ---------------------------------------------------------------- whatever is seen

parts = st.tuples(*[st.floats(0.0, 0.05) for _ in PARTS]).filter(lambda p: sum(p) > 1e-6)
walks = st.tuples(parts, st.floats(0.0, 1.0), st.floats(-6.0, 4.0).map(lambda power: 10.0**power))
# One that behaves for a while, so that the filter is sure of itself before it meets something.
streams = st.lists(walks | st.just((WALK, 0.0, 1.0)) | st.just((WALK, 0.5, 1.2)), max_size=60)


@settings(deadline=None)
@given(streams)
def test_uncertainty_stays_finite_and_no_direction_has_less_than_none(
    stream: list[tuple[tuple[float, ...], float, float]],
) -> None:
    correction = Correction()
    start = np.array(correction._covariance)
    for fitted, share, factor in stream:
        correction.observe(fitted, share, sum(fitted) * factor)
        covariance = np.array(correction._covariance)
        assert np.isfinite(covariance).all()
        assert np.isfinite(correction.factors).all()
        scale = covariance.diagonal().max()
        assert np.allclose(covariance, covariance.T, rtol=0, atol=1e-9 * scale)
        assert np.linalg.eigvalsh(covariance).min() >= -1e-9 * scale
        assert (covariance.diagonal()[:-1] <= start.diagonal()[:-1] * (1 + 1e-9)).all(), "but for the moment"


@settings(deadline=None)
@given(streams, parts, st.sampled_from(range(len(PARTS))), st.floats(0.0, 0.05), st.floats(0.0, 1.0))
def test_more_of_a_part_never_takes_less_time_whatever_was_learned(
    stream: list[tuple[tuple[float, ...], float, float]],
    less: tuple[float, ...],
    index: int,
    more_s: float,
    share: float,
) -> None:
    correction = Correction()
    for fitted, busy, factor in stream:
        correction.observe(fitted, busy, sum(fitted) * factor)
    more = [*less[:index], less[index] + more_s, *less[index + 1 :]]
    assert correction.apply(more, share) >= correction.apply(less, share) > 0
