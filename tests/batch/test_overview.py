"""What an operator sees of all batches at a glance."""

from __future__ import annotations

from pathlib import Path

import pytest

from batch.stand import LIMITS, OWNER, QUOTA, Clock, create, lines, new_batch, started, upload
from omniserve.batch.states import Event
from omniserve.batch.store import Store


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Store:
    return Store(tmp_path / "state", limits=LIMITS, now=clock)


def test_open_batches_come_first_by_urgency_then_those_that_ended_last(store: Store, clock: Clock) -> None:
    ended = []
    for _ in range(3):
        clock.now_s += 10
        batch = started(store, lines(2))
        store.batches.step(batch.seq, Event.DAMAGE)
        ended.append(batch.id)
    late = create(store, lines(1))
    early = create(store, lines(1), completion_window="1h", window_s=3600)
    found = [batch.id for batch, _ in store.batches.overview(10)]
    assert found == [early.id, late.id, *reversed(ended)]
    assert [batch.id for batch, _ in store.batches.overview(1)] == [early.id, ended[-1]]


def test_batches_of_all_owners_are_there_with_the_names_of_their_inputs(store: Store) -> None:
    own = create(store, lines(1))
    other = store.batches.create("bert", new_batch(upload(store, lines(1), "bert")), QUOTA)
    found = {batch.id: (batch.owner, name) for batch, name in store.batches.overview(10)}
    assert found == {own.id: (OWNER, "in.jsonl"), other.id: ("bert", "in.jsonl")}


def test_a_batch_whose_input_was_deleted_has_no_name(store: Store) -> None:
    batch = started(store, lines(1))
    store.batches.step(batch.seq, Event.DAMAGE)
    store.files.delete(OWNER, batch.input_file_id)
    ((found, name),) = store.batches.overview(10)
    assert (found.id, name) == (batch.id, None)
