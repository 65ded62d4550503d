"""The load generator: two classes at once over any target, open loop, latency from the intended arrival.

A stream of requests is sent when each is due, whatever became of those before it: a slow answer delays no
later request, and what the sender itself loses counts as latency (no coordinated omission). Beside it a
backlog keeps so many batch requests with the target at all times.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from omniserve.bench.attainment import Record
from omniserve.bench.workloads import Arrival, token_ids
from omniserve.errors import OmniServeError, RequestError
from omniserve.types import SamplingParams

if TYPE_CHECKING:
    from omniserve.engine.async_llm import AsyncLLM

TICK_S = 0.25
# A backlog that is refused so often without one job taken between is no backlog: the set-up is wrong.
MAX_REFUSED_IN_A_ROW = 16


class Refused(Exception):
    """The target will not serve this request."""


class Cancelled(Exception):
    """The target gave up a request that it had taken."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request as a target gets it. `number` tells it from all others of its class and seed."""

    number: int
    service_class: str
    num_prompt: int
    num_output: int
    seed: int


class Target(Protocol):
    """Something that serves requests.

    `send` yields the number of new tokens each time some have come, `num_output` in all. It raises Refused or
    Cancelled; any other exception counts as a failure. Closing the iterator early ends the request.
    """

    def send(self, job: Job) -> AsyncGenerator[int, None]: ...


@dataclass(frozen=True, slots=True)
class Backlog:
    """Batch jobs, `depth` of them with the target while there are any.

    sizes: tokens of prompt and output of one job after the other.
    """

    service_class: str
    depth: int
    sizes: Iterator[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Load:
    """What to send.

    arrivals: of `service_class`, in order. duration_s: how long the load lasts at least. drain_s: how long
    its last requests may take beyond that; then they have timed out. The backlog stays full until the last
    request of the stream is done, so that late ones have it as hard as early ones.
    """

    arrivals: Sequence[Arrival]
    duration_s: float
    service_class: str = "latency_sensitive"
    backlog: Backlog | None = None
    drain_s: float = 30.0
    seed: int = 0


class Sender:
    """Sends one load to one target and keeps the records. Time is the event loop's own."""

    def __init__(self, target: Target, load: Load) -> None:
        self.records: list[Record] = []
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
        keepers = self._start_backlog()
        stream = asyncio.create_task(self._send_stream())
        try:
            while not stream.done():
                running = [stream, *(keeper for keeper in keepers if not keeper.done())]
                await asyncio.wait(running, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
                if on_tick is not None:
                    on_tick(self.now_s())
                for keeper in keepers:
                    if keeper.done():
                        keeper.result()  # raises what ended it; without an error its jobs have run out
            await stream
        finally:
            for task in (stream, *keepers):
                task.cancel()
            await asyncio.gather(stream, *keepers, return_exceptions=True)
        return self.records

    async def _send_stream(self) -> None:
        load = self._load
        sent: list[tuple[asyncio.Task[None], Record]] = []
        try:
            for number, arrival in enumerate(load.arrivals):
                await asyncio.sleep(arrival.at_s - self.now_s())
                job = Job(number, load.service_class, arrival.num_prompt, arrival.num_output, load.seed)
                record = self._record(job, arrival.at_s)
                sent.append((asyncio.create_task(self._send(job, record)), record))
            await asyncio.sleep(load.duration_s - self.now_s())
            if sent:
                await asyncio.wait([task for task, _ in sent], timeout=load.drain_s)
        finally:
            for task, record in sent:
                if not task.done():
                    task.cancel()
                    record.outcome, record.reason = "timed_out", f"not done {load.drain_s:g} s after the load"
            await asyncio.gather(*(task for task, _ in sent), return_exceptions=True)

    def _record(self, job: Job, due_s: float) -> Record:
        self.records.append(Record(job.service_class, due_s, job.num_prompt, job.num_output))
        return self.records[-1]

    async def _send(self, job: Job, record: Record) -> None:
        """One request from its sending to its end, whatever that is."""
        record.sent_s = self.now_s()
        try:
            async with aclosing(self._target.send(job)) as tokens:
                async for count in tokens:
                    record.token_s += [self.now_s()] * count
            if len(record.token_s) < job.num_output:
                raise OmniServeError(f"ended after {len(record.token_s)} of {job.num_output} tokens")
            record.outcome = "finished"
        except Refused as refusal:
            record.outcome, record.reason = "refused", str(refusal)
        except Cancelled as end:
            record.outcome, record.reason = "cancelled", str(end)
        except Exception as error:
            record.outcome, record.reason = "failed", f"{type(error).__name__}: {error}"

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
            job = Job(number, backlog.service_class, num_prompt, num_output, self._load.seed)
            record = self._record(job, due_s=self.now_s())
            await self._send(job, record)
            self._check_taken(record)

    def _check_taken(self, record: Record) -> None:
        is_lost = record.outcome in ("refused", "failed")
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
