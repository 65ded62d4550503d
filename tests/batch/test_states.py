"""The states of a batch: whatever happens in whatever order, it ends once and by the rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniserve.batch.states import ENDED, Event, IllegalEventError, Status, after


def walk(*events: Event) -> list[Status]:
    status, ending, seen = Status.VALIDATING, None, []
    for event in events:
        status, ending = after(status, ending, event)
        seen.append(status)
    return seen


def test_a_batch_that_runs_through() -> None:
    assert walk(Event.ACCEPT, Event.FINISH, Event.SETTLE) == ["in_progress", "finalizing", "completed"]


def test_a_late_batch_is_finalized_too() -> None:
    assert walk(Event.ACCEPT, Event.EXPIRE, Event.SETTLE) == ["in_progress", "finalizing", "expired"]
    assert walk(Event.EXPIRE, Event.SETTLE) == ["finalizing", "expired"]


def test_a_batch_is_cancelled_before_or_while_it_runs() -> None:
    assert walk(Event.CANCEL, Event.SETTLE) == ["cancelling", "cancelled"]
    assert walk(Event.ACCEPT, Event.CANCEL, Event.SETTLE) == ["in_progress", "cancelling", "cancelled"]


def test_only_bad_input_fails_a_batch() -> None:
    assert walk(Event.REJECT) == ["failed"]
    with pytest.raises(IllegalEventError, match="in_progress cannot reject"):
        walk(Event.ACCEPT, Event.REJECT)


@given(st.lists(st.sampled_from(Event), max_size=12))
def test_no_order_of_events_leads_out_of_an_end(events: list[Event]) -> None:
    status, ending = Status.VALIDATING, None
    for event in events:
        try:
            following, ending = after(status, ending, event)
        except IllegalEventError:
            continue
        assert status not in ENDED
        assert following is not status
        status = following
    assert status is not Status.FINALIZING or ending in (Status.COMPLETED, Status.EXPIRED)
