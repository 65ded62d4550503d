"""Workloads are what they say, by their statistics; seeds fix them."""

from __future__ import annotations

import math
import random
import statistics
from itertools import islice, pairwise

import pytest

from omniserve.bench.workloads import (
    SHAREGPT,
    Arrival,
    BatchJobs,
    LogNormal,
    arrival_times,
    at_rate,
    between,
    resized,
    stream,
    token_ids,
)
from omniserve.errors import ConfigError


def gaps(burstiness: float) -> list[float]:
    times = list(arrival_times(5.0, 4000.0, random.Random(1), burstiness))
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] < 4000.0
    return [b - a for a, b in pairwise(times)]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_rate_and_the_burstiness_asked_for(burstiness: float) -> None:
    """Of a gamma distribution, burstiness is the squared mean over the variance; 1 is Poisson."""
    found = gaps(burstiness)
    assert statistics.mean(found) == pytest.approx(0.2, rel=0.03)
    assert statistics.mean(found) ** 2 / statistics.variance(found) == pytest.approx(burstiness, rel=0.08)


def test_poisson_gaps_exceed_their_mean_as_often_as_an_exponential() -> None:
    found = gaps(1.0)
    assert sum(g > 0.2 for g in found) / len(found) == pytest.approx(math.exp(-1), abs=0.01)


def test_without_any_burstiness_arrivals_are_evenly_spaced() -> None:
    times = list(arrival_times(8.0, 1000.0, random.Random(1), math.inf))
    assert times == [i / 8 for i in range(1, 8000)]


def test_lengths_like_sharegpt_have_the_published_means_and_the_fitted_spread() -> None:
    rng = random.Random(2)
    pairs = [SHAREGPT.draw(rng) for _ in range(20_000)]
    for values, mean, model in zip(
        zip(*pairs, strict=True), (161, 338), (SHAREGPT.prompt, SHAREGPT.output), strict=True
    ):
        assert statistics.mean(values) == pytest.approx(mean, rel=0.03)
        assert model.low <= min(values) < max(values) <= model.high
        inner = [math.log(v) for v in values if model.low < v < model.high]
        assert 0.7 * model.sigma < statistics.stdev(inner) < model.sigma


def test_scaling_lengths_scales_their_means_and_limits() -> None:
    scaled, rng = SHAREGPT.scaled(0.25), random.Random(3)
    outputs = [scaled.output.draw(rng) for _ in range(20_000)]
    assert statistics.mean(outputs) == pytest.approx(338 / 4, rel=0.02)
    assert max(outputs) == 256


@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("mean", lambda: LogNormal(2000, 1.0, 4, 1024)),
        ("sigma", lambda: LogNormal(100, 0.0, 4, 1024)),
        ("rate", lambda: list(arrival_times(0.0, 1.0, random.Random(0)))),
        ("burstiness", lambda: list(arrival_times(1.0, 1.0, random.Random(0), math.nan))),
        ("context", lambda: BatchJobs(512, 256)),
        ("output_share", lambda: BatchJobs(output_share=1.0)),
    ],
)
def test_what_can_not_be_is_refused_by_name(field: str, make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=f"^{field}:"):
        make()


def test_a_stream_is_fixed_by_its_seed_and_keeps_its_lengths_at_another_rate() -> None:
    slow, fast = (stream(SHAREGPT, rate, 200.0, seed=7) for rate in (1.0, 2.0))
    assert slow == stream(SHAREGPT, 1.0, 200.0, seed=7)
    assert slow != stream(SHAREGPT, 1.0, 200.0, seed=8)
    assert len(fast) > 1.5 * len(slow)
    sizes = [[(a.num_prompt, a.num_output) for a in load] for load in (slow, fast)]
    assert sizes[0] == sizes[1][: len(slow)]


def test_batch_contexts_fill_their_range_evenly_on_a_log_scale_and_are_mostly_decode() -> None:
    jobs = list(islice(BatchJobs(256, 4096).draw(5), 8000))
    contexts = [prompt + output for prompt, output in jobs]
    assert 256 <= min(contexts) < 260
    assert 4030 < max(contexts) <= 4096
    for low in (256, 512, 1024, 2048):
        share = sum(low <= c < 2 * low for c in contexts) / len(contexts)
        assert share == pytest.approx(0.25, abs=0.02)
    assert all(output / (prompt + output) == pytest.approx(0.75, abs=0.01) for prompt, output in jobs)


def test_a_trace_keeps_its_rhythm_at_another_rate() -> None:
    trace = [Arrival(t, 10, 5) for t in (3.0, 4.0, 4.0, 13.0)]
    assert [a.at_s for a in at_rate(trace, rate=3.0)] == pytest.approx([0.0, 0.1, 0.1, 1.0])
    with pytest.raises(ConfigError, match="two requests at different times"):
        at_rate(trace[:1], 1.0)


def test_a_part_of_a_trace_begins_at_zero() -> None:
    trace = [Arrival(float(t), 1, 1) for t in range(10)]
    assert [a.at_s for a in between(trace, 3.0, 6.0)] == [0.0, 1.0, 2.0]


def test_a_trace_made_smaller_keeps_at_least_a_token_and_the_limit() -> None:
    small = resized([Arrival(0.0, 1000, 1), Arrival(1.0, 100, 4000)], 0.5, max_total=400)
    assert [(a.num_prompt, a.num_output) for a in small] == [(399, 1), (1, 399)]


def test_prompts_are_fixed_by_their_seed_and_share_nothing() -> None:
    one, other = token_ids("1", 50, 1000), token_ids("2", 50, 1000)
    assert one == token_ids("1", 50, 1000)
    assert one[:4] != other[:4]
    assert all(0 <= t < 1000 for t in one)
