"""The seam between the loop and a device: what an executor is asked to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from omniserve.engine.records import Counters, Record
from omniserve.host.segment import LaneSegment
from omniserve.policy.plan import Step, StepResult


class Executor(Protocol):
    """Carries out steps on one device; knows tokens, not policy. What the engine asks of it.

    launch() may return before the work is done; collect() waits for it. On the CPU device a launched step is
    a finished one.
    """

    counters: Counters
    host_is_gone: Callable[[], bool]

    def add(self, record: Record) -> None:
        """Know a request from now on."""

    def remove(self, request_id: int) -> Record | None:
        """Forget a request; None when it is unknown."""

    def attach(self, segment: LaneSegment) -> None:
        """A host is ready: lanes may use this segment from now on."""

    def detach(self) -> None:
        """The host is gone, and every task and copy with it."""

    def cancel(self, slots: tuple[int, ...], fetches: tuple[int, ...]) -> None:
        """Give up tasks in flight and copies to the device; each is acknowledged later."""

    def launch(self, step: Step) -> StepResult:
        """Start a step; the answer is for collect()."""
        ...

    def collect(self, handle: StepResult) -> StepResult:
        """What the step brought."""
        ...

    def acknowledgements(self) -> StepResult:
        """Copies and cancelled tasks that have ended since the last call."""
        ...

    def has_ready_lanes(self) -> bool:
        """Whether some lane could enter now."""
        ...

    def arm(self) -> bool:
        """Ask the host for a wake-up; True when something is there already and sleeping would miss it."""
        ...

    def disarm(self) -> None:
        """Take the request for a wake-up back."""

    def lane_stats(self) -> dict[str, float]:
        """What lanes and host workers counted, all hosts together."""
        ...
