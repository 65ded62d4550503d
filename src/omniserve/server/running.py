"""Requests that run now, and how long they have waited: figures of ended ones say nothing of a stuck one.

Pure: every time is handed in, on the clock of time.monotonic().
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from omniserve.types import SLO, ServiceClass


class Runs(Protocol):
    """A request in the engine."""

    @property
    def service_class(self) -> str: ...

    @property
    def slo(self) -> SLO | None:
        """Targets that it brought."""

    @property
    def has_token(self) -> bool: ...

    @property
    def silent_since_s(self) -> float:
        """When it arrived, or its newest token came: of several texts, that of the one that waits longest."""


@dataclass(frozen=True, slots=True)
class RunningSnapshot:
    """Requests of one class that run now, lines of batches too.

    num_waiting: without a token; longest_wait_s: since the arrival of the first of these. num_late: of them,
    those past their TTFT target. num_decoding: with tokens; longest_gap_s: the longest that one of these has
    waited for its next one. None where there is none.
    """

    num_waiting: int
    longest_wait_s: float | None
    num_late: int
    num_decoding: int
    longest_gap_s: float | None


class Running:
    """Knows a request while it is held."""

    def __init__(self) -> None:
        self._runs: set[Runs] = set()

    @contextmanager
    def hold(self, run: Runs) -> Iterator[None]:
        self._runs.add(run)
        try:
            yield
        finally:
            self._runs.discard(run)

    def snapshot(self, classes: Mapping[str, ServiceClass], now_s: float) -> dict[str, RunningSnapshot]:
        """By name of the class."""
        waits: dict[str, list[float]] = {name: [] for name in classes}
        gaps: dict[str, list[float]] = {name: [] for name in classes}
        num_late = dict.fromkeys(classes, 0)
        for run in self._runs:
            silent_s = now_s - run.silent_since_s
            (gaps if run.has_token else waits)[run.service_class].append(silent_s)
            slo = run.slo or classes[run.service_class].slo
            if not run.has_token and slo is not None and silent_s > slo.ttft_s:
                num_late[run.service_class] += 1
        return {
            name: RunningSnapshot(
                num_waiting=len(waits[name]),
                longest_wait_s=max(waits[name], default=None),
                num_late=num_late[name],
                num_decoding=len(gaps[name]),
                longest_gap_s=max(gaps[name], default=None),
            )
            for name in classes
        }
