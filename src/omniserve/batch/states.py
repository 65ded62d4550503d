"""The life of a batch as a pure state machine. Names are those of OpenAI's batch object.

    validating -> in_progress -> finalizing -> completed
        |              |              +------> expired
        +-> failed     |
        +--------------+-> finalizing
        +--------------+-> cancelling -------> cancelled

`failed` means that the input was bad or could not be read for a fault of ours, or that files of ours were
damaged from outside, this from any state that has not ended; lines that fail do not fail their batch. A batch
past its deadline goes through `finalizing` too, from either state before it: lines that never ran get their
result lines there.
"""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


class Event(StrEnum):
    ACCEPT = "accept"  # the input is good
    REJECT = "reject"  # the input is bad, or cannot be read
    FINISH = "finish"  # every line has its result
    EXPIRE = "expire"  # the deadline passed
    CANCEL = "cancel"  # its owner said so
    DAMAGE = "damage"  # its files were changed from outside
    SETTLE = "settle"  # every line has its result line, those that never ran included


ENDED = frozenset({Status.FAILED, Status.COMPLETED, Status.EXPIRED, Status.CANCELLED})
# Lines that never ran say why with this code.
NEVER_RUN_CODE = {Status.EXPIRED: "batch_expired", Status.CANCELLED: "batch_cancelled"}

_NEXT: dict[tuple[Status, Event], Status] = {
    (Status.VALIDATING, Event.ACCEPT): Status.IN_PROGRESS,
    (Status.VALIDATING, Event.REJECT): Status.FAILED,
    (Status.VALIDATING, Event.EXPIRE): Status.FINALIZING,
    (Status.VALIDATING, Event.CANCEL): Status.CANCELLING,
    (Status.IN_PROGRESS, Event.FINISH): Status.FINALIZING,
    (Status.IN_PROGRESS, Event.EXPIRE): Status.FINALIZING,
    (Status.IN_PROGRESS, Event.CANCEL): Status.CANCELLING,
}
_ENDING = {Event.FINISH: Status.COMPLETED, Event.EXPIRE: Status.EXPIRED, Event.CANCEL: Status.CANCELLED}


class IllegalEventError(ValueError):
    """The event does not exist in this state."""


def after(status: Status, ending: Status | None, event: Event) -> tuple[Status, Status | None]:
    """State and coming end of a batch after an event; IllegalEventError where there is no such step."""
    if event is Event.SETTLE:
        if status in (Status.FINALIZING, Status.CANCELLING) and ending is not None:
            return ending, ending
    elif event is Event.DAMAGE and status not in ENDED:
        return Status.FAILED, None
    elif (status, event) in _NEXT:
        return _NEXT[status, event], _ENDING.get(event)
    raise IllegalEventError(f"a batch that is {status} cannot {event}")
