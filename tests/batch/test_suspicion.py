"""A line that kills engines is found and given up, and those that ran beside it are answered."""

from __future__ import annotations

import asyncio
from pathlib import Path

from batch.scripted import ScriptedRunner, ended, submit
from batch.stand import LIMITS, OWNER, Clock, lines, started
from batch.test_runner import content, run
from omniserve.batch.records import Line
from omniserve.batch.runner import EngineGone, LineResponse
from omniserve.batch.service import BatchService
from omniserve.batch.store import Store
from omniserve.batch.suspicion import DEATHS_ALONE, DEATHS_AMONG_OTHERS, is_given_up, runs_alone

DEATHS = DEATHS_AMONG_OTHERS + DEATHS_ALONE


class MortalEngine(ScriptedRunner):
    """It dies with all lines in it when a killer is there, after others had time to come in.

    company: lines in it at each death, the killer included.
    """

    def __init__(self, *killers: str) -> None:
        super().__init__(self._behave)
        self._killers, self._death = killers, asyncio.Event()
        self.company: list[int] = []

    async def _behave(self, text: str, run: int) -> LineResponse | None:
        death = self._death
        if text in self._killers:
            await asyncio.sleep(0.002)
            self._death = asyncio.Event()
            self.company.append(self.num_now)
            death.set()
            raise EngineGone
        try:
            await asyncio.wait_for(death.wait(), 0.005)
        except TimeoutError:
            return None
        raise EngineGone


def test_a_line_that_kills_engines_is_given_up_and_its_neighbours_are_answered(tmp_path: Path) -> None:
    engine = MortalEngine("question 3", "question 17")

    async def promise(service: BatchService) -> None:
        batch = await ended(service, await submit(service, lines(20)))
        assert (batch.status, batch.completed, batch.failed) == ("completed", 18, 2)
        failures = {one["custom_id"]: one["response"] for one in await content(service, batch.error_file_id)}
        assert set(failures) == {"line-3", "line-17"}
        for response in failures.values():
            assert response["status_code"] == 500
            assert response["body"]["error"]["code"] == "engine_error"

    run(promise, tmp_path, engine)
    assert {name: engine.runs[name] for name in ("question 3", "question 17")} == {
        "question 3": DEATHS,
        "question 17": DEATHS,
    }
    innocents = [count for name, count in engine.runs.items() if name not in ("question 3", "question 17")]
    assert max(innocents) <= DEATHS_AMONG_OTHERS + 1
    assert engine.company.count(1) >= 2 * DEATHS_ALONE
    assert max(engine.company) > 1, "they had company at first"


def test_deaths_count_across_restarts_and_a_suspect_runs_alone(tmp_path: Path) -> None:
    store = Store(tmp_path, limits=LIMITS, now=Clock())
    batch = started(store, lines(20))
    for number, count in ((2, DEATHS_AMONG_OTHERS), (5, DEATHS_AMONG_OTHERS), (9, DEATHS)):
        for _ in range(count):
            store.batches.note_death(batch.seq, number)
    store.close()
    engine = MortalEngine("question 2")

    async def promise(service: BatchService) -> None:
        end = await ended(service, await service.batch(OWNER, batch.id))
        assert (end.status, end.completed, end.failed) == ("completed", 18, 2)
        failed = {one["custom_id"] for one in await content(service, end.error_file_id)}
        assert failed == {"line-2", "line-9"}

    run(promise, tmp_path, engine)
    assert engine.company == [1] * DEATHS_ALONE, "nobody else was in it"
    assert engine.runs["question 9"] == 0, "it had been given up before the server ended"
    assert max(count for name, count in engine.runs.items() if name != "question 2") == 1
    assert set(engine.order[-3:]) == {"question 2", "question 5"}, "suspects come last"


def test_deaths_that_could_not_be_recorded_still_count(tmp_path: Path) -> None:
    engine = MortalEngine("question 1")

    def at(point: str) -> None:
        if point == "death.committed":
            raise RuntimeError("a fault of ours")

    async def promise(service: BatchService) -> None:
        batch = await ended(service, await submit(service, lines(6)))
        assert (batch.completed, batch.failed) == (5, 1)

    run(promise, tmp_path, engine, at=at)


def test_an_engine_killed_from_outside_now_and_then_costs_no_line_its_answer() -> None:
    def with_deaths(count: int) -> Line:
        return Line(1, b"{}", count)

    assert [runs_alone(with_deaths(n)) for n in (0, 2, 3)] == [False, False, True]
    assert [is_given_up(with_deaths(n)) for n in (3, 4, 5)] == [False, False, True], "once alone is no proof"
