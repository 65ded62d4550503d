"""What can happen to requests in one engine, each as arrivals, memory sizes and a proof that it did happen.

Memory is given in tokens, so that the same story holds for every model and page size.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from engine.driver import BE, LS, Arrival, Outcome, Subject, assert_exact, run
from engine.prompts import SHORT_LENGTHS, Pool
from omniserve.config import EngineConfig, Reentry
from omniserve.engine.loop import Engine
from omniserve.host.supervisor import HostSupervisor
from omniserve.policy.request import Phase

ROOMY_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Settings:
    """What a scenario is run under."""

    reentry: Reentry = "same_iteration"
    chunk: int = 64
    page_size: int = 16
    host_page_size: int = 16

    def __str__(self) -> str:
        return f"{self.reentry}-chunk{self.chunk}-page{self.page_size}-host_page{self.host_page_size}"


@dataclass(frozen=True, slots=True)
class Scenario:
    """Arrivals and memory; `proves` asserts of the outcome that the scenario's own thing took place."""

    arrivals: list[Arrival]
    proves: Callable[[Outcome], None]
    host_offload: Literal["auto", "always", "never"] = "auto"
    device_tokens: int = ROOMY_TOKENS
    host_tokens: int = ROOMY_TOKENS
    after_step: Callable[[Engine], None] = field(default=lambda engine: None)


def config_of(subject: Subject, scenario: Scenario, settings: Settings) -> EngineConfig:
    return EngineConfig(
        max_model_len=subject.max_model_len,
        host_offload=scenario.host_offload,
        reentry=settings.reentry,
        max_num_batched_tokens=settings.chunk,
        page_size=settings.page_size,
        host_page_size=settings.host_page_size,
        device_memory_bytes=_bytes(subject, scenario.device_tokens, settings.page_size),
        host_memory_bytes=_bytes(subject, scenario.host_tokens, settings.host_page_size),
    )


def serve(subject: Subject, scenario: Scenario, settings: Settings) -> Outcome:
    """Run a scenario and assert that it is exact, that it waited for nobody, and that it proves its point."""
    config = config_of(subject, scenario, settings)
    outcome = run(subject, config, scenario.arrivals, scenario.after_step)
    assert_exact(subject, outcome)
    if settings.reentry != "wait":
        assert outcome.stats["device_wait_s"] == 0
    scenario.proves(outcome)
    return outcome


def _bytes(subject: Subject, num_tokens: int, page_size: int) -> int:
    return subject.kv_bytes(max(2, -(-num_tokens // page_size)), page_size)


def arrivals_of(pool: Pool, lengths: Sequence[int], service_class: str, step: int = 0) -> list[Arrival]:
    return [Arrival(step, pool[n].ids, pool[n].max_tokens, service_class) for n in lengths]


# ---------------------------------------------------------------- proofs


def all_on_the_device(outcome: Outcome) -> None:
    assert set(outcome.num_lane_tokens) == {0}


def best_effort_decodes_in_lanes(outcome: Outcome) -> None:
    """Under "always": every token after the first of each BE request, and none of an LS request."""
    expected = [a.max_tokens - 1 if a.best_effort else 0 for a in outcome.arrivals]
    assert outcome.num_lane_tokens == expected
    assert outcome.stats["num_lane_tokens"] == sum(expected)


def everybody_has_finished(outcome: Outcome) -> None:
    assert all(count >= 0 for count in outcome.num_lane_tokens)


def promises_are_kept(outcome: Outcome) -> None:
    assert outcome.stats["num_broken_promises"] == 0


def _counted(*names: str) -> Callable[[Outcome], None]:
    def proves(outcome: Outcome) -> None:
        promises_are_kept(outcome)
        for name in names:
            assert outcome.stats[name] > 0, name

    return proves


# ---------------------------------------------------------------- scenarios

Build = Callable[[Pool, Settings, Sequence[int], random.Random], Scenario]


def ls_alone(pool: Pool, settings: Settings, lengths: Sequence[int], rng: random.Random) -> Scenario:
    return Scenario(arrivals_of(pool, lengths, LS), all_on_the_device)


def be_always(pool: Pool, settings: Settings, lengths: Sequence[int], rng: random.Random) -> Scenario:
    return Scenario(arrivals_of(pool, lengths, BE), best_effort_decodes_in_lanes, "always")


def _random_arrivals(pool: Pool, lengths: Sequence[int], rng: random.Random) -> list[Arrival]:
    """Every second request is best-effort; they come in any order within the first steps."""
    order = rng.sample(lengths, len(lengths))
    return [
        Arrival(rng.randrange(3 * len(order)), pool[n].ids, pool[n].max_tokens, BE if i % 2 else LS)
        for i, n in enumerate(order)
    ]


def mixed(pool: Pool, settings: Settings, lengths: Sequence[int], rng: random.Random) -> Scenario:
    return Scenario(_random_arrivals(pool, lengths, rng), best_effort_decodes_in_lanes, "always")


def crowded(pool: Pool, settings: Settings, lengths: Sequence[int], rng: random.Random) -> Scenario:
    """Room for the largest request and little more on either side: even chat may give way to chat."""
    longest = max(len(pool[n].ids) + pool[n].max_tokens for n in lengths)
    return Scenario(
        _random_arrivals(pool, lengths, rng),
        everybody_has_finished,
        device_tokens=longest + 4 * settings.page_size,
        host_tokens=longest + 4 * settings.host_page_size,
    )


# Batch requests that fill most of 256 device tokens, and chat that needs more than what is left.
_BATCH, _CHAT = (63, 33, 47, 17), (100, 64)


def _batch_then_chat(pool: Pool, settings: Settings) -> list[Arrival]:
    """The first chat request meets batch prefills where chunks are small, the second meets batch decodes."""
    num_prefill_steps = -(-sum(_BATCH) // settings.chunk)
    batch = arrivals_of(pool, _BATCH, BE)
    first = arrivals_of(pool, _CHAT[:1], LS, step=max(3, num_prefill_steps - 2))
    second = arrivals_of(pool, _CHAT[1:], LS, step=num_prefill_steps + 6)
    return batch + first + second


def displaced(pool: Pool, settings: Settings, lengths: Sequence[int], rng: random.Random) -> Scenario:
    """Chat takes the pages of batch requests, which go on as lanes."""
    proves = _counted("num_displaced", "num_lane_tokens")
    return Scenario(_batch_then_chat(pool, settings), proves, device_tokens=256)


def dropped(pool: Pool, settings: Settings, lengths: Sequence[int], rng: random.Random) -> Scenario:
    """As above with no room on the host: batch requests give up their KV and recompute it."""
    proves = _counted("num_dropped")
    return Scenario(_batch_then_chat(pool, settings), proves, device_tokens=256, host_tokens=32)


def returned(pool: Pool, settings: Settings, lengths: Sequence[int], rng: random.Random) -> Scenario:
    """Lanes come back to the device once the chat that had displaced them is gone."""
    batch = [
        Arrival(0, pool[n].ids, 3 * pool[n].max_tokens, BE) for n in (47, 33)
    ]  # long enough to outlive the chat
    chat = arrivals_of(pool, (255, 129), LS, step=-(-80 // settings.chunk) + 4)
    return Scenario(batch + chat, _counted("num_displaced", "num_swapped_in"), device_tokens=480)


def parked(pool: Pool, settings: Settings, lengths: Sequence[int], rng: random.Random) -> Scenario:
    """Chat prompts take the whole token budget while a batch prompt is half way through its prefill."""
    long, *chat = {16: (65, 31, 33), 64: (129, 64, 65), 512: (1500, 511, 257)}[settings.chunk]

    def proves(outcome: Outcome) -> None:
        promises_are_kept(outcome)
        assert outcome.num_parked > 0

    batch = arrivals_of(pool, (long,), BE)
    return Scenario(batch + arrivals_of(pool, chat, LS, step=1), proves)


def host_lost(pool: Pool, settings: Settings, lengths: Sequence[int], rng: random.Random) -> Scenario:
    """The host process is killed when lanes are in the middle of their text; they compute their KV anew."""
    is_killed = False

    def kill(engine: Engine) -> None:
        nonlocal is_killed
        lanes = engine.state.in_phase(Phase.LANE)
        if is_killed or len(lanes) < 2 or all(r.num_tokens < r.num_prompt + 3 for r in lanes):
            return
        assert isinstance(engine.host, HostSupervisor)
        os.kill(engine.host.pid, signal.SIGKILL)
        is_killed = True

    arrivals = arrivals_of(pool, _BATCH, BE) + arrivals_of(pool, (31, 15), LS, step=4)
    return Scenario(arrivals, _counted("host_deaths", "num_dropped"), "always", after_step=kill)


def _hits(*names: str) -> Callable[[Outcome], None]:
    """Tokens were found in the prefix cache by each of these."""

    def proves(outcome: Outcome) -> None:
        for name in names:
            assert outcome.stats["prefix_cache"][name]["hit_tokens"] > 0, name

    return proves


def _with_one_beginning(pool: Pool, lengths: Sequence[int], gap: int) -> list[Arrival]:
    """One long beginning for all, `gap` steps apart; every second one is best-effort, and one comes twice."""
    beginning = pool[127].ids
    arrivals = [
        Arrival(gap * i, beginning + pool[n].ids[:40], pool[n].max_tokens, LS if i % 2 else BE)
        for i, n in enumerate(lengths)
    ]
    last = arrivals[-1]
    return [*arrivals, Arrival(last.step + 2 * gap, last.prompt, last.max_tokens, last.service_class)]


def shared(pool: Pool, settings: Settings, lengths: Sequence[int], rng: random.Random) -> Scenario:
    """Prompts begin alike: later ones are prefilled from where they differ, lanes share pages."""
    found = _hits("device_latency_sensitive", "device_best_effort", "host")

    def proves(outcome: Outcome) -> None:
        best_effort_decodes_in_lanes(outcome)
        found(outcome)

    gap = -(-170 // settings.chunk) + 4
    return Scenario(_with_one_beginning(pool, lengths, gap), proves, "always")


def shared_crowded(pool: Pool, settings: Settings, lengths: Sequence[int], rng: random.Random) -> Scenario:
    """As above with little room on either side: pages are evicted and computed again."""
    arrivals = _with_one_beginning(pool, lengths, rng.randrange(1, 6))
    longest = max(len(a.prompt) + a.max_tokens for a in arrivals)
    return Scenario(
        arrivals,
        _hits("device_latency_sensitive"),
        device_tokens=longest + 4 * settings.page_size,
        host_tokens=longest + 4 * settings.host_page_size,
    )


SCENARIOS: dict[str, Build] = {
    build.__name__: build
    for build in (
        ls_alone,
        be_always,
        mixed,
        crowded,
        displaced,
        dropped,
        returned,
        parked,
        host_lost,
        shared,
        shared_crowded,
    )
}


def few_lengths(rng: random.Random, count: int = 6) -> list[int]:
    """Some of the short prompts."""
    return rng.sample(SHORT_LENGTHS, count)
