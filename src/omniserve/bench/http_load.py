"""From the flags of `omniserve bench` to the load that is sent."""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, repeat

from omniserve.bench.http_names import TRACES
from omniserve.bench.load import Backlog, Load, Stream
from omniserve.bench.prompts import Text
from omniserve.bench.sharegpt import sharegpt_sizes
from omniserve.bench.traces import read_trace
from omniserve.bench.workloads import SHAREGPT, Arrival, BatchJobs, arrival_times, at_rate, resized
from omniserve.errors import ConfigError
from omniserve.types import BEST_EFFORT, LATENCY_SENSITIVE

# Not a class of the server: requests of one token beside all others, which show what a newcomer meets.
PROBE, PROBE_TOKENS = "probe", 16

Sizes = Iterator[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of the model: its tokenizer and the tokens of its context, where they are known."""

    tokenizer: Text | None = None
    max_model_len: int | None = None


def make_load(options: argparse.Namespace, known: Known, is_length_fixed: bool) -> Load:
    """Latency-sensitive requests as a stream; probes and best-effort ones beside it, until it is done.

    ConfigError names the flag that does not fit.
    """
    chats = _chats(options, known)
    beside = [*_probes(options), *_best_effort_stream(options, known)]
    if not chats.arrivals and options.duration is None and not options.be_batch_lines:
        raise ConfigError("num-prompts: without latency-sensitive requests, give the load a --duration")
    return Load(
        [chats],
        options.duration or 0.0,
        _backlog(options, known),
        beside,
        drain_s=None,
        timeout_s=options.request_timeout,
        seed=options.seed,
        is_length_fixed=is_length_fixed,
    )


# ---------------------------------------------------------------- latency-sensitive


def _chats(options: argparse.Namespace, known: Known) -> Stream:
    arrivals = _arrivals(options, known)
    if options.duration is not None:
        arrivals = [a for a in arrivals if a.at_s < options.duration]
    arrivals = resized(arrivals, options.length_scale, known.max_model_len or sys.maxsize)
    has_no_times = options.request_rate == math.inf and not _is_replayed(options)
    limit = options.max_concurrency
    return Stream(LATENCY_SENSITIVE.name, arrivals, limit, is_closed_loop=has_no_times and limit is not None)


def _is_replayed(options: argparse.Namespace) -> bool:
    return options.dataset_name in TRACES and options.self_timed


def _arrivals(options: argparse.Namespace, known: Known) -> list[Arrival]:
    """As they are in the dataset, in order."""
    count, rate = options.num_prompts, options.request_rate
    if count == 0:
        return []
    if options.dataset_name not in TRACES:
        return _timed(options, islice(_drawn_sizes(options, known), count))
    trace = read_trace(_trace_source(options))[:count]
    if not options.self_timed:
        return _timed(options, ((a.num_prompt, a.num_output) for a in trace))
    return trace if rate == math.inf else at_rate(trace, rate)


def _trace_source(options: argparse.Namespace) -> str:
    source = options.dataset_path or TRACES[options.dataset_name]
    if source is None:
        raise ConfigError(f"dataset-path: {options.dataset_name} needs the file of its publisher")
    return str(source)


def _timed(options: argparse.Namespace, sizes: Iterable[tuple[int, int]]) -> list[Arrival]:
    times = _times(options.request_rate, options.burstiness, f"{options.seed} arrivals")
    return [Arrival(at_s, *size) for at_s, size in zip(times, sizes, strict=False)]


def _times(rate: float, burstiness: float, seed: str) -> Iterator[float]:
    """Without end. At an infinite rate all arrive at once."""
    return repeat(0.0) if rate == math.inf else arrival_times(rate, math.inf, random.Random(seed), burstiness)


def _drawn_sizes(options: argparse.Namespace, known: Known) -> Sizes:
    """Tokens of prompt and output, without end."""
    rng = random.Random(f"{options.seed} lengths")
    if options.dataset_name == "random":
        means, ratio = (options.random_input_len, options.random_output_len), options.random_range_ratio
        while True:
            yield _near(means[0], ratio, rng), _near(means[1], ratio, rng)
    elif options.dataset_path is None:
        while True:
            yield SHAREGPT.draw(rng)
    elif known.tokenizer is None:
        raise ConfigError(
            "dataset-path: the lengths of ShareGPT are counted with a --tokenizer, and none is known"
        )
    else:
        yield from sharegpt_sizes(options.dataset_path, known.tokenizer, options.seed)


def _near(mean: int, ratio: float, rng: random.Random) -> int:
    """Even over [mean (1 - ratio), mean (1 + ratio)], at least 1."""
    return max(1, rng.randint(math.floor(mean * (1 - ratio)), math.ceil(mean * (1 + ratio))))


# ---------------------------------------------------------------- beside it


def _probes(options: argparse.Namespace) -> Iterator[Stream]:
    if options.probe_request_rate > 0:
        times = _times(options.probe_request_rate, 1.0, f"{options.seed} probes")
        yield Stream(PROBE, (Arrival(at_s, PROBE_TOKENS, 1) for at_s in times))


def best_effort_sizes(options: argparse.Namespace, known: Known) -> Sizes:
    """Tokens of prompt and output of batch jobs, without end, cut to the context of the model.

    ConfigError at once, not at the first job, for contexts and shares that can not be.
    """
    low, high = options.be_context
    limit = known.max_model_len or sys.maxsize
    drawn = BatchJobs(low, high, options.be_output_share).draw(options.seed)
    cut = ((num_prompt, min(num_output, limit - 1)) for num_prompt, num_output in drawn)
    return ((min(num_prompt, limit - num_output), num_output) for num_prompt, num_output in cut)


def _best_effort_stream(options: argparse.Namespace, known: Known) -> Iterator[Stream]:
    if options.be_request_rate is not None:
        times = _times(options.be_request_rate, options.be_burstiness, f"{options.seed} batch arrivals")
        sizes = best_effort_sizes(options, known)
        yield Stream(
            BEST_EFFORT.name, (Arrival(at_s, *size) for at_s, size in zip(times, sizes, strict=False))
        )


def _backlog(options: argparse.Namespace, known: Known) -> Backlog | None:
    if options.be_backlog is None:
        return None
    return Backlog(BEST_EFFORT.name, options.be_backlog, best_effort_sizes(options, known))
