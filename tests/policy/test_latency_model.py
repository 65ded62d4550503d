"""What LatencyModel promises the scheduler: sums that can be checked by hand, monotone, learning, safe."""

from __future__ import annotations

import json
import random
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniserve.policy.latency import WalkLoad
from omniserve.policy.latency_model import (
    ENOUGH_WALKS,
    KINDS,
    LONG_AGO_WALKS,
    LatencyFit,
    LatencyModel,
    kind_of,
    load_of,
)
from omniserve.policy.plan import DeviceRows, PageCopy, Step
from policy.latency_fits import MS, NUM_LAYERS, decodes, small_fit

loads = st.builds(
    WalkLoad,
    num_tokens=st.integers(1, 100),
    num_decodes=st.integers(0, 40),
    decode_context=st.integers(0, 100_000),
    prefill_load=st.integers(0, 1_000_000),
    num_samples=st.integers(0, 60),
    lane_rows=st.integers(0, 200),
    num_chunks=st.integers(0, 4),
    chunk_context=st.integers(0, 8000),
    copied_tokens=st.integers(0, 128),
)
shares = st.floats(0, 1)


def taught(model: LatencyModel, seed: int, walks: int = 50) -> LatencyModel:
    """A model after some walks of a machine that is not quite the fitted one."""
    rng = random.Random(seed)
    for _ in range(walks):
        load = decodes(rng.randint(1, 16), rng.randint(1, 4000))
        load.lane_rows = rng.choice((0, 0, 8, 40))
        model.observe(load, rng.random(), rng.uniform(0.5, 3) * model.walk_s(load, False))
    return model


# ---------------------------------------------------------------- sums


def test_a_walk_of_decodes_is_the_sum_of_its_parts() -> None:
    model = LatencyModel(small_fit())
    dense, head, overhead = 10, 2, 0.5 + 8 * 0.02
    attention = 0.1 + 8 * 0.01 + 8 * 1000 * 0.001
    assert model.walk_s(decodes(8, 1000), False) == pytest.approx((dense + head + attention + overhead) * MS)


def test_a_chunk_pays_for_its_pairs_of_tokens_and_the_kv_before_it() -> None:
    load = WalkLoad()
    load.add_chunk(100, 16)
    load.num_samples = 1
    pairs = sum(range(101, 117))
    attention = 0.2 + pairs * 0.0001 + 116 * 0.001
    assert load.prefill_load == pairs
    assert LatencyModel(small_fit()).walk_s(load, False) == pytest.approx(
        (20 + 2 + attention + 0.5 + 0.02) * MS
    )


def test_lane_rows_ride_in_the_dense_modules_as_their_mean_over_layers() -> None:
    load = decodes(8, 1)
    without = LatencyModel(small_fit()).walk_s(load, False)
    load.lane_rows = 4 * NUM_LAYERS  # four at every layer: 12 rows, half way from 10 ms to 20 ms
    with_lanes = LatencyModel(small_fit()).walk_s(load, False)
    assert with_lanes - without == pytest.approx((5 + 0.3 + 16 * 0.05) * MS)


def test_half_a_busy_host_costs_half_of_what_a_busy_one_does() -> None:
    model, load = LatencyModel(small_fit()), decodes(1, 10)
    idle, half, busy = (model.walk_s(load, share) for share in (False, 0.5, True))
    assert busy - idle == pytest.approx(5 * MS)
    assert half - idle == pytest.approx(2.5 * MS)


def test_a_pass_is_one_layers_share_of_the_dense_modules() -> None:
    model = LatencyModel(small_fit())
    assert model.pass_s(8, False) == pytest.approx((10 / NUM_LAYERS + 0.1 + 8 * 0.05) * MS)
    assert model.pass_s(0, True) == 0.0


def test_host_attention_and_copies_are_a_start_and_a_rate() -> None:
    model = LatencyModel(small_fit())
    assert model.host_attention_s(1_000_000) == pytest.approx(0.02 * MS + 0.1 * MS)
    assert model.copy_s(1_000_000) == pytest.approx(0.1 * MS + 0.2 * MS)
    assert LatencyModel(small_fit(host_bytes_per_s=0.0)).host_attention_s(1) == float("inf")


def test_a_load_is_what_the_device_carries_out() -> None:
    def rows(start: int, count: int, samples: bool, is_prefill: bool) -> DeviceRows:
        return DeviceRows(0, start, count, samples, is_prefill, ())

    step = Step(
        "walk",
        rows=(
            rows(9, 1, True, False),
            rows(0, 4, True, True),
            rows(4, 1, False, True),
            rows(6, 2, False, True),
        ),
        copies_out=(PageCopy(0, 0, 0, 16, 0, ()), PageCopy(1, 0, 0, 3, 0, ())),
    )
    assert load_of(step, lane_rows=5, lane_samples=2) == WalkLoad(
        num_tokens=8,
        num_decodes=2,  # a chunk of one token attends as a decode row does
        decode_context=10 + 5,
        prefill_load=(1 + 2 + 3 + 4) + (7 + 8),
        num_samples=1 + 1 + 2,
        lane_rows=5,
        num_chunks=2,
        chunk_context=8,
        copied_tokens=19,
    )


# ---------------------------------------------------------------- a budget can be searched by halves


@given(
    loads, shares, st.sampled_from([f.name for f in fields(WalkLoad)]), st.integers(1, 50), st.integers(0, 9)
)
def test_more_work_never_takes_less_time(
    load: WalkLoad, share: float, field: str, more: int, seed: int
) -> None:
    model = taught(LatencyModel(small_fit()), seed) if seed else LatencyModel(small_fit())
    larger = replace(load, **{field: getattr(load, field) + more})
    assert model.walk_s(larger, share) >= model.walk_s(load, share) * (1 - 1e-12)
    assert model.bound_s(larger, share) >= model.bound_s(load, share) * (1 - 1e-12)


@given(st.integers(0, 100), shares, st.integers(0, 9))
def test_a_pass_with_more_rows_never_takes_less_time(rows: int, share: float, seed: int) -> None:
    model = taught(LatencyModel(small_fit()), seed)
    assert model.pass_s(rows + 1, share) >= model.pass_s(rows, share)


@given(loads, shares, st.integers(0, 9))
def test_the_bound_is_never_below_the_expected_time(load: WalkLoad, share: float, seed: int) -> None:
    model = taught(LatencyModel(small_fit()), seed)
    assert model.bound_s(load, share) >= model.walk_s(load, share)


# ---------------------------------------------------------------- learning


def test_the_model_follows_a_machine_that_becomes_half_as_fast() -> None:
    rng = random.Random(0)
    machine, model = LatencyModel(small_fit()), LatencyModel(small_fit())
    for speed in (1.0, 2.0):
        for _ in range(40):
            load = decodes(rng.randint(1, 16), rng.randint(1, 2000))
            model.observe(load, False, speed * machine.walk_s(load, False) * rng.gauss(1, 0.01))
        load = decodes(8, 500)
        assert model.walk_s(load, False) == pytest.approx(speed * machine.walk_s(load, False), rel=0.03)


def test_what_was_not_seen_since_slows_down_with_the_rest() -> None:
    machine, model = LatencyModel(small_fit()), LatencyModel(small_fit())
    for i in range(40):
        load = decodes(1 + i % 16, 100)
        model.observe(load, False, 2 * machine.walk_s(load, False))
    chunk = WalkLoad()
    chunk.add_chunk(2000, 32)
    assert model.walk_s(chunk, True) == pytest.approx(2 * machine.walk_s(chunk, True), rel=0.1)


def test_one_dear_part_is_told_from_the_others() -> None:
    """Attention turns out half as dear again as fitted: long contexts say so, short ones stay as they are."""
    rng = random.Random(1)
    fit = small_fit()
    dear = replace(fit.idle, decode_token_s=1.5 * fit.idle.decode_token_s)
    machine, model = LatencyModel(replace(fit, idle=dear)), LatencyModel(fit)
    for _ in range(200):
        load = decodes(8, rng.randint(1, 4000))
        model.observe(load, False, machine.walk_s(load, False) * rng.gauss(1, 0.01))
    for context in (10, 4000):
        load = decodes(8, context)
        assert model.walk_s(load, False) == pytest.approx(machine.walk_s(load, False), rel=0.08)


def test_a_descheduled_process_is_no_slow_machine() -> None:
    rng = random.Random(2)
    machine, model = LatencyModel(small_fit()), LatencyModel(small_fit())
    load = decodes(8, 500)
    for i in range(400):
        lost_core = i % 10 == 5
        model.observe(load, False, machine.walk_s(load, False) * (8 if lost_core else rng.gauss(1, 0.02)))
        assert model.walk_s(load, False) == pytest.approx(machine.walk_s(load, False), rel=0.15)


def test_a_model_that_learned_nonsense_still_gives_positive_times() -> None:
    model = LatencyModel(small_fit())
    for i in range(300):
        model.observe(decodes(8, 100), i % 2 == 0, 1e-9 if i % 3 else 1e3)
    assert model.walk_s(decodes(8, 100), 1.0) > 0


# ---------------------------------------------------------------- the margin


@pytest.mark.parametrize("quantile", [0.8, 0.95])
@pytest.mark.parametrize("noise", ["gauss", "lognormal"])
def test_the_margin_covers_the_share_of_walks_that_it_promises(quantile: float, noise: str) -> None:
    rng = random.Random(3)
    machine, model = LatencyModel(small_fit()), LatencyModel(small_fit(), quantile)
    covered, walks = 0, 3000
    for i in range(walks + 300):
        load = decodes(rng.randint(1, 16), rng.randint(1, 2000))
        factor = rng.gauss(1, 0.05) if noise == "gauss" else rng.lognormvariate(0, 0.1)
        seconds = machine.walk_s(load, False) * factor
        covered += i >= 300 and seconds <= model.bound_s(load, False)
        model.observe(load, False, seconds)
    assert covered / walks == pytest.approx(quantile, abs=0.025)


def test_before_anything_is_learned_the_margin_is_that_of_the_fits_own_errors() -> None:
    errors = [i / 100 for i in range(-9, 11)]
    model = LatencyModel(small_fit(residuals={"decode, host idle": errors}))
    load = decodes(8, 100)
    assert model.bound_s(load, False) == pytest.approx(1.10 * model.walk_s(load, False))
    assert LatencyModel(small_fit()).bound_s(load, False) == model.walk_s(load, False), "nothing is known"


def test_a_kind_that_never_comes_alone_does_not_keep_the_margin_of_a_bad_minute() -> None:
    """Every walk here has a chunk; its bound covers its decodes too, measured beside a neighbour."""
    model = LatencyModel(
        small_fit(residuals={"decode, host idle": [1.0] * 25, "chunk, host idle": [0.1] * 25})
    )
    load = decodes(8, 100)
    load.add_chunk(0, 4)
    assert model.bound_s(load, 0.0) == pytest.approx(2.0 * model.walk_s(load, 0.0))
    for _ in range(ENOUGH_WALKS):
        model.observe(load, 0.0, 1.05 * model.walk_s(load, 0.0))
    assert model.bound_s(load, 0.0) <= 1.06 * model.walk_s(load, 0.0)
    assert model.bound_s(decodes(8, 100), 0.0) <= 1.06 * model.walk_s(decodes(8, 100), 0.0)


def test_a_kind_that_has_not_come_for_long_has_the_margin_of_the_last_walks() -> None:
    model = LatencyModel(small_fit())
    alone, chunk = decodes(8, 100), decodes(8, 100)
    chunk.add_chunk(0, 4)
    for factor in [1.0, 1.5] * ENOUGH_WALKS:
        model.observe(alone, 0.0, factor * model.walk_s(alone, 0.0))
    assert model.bound_s(alone, 0.0) > 1.2 * model.walk_s(alone, 0.0)
    for _ in range(LONG_AGO_WALKS + 1):
        model.observe(chunk, 0.0, model.walk_s(chunk, 0.0))
    assert model.bound_s(alone, 0.0) == pytest.approx(model.walk_s(alone, 0.0))


def test_a_kind_with_walks_of_its_own_has_their_margin_alone() -> None:
    """Walks with lanes bring twenty rows where their plans expect one; those without are as planned."""
    machine, model = LatencyModel(small_fit()), LatencyModel(small_fit())
    good, planned, ran = decodes(8, 100), decodes(8, 100), decodes(8, 100)
    planned.add_lane_rows(1, NUM_LAYERS)
    ran.add_lane_rows(20, NUM_LAYERS)
    for _ in range(ENOUGH_WALKS):
        model.observe(good, 0.0, machine.walk_s(good, 0.0))
        model.observe(ran, 0.0, machine.walk_s(ran, 0.0), (planned, 0.0))
    assert model.bound_s(good, 0.0) == pytest.approx(machine.walk_s(good, 0.0))
    assert model.bound_s(planned, 0.0) >= machine.walk_s(ran, 0.0) > 1.05 * machine.walk_s(planned, 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_walk_has_the_largest_margin_of_all_kinds_that_it_contains(kind: str) -> None:
    """More work, or a busier host, never has less: a search by halves needs bounds that do not fall."""
    model = LatencyModel(small_fit(residuals={kind: [0.5]}))
    chunk, lanes, both = decodes(8, 100), decodes(8, 100), decodes(8, 100)
    for load in (chunk, both):
        load.add_chunk(0, 4)
    for load in (lanes, both):
        load.lane_rows += 1
    contained = {
        "decode": (decodes(8, 100), chunk, lanes, both),
        "chunk": (chunk, both),
        "lanes": (lanes, both),
    }
    what, _, host = kind.partition(", host ")
    for load in (decodes(8, 100), chunk, lanes, both):
        for share in (0.0, 1.0):
            is_in = load in contained[what] and (share or host == "idle")
            assert model.bound_s(load, share) == pytest.approx(
                (1.5 if is_in else 1) * model.walk_s(load, share)
            )


def test_errors_are_of_predictions_made_before_learning_from_them() -> None:
    model = LatencyModel(small_fit())
    load = decodes(8, 100)
    expected = model.walk_s(load, False)
    assert model.observe(load, False, 2 * expected) == expected
    assert model.accuracy()["decode, host idle"] == {"count": 1, "mean": 0.5, "p90": 0.5}


def test_the_margin_covers_what_plans_get_wrong() -> None:
    """Walks are as fitted, but each has twenty lane rows where its plan expected four."""
    machine, model = LatencyModel(small_fit()), LatencyModel(small_fit())
    planned, ran = decodes(8, 100), decodes(8, 100)
    planned.add_lane_rows(4, NUM_LAYERS)
    ran.add_lane_rows(20, NUM_LAYERS)
    for _ in range(40):
        model.observe(ran, 0.2, machine.walk_s(ran, 0.2), (planned, 0.0))
    assert model.bound_s(planned, 0.0) >= machine.walk_s(ran, 0.2)
    assert model.accuracy()["lanes, host idle"]["mean"] == pytest.approx(1.0), "what ran is predicted well"


def test_a_plan_that_expected_more_than_ran_does_not_hide_the_models_errors() -> None:
    model = LatencyModel(small_fit())
    planned, ran = decodes(16, 100), decodes(8, 100)
    expected_s = model.walk_s(ran, 0.0)
    model.observe(ran, 0.0, 1.2 * expected_s, (planned, 0.0))
    assert model.bound_s(ran, 0.0) == pytest.approx(1.2 * model.walk_s(ran, 0.0))


def test_the_hosts_share_is_that_of_the_last_walks() -> None:
    model = LatencyModel(small_fit())
    assert model.host_share == 0.0
    for share in [0.0] * 20 + [0.8] * 30:
        model.observe(decodes(1, 1), share, 0.01)
    assert model.host_share == pytest.approx(0.8, abs=0.01)


def test_every_kind_of_walk_has_its_name() -> None:
    chunk, lanes = WalkLoad(), decodes(1, 1)
    chunk.add_chunk(0, 4)
    lanes.lane_rows = 1
    found = {
        kind_of(load, share) for load in (decodes(1, 1), chunk, lanes) for share in (False, 0.4, 0.6, True)
    }
    assert found == set(KINDS)


# ---------------------------------------------------------------- plain data


@given(loads, shares)
def test_a_model_comes_back_from_json_as_it_was(load: WalkLoad, share: float) -> None:
    model = LatencyModel(small_fit(residuals={KINDS[0]: [0.01, -0.02]}, source={"how": "made up"}))
    again = LatencyModel.from_json(json.loads(json.dumps(model.to_json())))
    assert again.fit == model.fit
    assert again.bound_s(load, share) == model.bound_s(load, share)


def test_data_of_another_version_or_shape_is_refused() -> None:
    data = small_fit().to_json()
    with pytest.raises(ValueError, match="schema"):
        LatencyFit.from_json(data | {"schema": "omniserve-latency/0"})
    with pytest.raises(ValueError, match="num_layers"):
        LatencyFit.from_json(data | {"num_layers": "many"})
    with pytest.raises(ValueError, match="idle"):
        LatencyFit.from_json({name: value for name, value in data.items() if name != "idle"})
