"""The load generator: several classes at once over any target, open loop, latency from the intended arrival.

A stream of requests is sent when each is due, whatever became of those before it: a slow answer delays no
later request, and what the sender itself loses counts as latency (no coordinated omission). Beside streams a
backlog keeps so many batch requests with the target at all times.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from omniserve.bench.attainment import Outcome, Record, spread_over
from omniserve.bench.workloads import Arrival, token_ids
from omniserve.errors import OmniServeError, RequestError
from omniserve.types import SamplingParams

if TYPE_CHECKING:
    from omniserve.engine.async_llm import AsyncLLM

TICK_S = 0.25
# A backlog that is refused so often without one job taken between is no backlog: the set-up is wrong.
MAX_REFUSED_IN_A_ROW = 16


class Refused(OmniServeError):
    """The target will not serve this request. retry_after_s: when it asks to be asked again, if it does."""

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class Cancelled(OmniServeError):
    """The target gave up a request that it had taken."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request as a target gets it. `number` tells it from all others of its class and seed."""

    number: int
    service_class: str
    num_prompt: int
    num_output: int
    seed: int


@dataclass(frozen=True, slots=True)
class Usage:
    """The target's own count of the tokens of one request; it overrules what was seen on the way."""

    num_prompt: int
    num_output: int


class Target(Protocol):
    """Something that serves requests.

    `send` yields the number of new tokens each time some have come, `num_output` in all; at the end it may
    yield a Usage. It raises Refused or Cancelled; any other exception counts as a failure. Closing the
    iterator early ends the request.
    """

    def send(self, job: Job) -> AsyncGenerator[int | Usage, None]: ...


@dataclass(frozen=True, slots=True)
class Stream:
    """Requests of one class, in order, each sent when it is due.

    max_concurrency: so many of them with the target at most; the others wait, which counts as latency.
    is_closed_loop: no arrival was planned; a request arrives when there is a place for it.
    """

    service_class: str
    arrivals: Iterable[Arrival]
    max_concurrency: int | None = None
    is_closed_loop: bool = False


@dataclass(frozen=True, slots=True)
class Backlog:
    """Batch jobs, `depth` of them with the target while there are any.

    sizes: tokens of prompt and output of one job after the other. A place whose job was refused stays empty
    for as long as the target asked for.
    """

    service_class: str
    depth: int
    sizes: Iterator[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Load:
    """What to send.

    duration_s: how long the load lasts at least. drain_s: how long its last requests may take beyond that;
    then they have timed out (None: for ever). timeout_s: how long each may take from its arrival.
    background, backlog: go on until the last request of the streams is done, so that late ones have it as
    hard as early ones, and are then cut off. is_length_fixed: an answer that ends before `num_output` tokens
    has failed; else it is as good as any.
    """

    streams: Sequence[Stream]
    duration_s: float
    backlog: Backlog | None = None
    background: Sequence[Stream] = ()
    drain_s: float | None = 30.0
    timeout_s: float | None = None
    seed: int = 0
    is_length_fixed: bool = True


class Sender:
    """Sends one load to one target and keeps the records. Time is the event loop's own.

    ended: how many requests of a class have ended how, so far. seconds: how long the load lasted, once it is
    over.
    """

    def __init__(self, target: Target, load: Load) -> None:
        self.records: list[Record] = []
        self.ended: Counter[tuple[str, Outcome]] = Counter()
        self.seconds = 0.0
        self._target, self._load = target, load
        self._loop = asyncio.get_running_loop()
        self._began_s = self._loop.time()
        self._refused_in_a_row = 0

    def now_s(self) -> float:
        """Seconds since the load began."""
        return self._loop.time() - self._began_s

    async def run(self, on_tick: Callable[[float], None] | None = None) -> list[Record]:
        """Send everything; on_tick(seconds since the load began) is called every TICK_S.

        Raises OmniServeError when the target takes no batch jobs.
        """
        keepers = [*self._start_backlog(), *self._start_background()]
        streams = asyncio.create_task(self._send_streams())
        try:
            while not streams.done():
                running = [streams, *(keeper for keeper in keepers if not keeper.done())]
                await asyncio.wait(running, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
                if on_tick is not None:
                    on_tick(self.now_s())
                for keeper in keepers:
                    if keeper.done():
                        keeper.result()  # raises what ended it; without an error its jobs have run out
            await streams
            self.seconds = self.now_s()
        finally:
            for task in (streams, *keepers):
                task.cancel()
            await asyncio.gather(streams, *keepers, return_exceptions=True)
        return self.records

    # ------------------------------------------------------------ streams

    async def _send_streams(self) -> None:
        load = self._load
        sent: dict[asyncio.Task[None], Record] = {}
        try:
            await asyncio.gather(*(self._send_stream(stream, sent) for stream in load.streams))
            await asyncio.sleep(load.duration_s - self.now_s())
            if sent:
                await asyncio.wait(sent, timeout=load.drain_s)
        finally:
            for task, record in sent.items():
                if not task.done():
                    task.cancel()
                    record.outcome, record.reason = "timed_out", "not done when the load was over"
            await asyncio.gather(*sent, return_exceptions=True)

    def _start_background(self) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(self._send_until_cut_off(stream)) for stream in self._load.background]

    async def _send_until_cut_off(self, stream: Stream) -> None:
        sent: dict[asyncio.Task[None], Record] = {}
        try:
            await self._send_stream(stream, sent)
            await asyncio.gather(*sent)
        finally:
            for task in sent:
                task.cancel()
            await asyncio.gather(*sent, return_exceptions=True)

    async def _send_stream(self, stream: Stream, sent: dict[asyncio.Task[None], Record]) -> None:
        limit = stream.max_concurrency
        places = nullcontext() if limit is None else asyncio.Semaphore(limit)
        for number, arrival in enumerate(stream.arrivals):
            await asyncio.sleep(arrival.at_s - self.now_s())
            job = self._job(number, stream.service_class, arrival.num_prompt, arrival.num_output)
            record = self._record(job, arrival.at_s)
            sent[asyncio.create_task(self._send_in_place(places, stream, job, record))] = record

    async def _send_in_place(
        self, places: AbstractAsyncContextManager[None], stream: Stream, job: Job, record: Record
    ) -> None:
        async with places:
            if stream.is_closed_loop:
                record.due_s = self.now_s()
            await self._send(job, record)

    def _job(self, number: int, service_class: str, num_prompt: int, num_output: int) -> Job:
        return Job(number, service_class, num_prompt, num_output, self._load.seed)

    def _record(self, job: Job, due_s: float) -> Record:
        self.records.append(Record(job.service_class, due_s, job.num_prompt, job.num_output))
        return self.records[-1]

    # ------------------------------------------------------------ one request

    async def _send(self, job: Job, record: Record) -> float:
        """One request from its sending to its end, whatever that is. Returns the seconds that the target
        asked to be left alone for."""
        pause_s = await self._answered(job, record)
        self.ended[job.service_class, record.outcome] += 1
        return pause_s

    async def _answered(self, job: Job, record: Record) -> float:
        record.sent_s = self.now_s()
        timeout_s = self._load.timeout_s
        limit = asyncio.timeout_at(None if timeout_s is None else self._began_s + record.due_s + timeout_s)
        try:
            async with limit:
                await self._receive(job, record)
            record.outcome = "finished"
        except Refused as refusal:
            record.outcome, record.reason = "refused", str(refusal)
            return refusal.retry_after_s or 0.0
        except Cancelled as end:
            record.outcome, record.reason = "cancelled", str(end)
        except Exception as error:
            if limit.expired():
                record.outcome, record.reason = "timed_out", f"not done {timeout_s:g} s after its arrival"
            else:
                is_ours = isinstance(error, OmniServeError)
                record.outcome = "failed"
                record.reason = str(error) if is_ours else f"{type(error).__name__}: {error}"
        return 0.0

    async def _receive(self, job: Job, record: Record) -> None:
        async with aclosing(self._target.send(job)) as parts:
            async for part in parts:
                if isinstance(part, Usage):
                    record.counted_prompt = part.num_prompt
                    record.token_s = spread_over(record.token_s, part.num_output)
                else:
                    record.token_s += [self.now_s()] * part
        if self._load.is_length_fixed and len(record.token_s) < job.num_output:
            raise OmniServeError(f"ended after {len(record.token_s)} of {job.num_output} tokens")

    # ------------------------------------------------------------ backlog

    def _start_backlog(self) -> list[asyncio.Task[None]]:
        backlog = self._load.backlog
        if backlog is None:
            return []
        numbered = enumerate(backlog.sizes)
        return [asyncio.create_task(self._keep(backlog, numbered)) for _ in range(backlog.depth)]

    async def _keep(self, backlog: Backlog, sizes: Iterator[tuple[int, tuple[int, int]]]) -> None:
        """One of the `depth` places: the next job as soon as the one before it is done."""
        for number, (num_prompt, num_output) in sizes:
            job = self._job(number, backlog.service_class, num_prompt, num_output)
            record = self._record(job, due_s=self.now_s())
            pause_s = await self._send(job, record)
            self._check_taken(record, pause_s)
            if pause_s:
                await asyncio.sleep(pause_s)

    def _check_taken(self, record: Record, pause_s: float) -> None:
        """A target that says when to come again is full, not wrongly set up."""
        is_lost = record.outcome in ("refused", "failed", "timed_out") and not pause_s
        self._refused_in_a_row = self._refused_in_a_row + 1 if is_lost else 0
        if self._refused_in_a_row >= MAX_REFUSED_IN_A_ROW:
            raise OmniServeError(
                f"backlog: {self._refused_in_a_row} {record.service_class} jobs in a row were lost, the last "
                f"one {record.outcome} ({record.reason}); shorten their contexts or give more memory"
            )


async def send_load(
    target: Target, load: Load, on_tick: Callable[[float], None] | None = None
) -> list[Record]:
    """Send a load; the records of all its requests, batch jobs that were cut off at the end included."""
    return await Sender(target, load).run(on_tick)


# ---------------------------------------------------------------- targets


class InProcess:
    """An AsyncLLM as a target. Prompts are random token ids, so that the prefix cache finds nothing."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm

    async def send(self, job: Job) -> AsyncGenerator[int, None]:
        seed = f"{job.seed} {job.service_class} {job.number}"
        prompt = token_ids(seed, job.num_prompt, self._llm.tokenizer.vocab_size)
        params = SamplingParams(temperature=0.0, max_tokens=job.num_output, ignore_eos=True)
        outputs = self._llm.submit(prompt, params, job.service_class)
        seen = 0
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    count = len(output.token_ids)
                    if count > seen:
                        yield count - seen
                    seen = count
                    if output.finish_reason == "abort":
                        raise Cancelled("the engine ended it")
        except RequestError as error:  # admission says no by a subclass of it
            raise Refused(str(error)) from error
