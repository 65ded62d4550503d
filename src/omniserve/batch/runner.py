"""Runs the lines of all batches, owners by turns and the most urgent batch of each first, and takes each
batch from state to state.

Everything here can be lost at any moment: what counts is in the store, and a new runner goes on from there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import TypeVar

from omniserve.batch.attempts import Attempts
from omniserve.batch.errors import StorageError
from omniserve.batch.fair_share import FairShare, cost_of
from omniserve.batch.jobs import Job, RunnerSettings, RunnerStatus, lines_until_through, outlook, urgency
from omniserve.batch.limits import Quota
from omniserve.batch.line_runner import EngineGone, LineCancelled, LineResponse, LineRunner, decode_request
from omniserve.batch.pace import Pace
from omniserve.batch.records import BatchRecord, Line, LineError
from omniserve.batch.results import never_run, request_id_of
from omniserve.batch.states import NEVER_RUN_CODE, Event, Status
from omniserve.batch.store import Store
from omniserve.batch.suspicion import runs_alone
from omniserve.batch.writer import Writer

__all__ = ["BatchRunner", "EngineGone", "LineResponse", "LineRunner", "RunnerSettings", "RunnerStatus"]

T = TypeVar("T")
log = logging.getLogger(__name__)

# Lines that never ran get their result lines so many at a time.
FILL_LINES = 1000
# A main loop that slept through a change of the wall clock still looks at deadlines so often.
LONGEST_SLEEP_S = 60.0
# A fault of ours while an input is read may pass; one that comes so often will not.
MAX_FAULTS = 3
# What results still in memory may take to reach the disk when the runner stops.
STOP_TIMEOUT_S = 10.0


class BatchRunner:
    """`start` it, `notice` that a batch was created or cancelled, `stop` it."""

    def __init__(
        self,
        store: Store,
        writer: Writer,
        line_runner: LineRunner,
        settings: RunnerSettings | None = None,
        now: Callable[[], float] = time.time,
        is_known_model: Callable[[str], bool] = lambda name: True,
        quota_of: Callable[[str], Quota] = lambda owner: Quota(),
    ) -> None:
        self._store, self._writer = store, writer
        self._attempts = Attempts(store, writer, line_runner, now)
        self._settings, self._now = settings or RunnerSettings(), now
        self._is_known_model, self._quota_of = is_known_model, quota_of
        self._jobs: dict[int, Job] = {}
        self._pace, self._share = Pace(), FairShare()
        self._is_paused, self._is_stale = False, True
        self._trouble: str | None = None
        self._pause_s, self._held_until_s = self._settings.first_pause_s, 0.0
        self._next_sweep_s = 0.0
        self._is_suspect_running = False
        self._wake, self._has_results, self._is_idle = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._loops = [
            asyncio.create_task(self._forever(self._turn), name="batches"),
            asyncio.create_task(self._forever(self._record_results), name="batch results"),
        ]

    async def stop(self) -> None:
        """Stop running lines, and record what is finished. Lines that were running run again another time."""
        main, *others = self._loops
        tasks = [main, *(job.task for job in self._jobs.values() if job.task)]
        tasks += [task for job in self._jobs.values() for task in job.running.values()]
        await _cancelled(tasks)
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_TIMEOUT_S):
                while any(job.results or job.num_flushing for job in self._jobs.values()):
                    await self._wake.wait()
                    self._wake.clear()
        await _cancelled(others)

    def notice(self) -> None:
        """The store holds something new."""
        self._is_stale = True
        self._wake.set()

    def pause(self) -> None:
        """Start no more lines; those in flight go on."""
        self._is_paused = True

    def resume(self) -> None:
        self._is_paused = False
        self._wake.set()

    async def drain(self) -> None:
        """Pause, and wait until the results of all lines in flight are recorded."""
        self.pause()
        while self._num_busy:
            self._is_idle.clear()
            await self._is_idle.wait()

    @property
    def status(self) -> RunnerStatus:
        jobs, pace = self._jobs.values(), self._pace.lines_per_s(time.monotonic())
        num_overdue, longest_eta_s = outlook(jobs, self._now(), None if self._is_paused else pace)
        return RunnerStatus(
            self._is_paused,
            len(jobs),
            sum(job.batch.num_left for job in jobs),
            sum(len(job.running) for job in jobs),
            pace,
            self._trouble,
            num_overdue,
            longest_eta_s,
            self._attempts.num_given_up,
        )

    def eta_s(self, batch: BatchRecord) -> float | None:
        """Seconds until a batch is through at the pace of late, with what runs before and beside it."""
        pace = self._pace.lines_per_s(time.monotonic())
        job = self._jobs.get(batch.seq)
        if pace is None or job is None or self._is_paused or batch.status is Status.VALIDATING:
            return None
        return lines_until_through(self._jobs.values())[batch.seq] / pace

    async def _forever(self, turn: Callable[[], Awaitable[None]]) -> None:
        while True:
            await self._guarded(turn)

    async def _guarded(self, work: Callable[[], Awaitable[None]]) -> None:
        """A fault is told and then waited out; the store says how to go on."""
        try:
            await work()
        except StorageError as error:
            if self._trouble is None:
                log.error("batches wait: %s", error)
            self._trouble = str(error)
            self._is_stale = True
            await asyncio.sleep(self._lengthened_pause())
        except Exception:
            log.exception("batches: a fault, going on from the store")
            self._is_stale = True
            await asyncio.sleep(self._lengthened_pause())

    async def _do(self, call: Callable[..., T], *arguments: object) -> T:
        return await self._writer.run(call, *arguments)

    async def _turn(self) -> None:
        self._wake.clear()
        if self._is_stale:
            self._is_stale = False
            await self._load()
        if time.monotonic() >= self._next_sweep_s:
            self._next_sweep_s = time.monotonic() + self._settings.sweep_s
            await self._do(self._store.sweep, self._quota_of)
        for job in list(self._jobs.values()):
            self._begin_next_stage(job)
        await self._launch()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._sleep_s()):
                await self._wake.wait()

    def _sleep_s(self) -> float:
        """Until a deadline or the end of a pause."""
        deadlines = [job.batch.expires_at - self._now() for job in self._jobs.values() if job.may_start]
        # One that ended since lines were last started counts too, or nobody would start any.
        pauses = [self._held_until_s - time.monotonic()] if self._held_until_s else []
        return max(0.0, min([*deadlines, *pauses, LONGEST_SLEEP_S]))

    async def _load(self) -> None:
        """Take in batches that are new, cancelled or gone."""
        batches = {batch.seq: batch for batch in await self._do(self._store.batches.open_batches)}
        for seq, batch in batches.items():
            if seq in self._jobs:
                self._jobs[seq].batch = batch
            else:
                self._jobs[seq] = Job(batch)
        for seq in [seq for seq in self._jobs if seq not in batches]:
            await _cancelled(self._jobs.pop(seq).running.values())

    def _begin_next_stage(self, job: Job) -> None:
        """What a batch needs other than running its lines is a task of its own, so that others go on."""
        if job.task is not None:
            return
        match job.batch.status:
            case Status.VALIDATING | Status.IN_PROGRESS if self._now() >= job.batch.expires_at:
                self._set_task(job, lambda: self._close(job, Event.EXPIRE))
            case Status.VALIDATING:
                self._set_task(job, lambda: self._validate(job))
            case Status.IN_PROGRESS if job.batch.num_left == 0:
                self._set_task(job, lambda: self._close(job, Event.FINISH))
            case Status.FINALIZING | Status.CANCELLING:
                self._set_task(job, lambda: self._close(job, None))

    def _set_task(self, job: Job, work: Callable[[], Awaitable[None]]) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            job.task = None
            self._wake.set()

        job.task = asyncio.create_task(self._guarded(work), name=f"stage of {job.batch.id}")
        job.task.add_done_callback(ended)

    async def _validate(self, job: Job) -> None:
        try:
            await self._read_input(job)
        except StorageError:
            raise
        except Exception as error:
            job.num_faults += 1
            if job.num_faults < MAX_FAULTS:
                raise
            log.exception("the input of %s cannot be read; the batch fails", job.batch.id)
            message = (
                f"the server failed while it read the input ({type(error).__name__}); its log says where"
            )
            problem = LineError("internal_error", message)
            job.batch = await self._do(self._store.batches.reject, job.batch.seq, problem)
        if job.batch.has_ended:
            self._jobs.pop(job.batch.seq, None)

    async def _read_input(self, job: Job) -> None:
        """Until its deadline, when it is left as it is."""
        batches = self._store.batches
        found = await self._do(batches.validation, job.batch, self._is_known_model)
        try:
            while not await self._do(found.advance):
                if self._now() >= job.batch.expires_at:
                    return
            quota = self._quota_of(job.batch.owner)
            job.batch = await self._do(batches.validated, job.batch.seq, found, quota)
        finally:
            found.close()

    async def _close(self, job: Job, event: Event | None) -> None:
        """Give every line without a result the one that says why, and end the batch."""
        batches, seq = self._store.batches, job.batch.seq
        await _cancelled(job.running.values())
        await self._flush(job)
        if event is not None:
            # Its owner may have cancelled it meanwhile, which then holds.
            job.batch = await self._do(batches.close, seq, event)
        while job.batch.num_left:
            code = NEVER_RUN_CODE[job.batch.ending or Status.EXPIRED]
            rest = await self._do(batches.unfinished, seq, 0, FILL_LINES)
            results = [
                never_run(job.batch.id, line.number, decode_request(line).custom_id, code) for line in rest
            ]
            job.batch = await self._do(batches.record, seq, results)
        job.batch = await self._do(batches.settle, seq)
        self._jobs.pop(seq, None)
        self._note_idle()

    @property
    def _num_busy(self) -> int:
        return sum(job.num_busy for job in self._jobs.values())

    async def _launch(self) -> None:
        """Fill the lines in flight."""
        waiting = (job for job in self._jobs.values() if job.has_more)
        self._share.set_waiting(job.batch.owner for job in waiting)
        if time.monotonic() >= self._held_until_s:
            self._held_until_s = 0.0
        while not self._is_paused and time.monotonic() >= self._held_until_s:
            if self._num_busy >= self._settings.concurrency or self._is_backed_up:
                return
            job = await self._next_job()
            if job is None:
                return
            if not self._has_place(job.waiting[0]):
                return
            self._start(job, job.waiting.popleft())

    def _has_place(self, line: Line) -> bool:
        """A suspect has no other line beside it."""
        if runs_alone(line):
            return not any(job.running for job in self._jobs.values())
        return not self._is_suspect_running

    @property
    def _is_backed_up(self) -> bool:
        """Whether the disk does not take the results there are."""
        return self._trouble is not None and any(job.results for job in self._jobs.values())

    def _start(self, job: Job, line: Line) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            del job.running[line.number]
            self._is_suspect_running = False
            self._wake.set()
            self._note_idle()

        work = self._run(job, line, self._share.begin(job.batch.owner))
        task = asyncio.create_task(work, name=request_id_of(job.batch.id, line.number))
        job.running[line.number] = task
        self._is_suspect_running = runs_alone(line)
        self._pace.began(time.monotonic())
        task.add_done_callback(ended)

    async def _next_job(self) -> Job | None:
        """The batch to take the next line from: the most urgent of the owner who had least."""
        for job in sorted(self._jobs.values(), key=lambda j: (self._share.had(j.batch.owner), urgency(j))):
            while job.may_start and not job.pending and not job.is_all_fetched:
                await self._fetch(job)
            if job.may_start and job.waiting:
                return job
        return None

    async def _fetch(self, job: Job) -> None:
        count = max(16, self._settings.concurrency)
        lines = await self._do(self._store.batches.pending, job.batch.seq, job.last, count)
        for line in lines:
            job.put(line)
        job.is_all_fetched = not lines
        job.last = lines[-1].number if lines else job.last
        if not self._is_backed_up:
            self._trouble = None

    async def _run(self, job: Job, line: Line, expected_cost: float) -> None:
        cost = None
        try:
            line, result = await self._attempts.make(job.batch, line)
            cost = None if result is None else cost_of(result.usage)
        except LineCancelled as cancelled:
            cost = cost_of(cancelled.usage)
            raise
        finally:
            self._share.end(job.batch.owner, expected_cost, cost)
        if result is None:
            job.put_back(line)
            self._hold()
            return
        job.results.append(result)
        self._held_until_s, self._pause_s = 0.0, self._settings.first_pause_s
        self._has_results.set()

    def _hold(self) -> None:
        """Start no line for a while: there is no room, or no engine. A line that ends makes room again."""
        if time.monotonic() >= self._held_until_s:
            self._held_until_s = time.monotonic() + self._lengthened_pause()

    def _lengthened_pause(self) -> float:
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, self._settings.longest_pause_s)
        return pause_s

    async def _record_results(self) -> None:
        await self._has_results.wait()
        for job in [job for job in self._jobs.values() if job.results]:
            await self._flush(job)
        self._has_results.clear()
        if any(job.results for job in self._jobs.values()):
            self._has_results.set()

    async def _flush(self, job: Job) -> None:
        """Record all results there are. While it waits for the disk, more gather for the next time."""
        async with job.flushing:
            while job.results:
                taken, job.results = job.results, []
                job.num_flushing = len(taken)
                try:
                    job.batch = await self._do(self._store.batches.record, job.batch.seq, taken)
                except BaseException:
                    job.results = taken + job.results  # recording twice does no harm
                    self._has_results.set()
                    raise
                finally:
                    job.num_flushing = 0
                self._trouble = None
                self._pace.finished(len(taken), time.monotonic())
                self._wake.set()
                self._note_idle()

    def _note_idle(self) -> None:
        if self._num_busy == 0:
            self._pace.ended(time.monotonic())
            self._is_idle.set()


async def _cancelled(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel them and wait until they have ended."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
