"""Batches that have not ended as the runner sees them, and what it is told and tells."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from omniserve.batch.records import BatchRecord, Line, LineResult
from omniserve.batch.states import Status
from omniserve.batch.suspicion import runs_alone


@dataclass(frozen=True, slots=True)
class RunnerSettings:
    """concurrency: lines in flight at most, of all batches together. first_pause_s, longest_pause_s: how long
    no line is started after one was turned away or the disk failed; doubled each time, up to the longest.
    sweep_s: how often files past their time are removed."""

    concurrency: int = 64
    first_pause_s: float = 0.25
    longest_pause_s: float = 15.0
    sweep_s: float = 600.0


@dataclass(frozen=True, slots=True)
class RunnerStatus:
    """For people and metrics. trouble: what the disk said last, None when it works.

    num_overdue: batches that at this pace will not end in their window, or are past it.
    longest_eta_s: until the last of them is through; None while no pace is known or nothing is started.
    num_given_up: lines given up since the runner was made, for engines died of them.
    """

    is_paused: bool
    num_batches: int
    num_lines_left: int
    num_running: int
    lines_per_s: float | None
    trouble: str | None
    num_overdue: int
    longest_eta_s: float | None
    num_given_up: int = 0


@dataclass(slots=True, eq=False)
class Job:
    """A batch that has not ended. `last`: the line up to which the store was asked for more.

    `suspects`: lines that run alone, after all others. `num_faults`: of ours, while its input was read.
    """

    batch: BatchRecord
    pending: deque[Line] = field(default_factory=deque)
    suspects: deque[Line] = field(default_factory=deque)
    last: int = 0
    is_all_fetched: bool = False
    running: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    results: list[LineResult] = field(default_factory=list)
    num_flushing: int = 0
    flushing: asyncio.Lock = field(default_factory=asyncio.Lock)
    task: asyncio.Task[None] | None = None
    num_faults: int = 0

    @property
    def num_busy(self) -> int:
        """Lines started whose results are not recorded yet."""
        return len(self.running) + len(self.results) + self.num_flushing

    def put(self, line: Line) -> None:
        """Behind those that wait already."""
        (self.suspects if runs_alone(line) else self.pending).append(line)

    def put_back(self, line: Line) -> None:
        """In front: a line that was taken and is to run another time."""
        (self.suspects if runs_alone(line) else self.pending).appendleft(line)

    @property
    def waiting(self) -> deque[Line]:
        """Where the next line to start comes from."""
        return self.pending or self.suspects

    @property
    def may_start(self) -> bool:
        return self.task is None and self.batch.status is Status.IN_PROGRESS

    @property
    def has_more(self) -> bool:
        """Whether lines of it wait for a place, in flight ones not counted."""
        return self.may_start and (bool(self.waiting) or not self.is_all_fetched)


def urgency(job: Job) -> tuple[int, int]:
    """Of one owner's batches the earliest deadline goes first; of equal ones, the one that came first."""
    return job.batch.expires_at, job.batch.seq


def lines_until_through(jobs: Iterable[Job]) -> dict[int, int]:
    """Lines of all owners that run until a batch is through, by its `seq`.

    Its owner's batches before it run first; meanwhile each other owner runs as many, if there are any.
    """
    through: list[tuple[int, str, int]] = []
    left: dict[str, int] = {}
    for job in sorted(jobs, key=urgency):
        owner = job.batch.owner
        left[owner] = left.get(owner, 0) + job.batch.num_left
        through.append((job.batch.seq, owner, left[owner]))
    return {
        seq: own + sum(min(own, theirs) for other, theirs in left.items() if other != owner)
        for seq, owner, own in through
    }


def outlook(jobs: Collection[Job], now: float, lines_per_s: float | None) -> tuple[int, float | None]:
    """Batches that will not end in their window, and seconds until all lines there are have run.

    now: since the epoch. lines_per_s: None: nobody knows, and only a batch past its window is surely late.
    """
    num_lines = lines_until_through(jobs)
    ends_in_s = {seq: count / lines_per_s if lines_per_s else 0.0 for seq, count in num_lines.items()}
    num_overdue = sum(now + ends_in_s[job.batch.seq] > job.batch.expires_at for job in jobs)
    return num_overdue, max(ends_in_s.values(), default=0.0) if lines_per_s else None
