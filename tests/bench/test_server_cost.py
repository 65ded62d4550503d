"""What the server adds: the load, the figures, and the client against the real server."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import pytest

from omniserve.bench.prompts import UNMEASURED
from omniserve.bench.server_cost_client import Task, run
from omniserve.bench.server_cost_load import Question, Size, Timing, make_load, run_load, times
from omniserve.errors import OmniServeError
from server.scripted import standing

SIZE = Size(num_streams=3, num_each=4, num_prompt=5, num_output=6, pause_s=0.0)


def test_a_seed_gives_the_same_load_and_another_seed_another() -> None:
    one, same, other = (make_load(SIZE, UNMEASURED, seed) for seed in ("a", "a", "b"))
    assert one == same
    assert one != other


def test_each_place_generates_the_tokens_that_rates_are_made_of() -> None:
    load = make_load(SIZE, UNMEASURED, "a")
    assert [sum(q.num_output for q in questions) for questions in load] == [24, 24, 24]
    assert SIZE.num_tokens == 72


def test_a_place_has_one_request_open_at_a_time_and_places_do_not_wait_for_each_other() -> None:
    open_at: dict[int, int] = {}
    most: list[int] = []

    async def ask(place: int, question: Question, token_s: list[float]) -> None:
        assert open_at.get(place, 0) == 0
        open_at[place] = 1
        most.append(sum(open_at.values()))
        await asyncio.sleep(0)
        open_at[place] = 0

    asyncio.run(run_load(make_load(SIZE, UNMEASURED, "a"), ask))
    assert len(most) == 12
    assert max(most) == 3


def test_figures_leave_out_the_first_and_the_last_request_of_a_place() -> None:
    slow = Timing(0.0, 3, [50.0, 60.0, 70.0])
    kept = Timing(100.0, 3, [100.5, 100.6, 100.8])
    found = times([[slow, kept, slow]], walk_s=0.1)
    assert found["ttft_p50_s"] == pytest.approx(0.5)
    assert found["tpot_p50_s"] == pytest.approx(0.15)
    assert found["gap_p99_s"] == pytest.approx(0.2)


def test_a_burst_is_measured_from_the_first_text_of_its_walk() -> None:
    places = [[Timing(0.0, 2, [1.0 + late, 2.0 + late])] * 3 for late in (0.0, 0.01, 0.02)]
    assert times(places, walk_s=1.0)["burst_mean_s"] == pytest.approx(0.01, rel=0.2)


def _task(base_url: str, num_output: int) -> Task:
    address = urlsplit(base_url)
    assert address.hostname is not None
    assert address.port is not None
    return Task(address.hostname, address.port, [[Question(0.0, "Hello", num_output)] * 3] * 2)


async def asked(num_output: int) -> list[list[Timing]]:
    async with standing(before=4) as stand:
        return (await run(_task(stand.base_url, num_output))).places


def test_the_client_sees_every_token_once_and_uses_a_connection_again() -> None:
    places = asyncio.run(asked(4))
    assert [[len(t.token_s) for t in timings] for timings in places] == [[4] * 3] * 2
    assert all(t.sent_s <= t.token_s[0] for timings in places for t in timings)


def test_the_client_does_not_take_a_refusal_for_an_answer() -> None:
    with pytest.raises(OmniServeError, match="context_length_exceeded"):
        asyncio.run(asked(10**6))
