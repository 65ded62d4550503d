"""The load generator against scripted targets, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count, repeat

import pytest

from bench.virtual_time import run_virtually
from omniserve.bench.attainment import Record
from omniserve.bench.load import (
    Backlog,
    Cancelled,
    InProcess,
    Job,
    Load,
    Refused,
    Stream,
    Usage,
    send_load,
)
from omniserve.bench.workloads import Arrival
from omniserve.errors import EngineDeadError, OmniServeError

LS, BE = "latency_sensitive", "best_effort"


class Scripted:
    """First token after `ttft_s`, then one each `tpot_s`; counts what is with it. `fail` may raise."""

    def __init__(
        self, ttft_s: float = 0.5, tpot_s: float = 0.25, fail: Callable[[Job], None] = lambda _: None
    ) -> None:
        self.ttft_s, self.tpot_s, self.fail = ttft_s, tpot_s, fail
        self.running: dict[str, int] = {LS: 0, BE: 0}
        self.seen: list[Job] = []

    async def send(self, job: Job) -> AsyncGenerator[int, None]:
        self.seen.append(job)
        self.running[job.service_class] += 1
        try:
            await asyncio.sleep(self.ttft_s)
            self.fail(job)
            yield 1
            for _ in range(job.num_output - 1):
                await asyncio.sleep(self.tpot_s)
                yield 1
        finally:
            self.running[job.service_class] -= 1


class OneAtATime(Scripted):
    """Serves requests one after the other, as a server under overload does."""

    def __init__(self) -> None:
        super().__init__(ttft_s=2.0)
        self.lock = asyncio.Lock()

    async def send(self, job: Job) -> AsyncGenerator[int, None]:
        async with self.lock:
            async for new in super().send(job):
                yield new


def arrivals(*times: float, num_output: int = 3) -> list[Stream]:
    """A latency-sensitive stream and nothing else."""
    return [Stream(LS, [Arrival(t, 8, num_output) for t in times])]


def send(make: Callable[[], object], load: Load, **options: object) -> list[Record]:
    async def run() -> list[Record]:
        return await send_load(make(), load, **options)  # type: ignore[arg-type]

    return run_virtually(run)


def jobs(sizes: tuple[int, int] = (8, 4)) -> Iterator[tuple[int, int]]:
    return repeat(sizes)


def test_each_request_is_sent_when_it_is_due_and_its_tokens_are_timed() -> None:
    records = send(Scripted, Load(arrivals(1.0, 4.0), duration_s=6.0))
    assert [r.due_s for r in records] == [1.0, 4.0]
    assert records[0].token_s == pytest.approx([1.5, 1.75, 2.0])
    assert records[1].ttft_s == pytest.approx(0.5)
    assert records[1].tpot_s == pytest.approx(0.25)
    assert {r.outcome for r in records} == {"finished"}


def test_a_slow_target_delays_no_request_and_waiting_counts_as_latency() -> None:
    """Ten requests in one second, two seconds each: a closed loop would have reported 2 s for every one."""
    load = Load(arrivals(*(i / 10 for i in range(10)), num_output=1), duration_s=1.0)
    records = send(OneAtATime, load)
    assert [r.sent_s for r in records] == pytest.approx([i / 10 for i in range(10)])
    assert [r.ttft_s for r in records] == pytest.approx([2.0 * (i + 1) - i / 10 for i in range(10)])


def test_a_sender_that_is_held_up_pays_for_it_itself() -> None:
    """The loop is stopped from 0.5 to 3 s; a request due at 1 s has waited since 1 s."""

    async def run() -> list[Record]:
        loop = asyncio.get_running_loop()

        def hold_up() -> None:
            loop._jumping.now_s = 3.0  # type: ignore[attr-defined]

        loop.call_at(0.5, hold_up)
        return await send_load(Scripted(), Load(arrivals(1.0), duration_s=1.0))

    (record,) = run_virtually(run)
    assert record.sent_s == pytest.approx(3.0)
    assert record.ttft_s == pytest.approx(2.5)


def raiser(error: Exception) -> Callable[[Job], None]:
    def fail(job: Job) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (Refused("predicted 3 s, target 1 s"), "refused"),
        (Cancelled("the engine ended it"), "cancelled"),
        (EngineDeadError("gone"), "failed"),
    ],
)
def test_what_is_not_served_is_recorded_with_its_reason(error: Exception, outcome: str) -> None:
    (record,) = send(lambda: Scripted(fail=raiser(error)), Load(arrivals(0.0), duration_s=1.0))
    assert record.outcome == outcome
    assert str(error) in record.reason
    assert record.ttft_s is None


def test_streams_of_two_classes_run_side_by_side_each_at_its_own_times() -> None:
    streams = [*arrivals(0.0, 2.0), Stream(BE, [Arrival(1.0, 8, 2)])]
    records = send(Scripted, Load(streams, duration_s=3.0))
    assert [(r.service_class, r.sent_s) for r in records] == [(LS, 0.0), (BE, 1.0), (LS, 2.0)]


def test_waiting_for_one_of_few_places_counts_as_latency() -> None:
    (stream,) = arrivals(0.0, 0.25, num_output=1)
    load = Load([replace(stream, max_concurrency=1)], duration_s=1.0)
    first, second = send(lambda: Scripted(ttft_s=1.0), load)
    assert (first.ttft_s, second.sent_s, second.ttft_s) == (1.0, 1.0, 1.75)


def test_in_a_closed_loop_a_request_arrives_when_there_is_a_place_for_it() -> None:
    (stream,) = arrivals(0.0, 0.0, 0.0, num_output=1)
    load = Load([replace(stream, max_concurrency=2, is_closed_loop=True)], duration_s=0.0, drain_s=None)
    records = send(lambda: Scripted(ttft_s=40.0), load)
    assert [(r.due_s, r.ttft_s) for r in records] == [(0.0, 40.0), (0.0, 40.0), (40.0, 40.0)]


def test_a_request_that_takes_too_long_has_timed_out_and_is_taken_back() -> None:
    target = Scripted(ttft_s=1.0, tpot_s=1.0)
    done, late = send(
        lambda: target, Load([*arrivals(0.0, num_output=2), *arrivals(1.0, num_output=9)], 2.0, timeout_s=3.5)
    )
    assert done.outcome == "finished"
    assert (late.outcome, late.token_s) == ("timed_out", [2.0, 3.0, 4.0])
    assert "3.5 s" in late.reason
    assert target.running == {LS: 0, BE: 0}


def test_the_target_s_own_count_overrules_what_was_seen_on_the_way() -> None:
    class Lumpy(Scripted):
        """Six tokens in three lumps."""

        async def send(self, job: Job) -> AsyncGenerator[int | Usage, None]:  # type: ignore[override]
            async for new in super().send(replace(job, num_output=3)):
                yield new
            yield Usage(num_prompt=11, num_output=6)

    (record,) = send(Lumpy, Load(arrivals(0.0, num_output=6), duration_s=1.0))
    assert (record.outcome, record.counted_prompt) == ("finished", 11)
    assert record.token_s == [0.5, 0.5, 0.75, 0.75, 1.0, 1.0]
    assert record.tpot_s == pytest.approx(0.1)
    assert record.itl_s == [0.25, 0.25]


def test_an_answer_that_ends_early_is_a_failure_where_lengths_are_fixed() -> None:
    class Curt(Scripted):
        async def send(self, job: Job) -> AsyncGenerator[int, None]:
            yield 2

    (record,) = send(Curt, Load(arrivals(0.0), duration_s=1.0))
    assert (record.outcome, len(record.token_s)) == ("failed", 2)
    (record,) = send(Curt, Load(arrivals(0.0), duration_s=1.0, is_length_fixed=False))
    assert (record.outcome, len(record.token_s)) == ("finished", 2)


def test_what_is_not_done_after_the_drain_has_timed_out_and_is_taken_back() -> None:
    target = Scripted(ttft_s=1.0, tpot_s=1.0)
    load = Load(arrivals(0.0, 8.0, num_output=5), duration_s=10.0, drain_s=1.5)
    done, late = send(lambda: target, load)
    assert done.outcome == "finished"
    assert (late.outcome, late.token_s) == ("timed_out", pytest.approx([9.0, 10.0, 11.0]))
    assert target.running == {LS: 0, BE: 0}


def test_the_backlog_is_full_all_the_time_until_the_stream_is_done() -> None:
    target, depths = Scripted(), list[int]()

    def look(now_s: float) -> None:
        depths.append(target.running[BE])

    load = Load(arrivals(9.9), duration_s=10.0, backlog=Backlog(BE, 5, jobs()))
    records = send(lambda: target, load, on_tick=look)
    assert set(depths[:-1]) == {5}
    assert len(depths) > 40
    batch = [r for r in records if r.service_class == BE]
    # 1.25 s a job, 10.9 s until the late request is done: eight each, and a ninth that is cut off.
    assert sum(r.outcome == "finished" for r in batch) == 5 * 8
    assert sum(r.outcome == "unfinished" for r in batch) == 5
    assert target.running == {LS: 0, BE: 0}
    assert len({job.number for job in target.seen if job.service_class == BE}) == len(batch)


def test_a_load_of_batch_jobs_alone_lasts_as_long_as_it_should() -> None:
    times: list[float] = []
    load = Load([], duration_s=4.0, backlog=Backlog(BE, 1, jobs()))
    send(Scripted, load, on_tick=times.append)
    assert times[-1] == pytest.approx(4.0)


def test_a_stream_in_the_background_goes_on_until_the_others_are_done_and_is_then_cut_off() -> None:
    endless = (Arrival(2.0 * i, 8, 3) for i in count())
    target = Scripted()
    load = Load(arrivals(5.5), duration_s=1.0, background=[Stream(BE, endless)])
    records = [r for r in send(lambda: target, load) if r.service_class == BE]
    # The request due at 5.5 s is done at 6.5 s: the one of the background that came at 6 s is not.
    assert [(r.due_s, r.outcome) for r in records] == [
        (0.0, "finished"),
        (2.0, "finished"),
        (4.0, "finished"),
        (6.0, "unfinished"),
    ]
    assert target.running == {LS: 0, BE: 0}


def test_a_backlog_that_runs_out_leaves_the_stream_alone() -> None:
    load = Load(arrivals(9.0), duration_s=10.0, backlog=Backlog(BE, 2, iter([(8, 4)] * 3)))
    assert [r.outcome for r in send(Scripted, load)] == ["finished"] * 4


def test_a_backlog_that_is_always_refused_ends_the_run_with_the_reason() -> None:
    def fail(job: Job) -> None:
        if job.service_class == BE:
            raise Refused("max_tokens: too long")

    target = Scripted(fail=fail)
    load = Load(arrivals(50.0), duration_s=60.0, backlog=Backlog(BE, 2, jobs()))
    with pytest.raises(OmniServeError, match=r"backlog: .*max_tokens: too long"):
        send(lambda: target, load)
    assert target.running == {LS: 0, BE: 0}


def test_a_refusal_now_and_then_does_not_end_the_backlog() -> None:
    def fail(job: Job) -> None:
        if job.number % 3:
            raise Refused("full")

    load = Load([], duration_s=60.0, backlog=Backlog(BE, 2, jobs()))
    records = send(lambda: Scripted(fail=fail), load)
    assert sum(r.outcome == "refused" for r in records) > 16
    assert sum(r.outcome == "finished" for r in records) > 16


def test_a_place_whose_job_was_refused_stays_empty_for_as_long_as_the_target_asks() -> None:
    """Twenty refusals in a row are a full target, not a wrong set-up, when it says when to come again."""
    refusal = Refused("full", retry_after_s=2.5)
    load = Load([], duration_s=59.0, backlog=Backlog(BE, 1, jobs()))
    records = send(lambda: Scripted(ttft_s=0.5, fail=raiser(refusal)), load)
    assert [r.due_s for r in records] == pytest.approx([3.0 * i for i in range(20)])
    assert {r.outcome for r in records} == {"refused"}


class FakeLLM:
    """What InProcess needs of AsyncLLM: cumulative outputs from `submit`."""

    class tokenizer:
        vocab_size = 100

    def __init__(self, counts: Sequence[int], reason: str | None, error: Exception | None = None) -> None:
        self.counts, self.reason, self.error = counts, reason, error
        self.calls: list[tuple[list[int], object, str]] = []

    async def submit(
        self, prompt: list[int], params: object, service_class: str
    ) -> AsyncGenerator[object, None]:
        self.calls.append((prompt, params, service_class))
        if self.error is not None:
            raise self.error
        for i, num_tokens in enumerate(self.counts):
            reason = self.reason if i == len(self.counts) - 1 else None
            yield type("Output", (), {"token_ids": [0] * num_tokens, "finish_reason": reason})


def through(llm: FakeLLM) -> Record:
    target = InProcess(llm)  # type: ignore[arg-type]
    return send(lambda: target, Load(arrivals(0.0), duration_s=1.0, seed=4))[0]


def test_the_engine_gets_prompt_and_length_and_its_cumulative_outputs_become_new_tokens() -> None:
    llm = FakeLLM([1, 3], "length")
    assert (through(llm).outcome, len(through(llm).token_s)) == ("finished", 3)
    (prompt, params, service_class), again = llm.calls
    assert (len(prompt), params.max_tokens, params.ignore_eos, service_class) == (8, 3, True, LS)  # type: ignore[attr-defined]
    assert again[0] == prompt


def test_refusals_and_aborts_of_the_engine_are_told_apart() -> None:
    from omniserve.errors import RequestError

    class SloUnattainableError(RequestError):
        pass

    refused = through(FakeLLM([], None, SloUnattainableError("slo", "predicted 3 s, target 1 s")))
    assert (refused.outcome, refused.reason) == ("refused", "slo: predicted 3 s, target 1 s")
    assert through(FakeLLM([1, 1], "abort")).outcome == "cancelled"
    assert through(FakeLLM([], None, EngineDeadError("gone"))).outcome == "failed"
