"""The load of server_cost.py, and what is made of its times. Pure but for the clock.

Places, each with one request open at a time: after the answer a pause of random length, so that requests
arrive at every moment of a walk, then the next one. How long the pauses are was drawn before; both arms get
the same.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from omniserve.bench.measure import percentile
from omniserve.bench.prompts import Pool

# Places start spread over so many pauses: the first walk does not get all prompts at once.
START_PAUSES = 8
# What came from one walk lies closer together than this share of the time of a walk.
SAME_WALK_SHARE = 0.3


@dataclass(frozen=True, slots=True)
class Question:
    """One request. pause_s: seconds without one before it."""

    pause_s: float
    content: str
    num_output: int


@dataclass(frozen=True, slots=True)
class Timing:
    """When a request was sent and when each of its texts came (time.monotonic(), one for all processes)."""

    sent_s: float
    num_output: int
    token_s: list[float]


Load = Sequence[Sequence[Question]]
# Of a place: asks, and notes the time of each piece of text.
Ask = Callable[[int, Question, list[float]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Size:
    """num_streams places with num_each requests; prompts of num_prompt tokens before the template."""

    num_streams: int
    num_each: int
    num_prompt: int
    num_output: int
    pause_s: float

    @property
    def num_tokens(self) -> int:
        return self.num_streams * self.num_each * self.num_output


def make_load(size: Size, pool: Pool, seed: str) -> list[list[Question]]:
    """Pauses are even over [0, 2 pause_s], lengths over half to one and a half of num_output, which evens
    out within a place."""
    load = []
    for place in range(size.num_streams):
        rng = random.Random(f"{seed} {place}")
        lengths = [
            max(2, round(size.num_output * (0.5 + (i + 0.5) / size.num_each))) for i in range(size.num_each)
        ]
        rng.shuffle(lengths)
        pauses = [
            2 * size.pause_s * (START_PAUSES if i == 0 else 1) * rng.random() for i in range(size.num_each)
        ]
        load.append(
            [Question(p, pool.text(size.num_prompt, rng), n) for p, n in zip(pauses, lengths, strict=True)]
        )
    return load


async def run_load(load: Load, ask: Ask) -> list[list[Timing]]:
    """Timings by place, in order."""

    async def run_place(place: int, questions: Sequence[Question]) -> list[Timing]:
        timings = []
        for question in questions:
            await asyncio.sleep(question.pause_s)
            timing = Timing(time.monotonic(), question.num_output, [])
            await ask(place, question, timing.token_s)
            timings.append(timing)
        return timings

    return list(await asyncio.gather(*(run_place(at, questions) for at, questions in enumerate(load))))


def times(places: Sequence[Sequence[Timing]], walk_s: float) -> dict[str, float]:
    """Seconds: `ttft` and `tpot` of each request, `gap` between two texts of one, and `burst`: from the first
    text of a walk until its others came. Without the first and last request of each place, when not all
    places were busy."""
    kept = [timing for timings in places for timing in timings[1:-1]]
    ttft = [t.token_s[0] - t.sent_s for t in kept]
    tpot = [(t.token_s[-1] - t.token_s[0]) / (t.num_output - 1) for t in kept]
    gaps = [b - a for t in kept for a, b in pairwise(t.token_s)]
    bursts = _bursts(sorted(s for timings in places for t in timings for s in t.token_s), walk_s)
    found = {
        f"{name}_p{share}_s": percentile(values, share / 100)
        for name, values in (("ttft", ttft), ("tpot", tpot), ("gap", gaps))
        for share in (50, 99)
    }
    return found | {"burst_mean_s": fmean(bursts)}


def _bursts(moments: Sequence[float], walk_s: float) -> list[float]:
    """Of each text, how long after the first one of its walk it came."""
    found, first = [], moments[0]
    for before, now in pairwise(moments):
        if now - before > SAME_WALK_SHARE * walk_s:
            first = now
        found.append(now - first)
    return found
