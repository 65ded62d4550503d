"""The runner: every line is answered once, by deadline, through refusals, deaths and full disks."""

from __future__ import annotations

import asyncio
import errno
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batch.scripted import NO_ROOM, SETTINGS, ScriptedRunner, ended, submit, until
from batch.stand import LIMITS, OWNER, Clock, jsonl, line, lines
from batch.test_faults import FULL, FaultyDisk
from omniserve.batch import runner as runner_module
from omniserve.batch.errors import StorageError
from omniserve.batch.limits import DAY_S, HOUR_S
from omniserve.batch.line_runner import LineCancelled
from omniserve.batch.pace import Pace
from omniserve.batch.records import BatchRecord, Usage
from omniserve.batch.runner import BatchRunner, EngineGone, LineResponse, RunnerSettings
from omniserve.batch.service import BatchService

Promise = Callable[[BatchService], Awaitable[None]]


def run(promise: Promise, root: Path, runner: ScriptedRunner, **options: Any) -> None:
    async def main() -> None:
        async with serving(root, runner, **options) as service:
            await promise(service)

    asyncio.run(main())


@asynccontextmanager
async def serving(root: Path, runner: ScriptedRunner, **options: Any) -> AsyncIterator[BatchService]:
    options = {"settings": SETTINGS, "limits": LIMITS, "now": Clock()} | options
    service = BatchService(root, runner, **options)
    service.start()
    try:
        yield service
    finally:
        await service.stop()


async def content(service: BatchService, file_id: str) -> list[dict[str, Any]]:
    _, pieces = await service.open_file(OWNER, file_id)
    return [json.loads(one) for one in b"".join([piece async for piece in pieces]).splitlines()]


async def outputs(service: BatchService, batch: BatchRecord) -> dict[str, str]:
    """Text by custom_id; every custom_id once."""
    found = await content(service, batch.output_file_id)
    assert len({one["custom_id"] for one in found}) == len(found)
    return {one["custom_id"]: one["response"]["body"]["choices"][0]["message"]["content"] for one in found}


def expected(count: int) -> dict[str, str]:
    return {f"line-{number}": f"QUESTION {number}" for number in range(1, count + 1)}


def test_every_line_is_run_once_and_answered(tmp_path: Path) -> None:
    runner = ScriptedRunner()

    async def promise(service: BatchService) -> None:
        batch = await ended(service, await submit(service, lines(50)))
        assert (batch.status, batch.completed, batch.failed) == ("completed", 50, 0)
        assert batch.usage.input_tokens == 100
        assert await outputs(service, batch) == expected(50)

    run(promise, tmp_path, runner)
    assert set(runner.runs.values()) == {1}
    assert 1 < runner.most <= SETTINGS.concurrency


def test_a_line_that_fails_has_its_answer_in_the_error_file(tmp_path: Path) -> None:
    async def behave(text: str, run: int) -> LineResponse | None:
        if text == "question 2":
            raise RuntimeError("a fault of the server")
        return LineResponse(400, {"error": {"code": "bad"}}) if text == "question 1" else None

    async def promise(service: BatchService) -> None:
        batch = await ended(service, await submit(service, lines(3)))
        assert (batch.status, batch.completed, batch.failed) == ("completed", 1, 2)
        failures = {one["custom_id"]: one["response"] for one in await content(service, batch.error_file_id)}
        assert {name: one["status_code"] for name, one in failures.items()} == {"line-1": 400, "line-2": 500}
        assert failures["line-1"]["body"] == {"error": {"code": "bad"}}

    run(promise, tmp_path, ScriptedRunner(behave))


@pytest.mark.parametrize("news", [NO_ROOM, LineResponse(503, {"error": {}}), EngineGone()])
def test_a_line_that_was_turned_away_runs_later_and_did_not_fail(
    tmp_path: Path, news: LineResponse | Exception
) -> None:
    async def behave(text: str, run: int) -> LineResponse | None:
        if run > 2:
            return None
        if isinstance(news, Exception):
            raise news
        return news

    async def promise(service: BatchService) -> None:
        batch = await ended(service, await submit(service, lines(9)))
        assert (batch.status, batch.completed, batch.failed) == ("completed", 9, 0)

    runner = ScriptedRunner(behave)
    run(promise, tmp_path, runner)
    assert set(runner.runs.values()) == {3}


def test_a_pause_that_ends_between_two_looks_at_the_clock_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s, launch = [0.0], BatchRunner._launch

    async def slow_launch(self: BatchRunner) -> None:
        await launch(self)
        if now_s[0] < self._held_until_s and not self._wake.is_set() and not self._num_busy:
            now_s[0] += 1

    monkeypatch.setattr(BatchRunner, "_launch", slow_launch)
    monkeypatch.setattr(runner_module, "time", SimpleNamespace(monotonic=lambda: now_s[0]))

    async def behave(text: str, run: int) -> LineResponse | None:
        return NO_ROOM if run <= 3 else None

    async def promise(service: BatchService) -> None:
        async with asyncio.timeout(10):
            assert (await ended(service, await submit(service, lines(1)))).completed == 1

    run(promise, tmp_path, ScriptedRunner(behave))


def test_another_429_is_the_lines_own_answer(tmp_path: Path) -> None:
    async def behave(text: str, run: int) -> LineResponse | None:
        return LineResponse(429, {"error": {"code": "rate_limit_exceeded"}})

    async def promise(service: BatchService) -> None:
        assert (await ended(service, await submit(service, lines(2)))).failed == 2

    run(promise, tmp_path, ScriptedRunner(behave))


def test_the_batch_with_the_earliest_deadline_goes_first(tmp_path: Path) -> None:
    clock, runner = Clock(), ScriptedRunner()

    async def promise(service: BatchService) -> None:
        service.runner.pause()
        late = await submit(service, jsonl(line(n) for n in (1, 2)), window_s=DAY_S)
        soon = await submit(service, jsonl(line(n) for n in (3, 4)), window_s=HOUR_S)
        later = await submit(service, jsonl(line(n) for n in (5, 6)), window_s=DAY_S)
        for batch in (late, soon, later):
            await until(lambda batch=batch: is_in(service, batch, "in_progress"))  # type: ignore[misc]
        clock.now_s += 60
        service.runner.resume()
        for batch in (late, soon, later):
            await ended(service, batch)

    run(promise, tmp_path, runner, now=clock, settings=replace(SETTINGS, concurrency=1))
    assert runner.order == [f"question {n}" for n in (3, 4, 1, 2, 5, 6)]
    assert runner.seconds_left["question 3"] == HOUR_S - 60
    assert runner.seconds_left["question 1"] == DAY_S - 60


def test_owners_take_turns_and_a_deadline_counts_among_the_batches_of_one(tmp_path: Path) -> None:
    runner = ScriptedRunner()

    async def promise(service: BatchService) -> None:
        service.runner.pause()
        many = await submit(service, jsonl(line(n) for n in range(1, 7)), window_s=HOUR_S)
        few = await submit(service, jsonl(line(n) for n in (11, 12)), owner="ben", window_s=DAY_S)
        urgent = await submit(service, jsonl(line(n) for n in (21,)), owner="ben", window_s=HOUR_S)
        for batch in (many, few, urgent):
            await until(lambda batch=batch: is_in(service, batch, "in_progress"))  # type: ignore[misc]
        service.runner.resume()
        for batch in (many, few, urgent):
            await ended(service, batch)

    run(promise, tmp_path, runner, settings=replace(SETTINGS, concurrency=1))
    assert runner.order == [f"question {n}" for n in (1, 21, 2, 11, 3, 12, 4, 5, 6)]


async def is_in(service: BatchService, batch: BatchRecord, status: str) -> bool:
    return (await service.batch(batch.owner, batch.id)).status == status


def test_at_its_deadline_a_batch_keeps_what_is_done_and_names_what_is_not(tmp_path: Path) -> None:
    clock = Clock()
    hang = asyncio.Event

    async def behave(text: str, run: int) -> LineResponse | None:
        if text != "question 1":
            await hang().wait()
        return None

    async def promise(service: BatchService) -> None:
        batch = await submit(service, lines(20), window_s=HOUR_S)
        await until(lambda: has_completed(service, batch, 1))
        clock.now_s += HOUR_S
        service.runner.notice()
        batch = await ended(service, batch)
        assert (batch.status, batch.completed, batch.failed) == ("expired", 1, 19)
        assert batch.finalizing_at is not None
        assert await outputs(service, batch) == expected(1)
        errors = await content(service, batch.error_file_id)
        assert {one["error"]["code"] for one in errors} == {"batch_expired"}
        assert sorted(one["custom_id"] for one in errors) == sorted(f"line-{n}" for n in range(2, 21))

    run(promise, tmp_path, ScriptedRunner(behave), now=clock)


async def has_completed(service: BatchService, batch: BatchRecord, count: int) -> bool:
    return (await service.batch(OWNER, batch.id)).completed >= count


@pytest.mark.parametrize("num_done", [0, 1, 7])
def test_cancelling_stops_lines_in_flight_and_keeps_what_is_done(tmp_path: Path, num_done: int) -> None:
    async def behave(text: str, run: int) -> LineResponse | None:
        if int(text.split()[1]) > num_done:
            await asyncio.Event().wait()
        return None

    runner = ScriptedRunner(behave)

    async def promise(service: BatchService) -> None:
        batch, other = await submit(service, lines(20)), await submit(service, lines(0) + jsonl([line(1)]))
        await until(lambda: has_completed(service, batch, num_done))
        assert (await service.cancel(OWNER, batch.id)).status in ("cancelling", "cancelled")
        batch = await ended(service, batch)
        assert batch.status == "cancelled"
        if batch.total:  # not so when the cancel came before the input was read
            assert (batch.completed, batch.failed) == (num_done, 20 - num_done)
        if num_done:
            assert await outputs(service, batch) == expected(num_done)
            assert (await ended(service, other)).status == "completed"

    run(promise, tmp_path, runner)
    assert runner.num_now == 0


def test_what_is_finished_is_not_run_again_after_a_restart(tmp_path: Path) -> None:
    async def first_half(text: str, run: int) -> LineResponse | None:
        if int(text.split()[1]) > 10:
            await asyncio.Event().wait()
        return None

    before, after = ScriptedRunner(first_half), ScriptedRunner()
    batches: list[BatchRecord] = []

    async def begin(service: BatchService) -> None:
        batches.append(await submit(service, lines(20)))
        await until(lambda: has_completed(service, batches[0], 10))

    async def go_on(service: BatchService) -> None:
        batch = await ended(service, batches[0])
        assert (batch.status, batch.completed) == ("completed", 20)
        assert await outputs(service, batch) == expected(20)

    run(begin, tmp_path, before)
    run(go_on, tmp_path, after)
    assert after.runs == Counter({f"question {n}": 1 for n in range(11, 21)})


def test_pausing_starts_no_line_and_draining_waits_for_those_in_flight(tmp_path: Path) -> None:
    release = asyncio.Event

    async def promise(service: BatchService) -> None:
        gate = release()

        async def behave(text: str, run: int) -> LineResponse | None:
            await gate.wait()
            return None

        runner.behave = behave
        batch = await submit(service, lines(20))
        await until(lambda: is_at(runner, SETTINGS.concurrency))
        draining = asyncio.create_task(service.runner.drain())
        await asyncio.sleep(0)
        assert not draining.done()
        assert service.runner.status.is_paused
        gate.set()
        await draining
        assert (await service.batch(OWNER, batch.id)).completed == len(runner.order) == SETTINGS.concurrency
        service.runner.resume()
        assert (await ended(service, batch)).completed == 20

    runner = ScriptedRunner()
    run(promise, tmp_path, runner)


async def are_begun(runner: ScriptedRunner, count: int) -> bool:
    return len(runner.order) == count


async def is_at(runner: ScriptedRunner, count: int) -> bool:
    return runner.num_now == count


@pytest.mark.parametrize("call", ["write", "sync"])
def test_while_the_disk_is_full_lines_wait_and_none_runs_twice(tmp_path: Path, call: str) -> None:
    disk, runner = FaultyDisk(), ScriptedRunner()

    async def promise(service: BatchService) -> None:
        service.runner.pause()
        batch = await submit(service, lines(30))
        disk.fail(call, FULL)
        service.runner.resume()
        await until(lambda: in_trouble(service))
        num_started = len(runner.order)
        assert num_started <= SETTINGS.concurrency
        with pytest.raises(StorageError):
            await submit(service, lines(1))
        disk.heal()
        batch = await ended(service, batch)
        assert (batch.status, await outputs(service, batch)) == ("completed", expected(30))
        assert service.runner.status.trouble is None

    run(promise, tmp_path, runner, disk=disk)
    assert set(runner.runs.values()) == {1}


async def in_trouble(service: BatchService) -> bool:
    return service.runner.status.trouble is not None


def test_no_line_starts_while_little_of_the_disk_is_free(tmp_path: Path) -> None:
    disk, runner = FaultyDisk(), ScriptedRunner()

    async def promise(service: BatchService) -> None:
        service.runner.pause()
        batch = await submit(service, lines(5))
        disk.free = 0
        service.runner.resume()
        await until(lambda: in_trouble(service))
        assert not runner.runs
        disk.free = 1 << 40
        assert (await ended(service, batch)).completed == 5

    run(promise, tmp_path, runner, disk=disk, limits=replace(LIMITS, reserve_bytes=1000))


@pytest.mark.parametrize(
    "point",
    ["validate.read", "record.output_synced", "record.committing", "settle.committing", "finish.committed"],
)
@pytest.mark.parametrize(
    "error", [FULL, OSError(errno.EIO, "Input/output error"), RuntimeError("a fault of ours")]
)
def test_one_failure_at_any_boundary_is_waited_out(tmp_path: Path, point: str, error: Exception) -> None:
    left = [point]

    def at(passed: str) -> None:
        if passed in left:
            left.remove(passed)
            raise error

    async def promise(service: BatchService) -> None:
        batch = await ended(service, await submit(service, lines(10)))
        assert (batch.status, await outputs(service, batch)) == ("completed", expected(10))

    runner = ScriptedRunner()
    run(promise, tmp_path, runner, at=at)
    assert left == []
    assert set(runner.runs.values()) == {1}


def test_a_body_that_cannot_be_read_is_an_error_line(tmp_path: Path) -> None:
    bad = lines(1).replace(b"question 1", b"\\ud800")

    async def promise(service: BatchService) -> None:
        batch = await ended(service, await submit(service, bad))
        if batch.status == "completed":
            (one,) = await content(service, batch.error_file_id)
            assert one["response"]["status_code"] == 400
        else:
            assert batch.errors[0].line == 1

    run(promise, tmp_path, ScriptedRunner())


def test_an_answer_that_cannot_be_written_down_is_a_fault_and_its_line_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def behave(text: str, run: int) -> LineResponse | None:
        return LineResponse(200, {"echo": text, "rest": "\ud800"}) if text == "question 2" else None

    async def promise(service: BatchService) -> None:
        batch = await ended(service, await submit(service, lines(3)))
        assert (batch.status, batch.completed, batch.failed) == ("completed", 2, 1)
        (one,) = await content(service, batch.error_file_id)
        assert (one["custom_id"], one["response"]["status_code"]) == ("line-2", 500)
        assert one["id"] in caplog.text

    run(promise, tmp_path, ScriptedRunner(behave))
    assert "question" not in caplog.text


def test_no_prompt_is_logged_when_a_line_fails_inside_the_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def behave(text: str, run: int) -> LineResponse | None:
        raise KeyError(text)

    async def promise(service: BatchService) -> None:
        assert (await ended(service, await submit(service, lines(1)))).failed == 1

    run(promise, tmp_path, ScriptedRunner(behave))
    assert "KeyError" in caplog.text
    assert "question 1" not in caplog.text


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_lines_that_were_spoilt_on_disk_end_by_their_names(tmp_path: Path, is_cancelled: bool) -> None:
    async def promise(service: BatchService) -> None:
        service.runner.pause()
        batch = await submit(service, lines(2))
        await until(lambda: is_in(service, batch, "in_progress"))
        path = tmp_path / "files" / batch.input_file_id
        path.write_bytes(path.read_bytes().replace(b"}\n", b"\x0c\n"))
        if is_cancelled:
            await service.cancel(OWNER, batch.id)
        service.runner.resume()
        batch = await ended(service, batch)
        assert (batch.status, batch.failed) == ("cancelled" if is_cancelled else "completed", 2)
        found = await content(service, batch.error_file_id)
        assert {one["custom_id"] for one in found} == {"line-1", "line-2"}

    run(promise, tmp_path, ScriptedRunner())


def test_an_input_that_can_never_be_read_fails_its_batch_and_no_other(tmp_path: Path) -> None:
    def is_known(name: str) -> bool:
        if name == "evil":
            raise RuntimeError("a fault of ours")
        return True

    async def promise(service: BatchService) -> None:
        bad = await submit(service, lines(2).replace(b'"m"', b'"evil"'))
        good = await submit(service, lines(2))
        bad, good = await ended(service, bad), await ended(service, good)
        assert (bad.status, [error.code for error in bad.errors]) == ("failed", ["internal_error"])
        assert "RuntimeError" in bad.errors[0].message
        assert good.status == "completed"

    run(promise, tmp_path, ScriptedRunner(), is_known_model=is_known)


def test_a_batch_expires_also_before_its_input_was_read(tmp_path: Path) -> None:
    clock = Clock()

    def is_known(name: str) -> bool:
        clock.now_s += DAY_S
        raise StorageError("the disk is away", is_full=False)

    async def promise(service: BatchService) -> None:
        batch = await ended(service, await submit(service, lines(2)))
        assert (batch.status, batch.total) == ("expired", 0)

    run(promise, tmp_path, ScriptedRunner(), now=clock, is_known_model=is_known)


def test_an_input_is_not_read_beyond_its_deadline(tmp_path: Path) -> None:
    clock = Clock()

    def is_known(name: str) -> bool:
        clock.now_s += DAY_S
        return True

    async def promise(service: BatchService) -> None:
        batch = await ended(service, await submit(service, lines(1000)))
        assert (batch.status, batch.total) == ("expired", 0)

    run(promise, tmp_path, ScriptedRunner(), now=clock, is_known_model=is_known)


def test_who_has_lines_in_flight_only_sets_no_level_for_who_comes(tmp_path: Path) -> None:
    """The one line of ben runs long and counts little; cora comes late and is owed nothing for it."""
    gate, release = asyncio.Event(), asyncio.Event()

    async def behave(text: str, run: int) -> LineResponse | None:
        number = int(text.split()[1])
        if number >= 20:
            await (release if number == 50 else gate).wait()
        return None

    runner = ScriptedRunner(behave)

    async def promise(service: BatchService) -> None:
        service.runner.pause()
        many = await submit(service, lines(30))
        long = await submit(service, jsonl([line(50)]), owner="ben")
        for batch in (many, long):
            await until(lambda batch=batch: is_in(service, batch, "in_progress"))  # type: ignore[misc]
        service.runner.resume()
        await until(lambda: are_begun(runner, 21))
        late = await submit(service, jsonl(line(n) for n in range(60, 70)), owner="cora")
        await until(lambda: is_in(service, late, "in_progress"))
        gate.set()
        await ended(service, late)
        ahead = [int(text.split()[1]) for text in runner.order[21:31]]
        assert 4 <= sum(number >= 60 for number in ahead) <= 6, ahead
        release.set()
        for batch in (many, long):
            await ended(service, batch)

    run(promise, tmp_path, runner, settings=replace(SETTINGS, concurrency=2))


def test_what_a_cancelled_line_took_counts_for_its_owner(tmp_path: Path) -> None:
    """It had 9 tokens, which cost 18; the other lines cost 4."""

    async def behave(text: str, run: int) -> LineResponse | None:
        if text == "question 1":
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise LineCancelled(Usage(output_tokens=9)) from None
        return None

    runner = ScriptedRunner(behave)

    async def promise(service: BatchService) -> None:
        service.runner.pause()
        left = await submit(service, lines(1), window_s=HOUR_S)
        more = await submit(service, jsonl(line(n) for n in (11, 12)))
        bens = await submit(service, jsonl(line(n) for n in range(21, 29)), owner="ben")
        for batch in (left, more, bens):
            await until(lambda batch=batch: is_in(service, batch, "in_progress"))  # type: ignore[misc]
        service.runner.resume()
        await until(lambda: are_begun(runner, 1))
        await service.cancel(OWNER, left.id)
        for batch in (left, more, bens):
            await ended(service, batch)

    run(promise, tmp_path, runner, settings=replace(SETTINGS, concurrency=1))
    assert runner.order[:7] == [f"question {n}" for n in (1, 21, 22, 23, 24, 25, 11)]


def test_the_time_left_is_never_negative(tmp_path: Path) -> None:
    clock, runner = Clock(), ScriptedRunner()

    async def promise(service: BatchService) -> None:
        batch = await submit(service, lines(1), window_s=HOUR_S)
        await ended(service, batch)

    run(promise, tmp_path, runner, now=clock)
    assert runner.seconds_left == {"question 1": HOUR_S}


def test_the_time_until_a_batch_is_through_counts_those_before_it(tmp_path: Path) -> None:
    async def promise(service: BatchService) -> None:
        gate = asyncio.Event()

        async def behave(text: str, run: int) -> LineResponse | None:
            if int(text.split()[1]) > 4:
                await gate.wait()
            return None

        runner.behave = behave
        first = await submit(service, lines(20), window_s=HOUR_S)
        assert service.runner.eta_s(first) is None
        await until(lambda: has_completed(service, first, 4))
        second = await submit(service, lines(20), window_s=DAY_S)
        await until(lambda: is_in(service, second, "in_progress"))
        first, second = await service.batch(OWNER, first.id), await service.batch(OWNER, second.id)
        before, behind = service.runner.eta_s(first), service.runner.eta_s(second)
        assert before is not None
        assert behind is not None
        assert behind > 2 * before > 0
        gate.set()

    runner = ScriptedRunner()
    run(promise, tmp_path, runner)


def test_the_pace_counts_only_the_last_minutes_and_only_busy_ones() -> None:
    pace = Pace(window_s=100.0)
    assert pace.lines_per_s(0.0) is None
    pace.began(10.0)
    pace.finished(20, 20.0)
    assert pace.lines_per_s(20.0) == 2.0
    pace.ended(20.0)
    assert pace.lines_per_s(1000.0) == 2.0
    pace.began(1000.0)
    pace.finished(40, 1095.0)
    assert pace.lines_per_s(1100.0) == 0.4  # the first ones are forgotten
    pace.ended(1100.0)
    pace.began(5000.0)
    assert pace.lines_per_s(5200.0) is None


def test_settings_bound_the_lines_in_flight(tmp_path: Path) -> None:
    runner = ScriptedRunner()

    async def promise(service: BatchService) -> None:
        await ended(service, await submit(service, lines(40)))

    run(promise, tmp_path, runner, settings=RunnerSettings(concurrency=2))
    assert runner.most == 2
