"""The fit finds a made-up machine's costs again, through noise and walks that lost their core."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from omniserve.engine.latency_fit import WalkSample, fit_costs
from omniserve.policy.latency import WalkLoad
from omniserve.policy.latency_model import LatencyModel
from policy.latency_fits import IDLE, NUM_LAYERS, decodes, small_fit

MACHINE = LatencyModel(small_fit())


def random_load(rng: random.Random) -> WalkLoad:
    load = decodes(rng.randint(0, 16), rng.randint(1, 3000))
    for _ in range(rng.randint(0 if load.num_tokens else 1, 3)):
        load.add_chunk(rng.choice((0, 500, 1500)), rng.randint(2, 8))
    if rng.random() < 0.4:
        load.lane_rows = rng.randint(1, 40)
        load.copied_tokens = 16 * rng.randint(0, 4)
    load.num_samples += rng.randint(0, 2)
    return load


def samples(count: int, noise: float, lost: float = 0.0, factor: float = 1.0) -> list[WalkSample]:
    rng = random.Random(0)
    found = []
    for _ in range(count):
        load = random_load(rng)
        seconds = factor * MACHINE.walk_s(load, False) * rng.gauss(1, noise)
        found.append(WalkSample(load, seconds * (5 if rng.random() < lost else 1)))
    return found


def fitted(found: list[WalkSample]) -> tuple[LatencyModel, list[float]]:
    costs, errors = fit_costs(found, IDLE.dense, IDLE.head, NUM_LAYERS)
    return LatencyModel(small_fit(idle=costs)), errors


@pytest.mark.parametrize(("noise", "lost"), [(0.0, 0.0), (0.02, 0.0), (0.02, 0.1)])
def test_walks_that_were_not_in_it_are_predicted(noise: float, lost: float) -> None:
    model, _ = fitted(samples(150, noise, lost))
    rng = random.Random(9)
    for _ in range(100):
        load = random_load(rng)
        assert model.walk_s(load, False) == pytest.approx(MACHINE.walk_s(load, False), rel=0.005 + 2 * noise)


def test_a_walk_may_run_its_staircases_slower_than_they_run_alone() -> None:
    costs, _ = fit_costs(samples(150, 0.0, factor=1.2), IDLE.dense, IDLE.head, NUM_LAYERS)
    assert costs.dense.at(12) == pytest.approx(1.2 * IDLE.dense.at(12), rel=0.02)


def test_held_out_errors_are_as_large_as_the_noise() -> None:
    _, errors = fitted(samples(200, 0.05))
    assert len(errors) == 200
    spread = (sum(e**2 for e in errors) / len(errors)) ** 0.5
    assert 0.035 < spread < 0.08


def test_no_coefficient_is_negative_whatever_was_measured() -> None:
    rng = random.Random(3)
    noise = [WalkSample(random_load(rng), rng.uniform(0.001, 1)) for _ in range(30)]
    costs, _ = fit_costs(noise, IDLE.dense, IDLE.head, NUM_LAYERS)
    plain = replace(costs, dense=IDLE.dense, head=IDLE.head)
    assert all(getattr(plain, name) >= 0 for name in plain.__slots__ if name not in ("dense", "head"))
    assert costs.dense.at(1) >= 0


def test_few_samples_of_one_kind_leave_the_rest_free() -> None:
    costs, errors = fit_costs([WalkSample(decodes(1, 10), 0.02)], IDLE.dense, IDLE.head, NUM_LAYERS)
    assert len(errors) == 1
    assert costs.prefill_load_s == costs.lane_row_s == 0.0
