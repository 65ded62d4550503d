"""The store: what is accepted stays, what is another's is not there, and ends leave nothing behind."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from batch.stand import (
    LIMITS,
    OWNER,
    QUOTA,
    Clock,
    blobs,
    content,
    create,
    custom_ids,
    jsonl,
    line,
    lines,
    new_batch,
    result,
    started,
    upload,
    validate,
)
from omniserve.batch.errors import ConflictError, NotFoundError, QuotaError, StateError, TooLargeError
from omniserve.batch.limits import HOUR_S, Quota
from omniserve.batch.records import BatchRecord
from omniserve.batch.results import never_run
from omniserve.batch.states import Event
from omniserve.batch.store import Store
from omniserve.errors import RequestError

MIB = 1024**2


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def store(root: Path, clock: Clock) -> Iterator[Store]:
    store = Store(root, limits=LIMITS, now=clock)
    yield store
    store.close()


def test_an_uploaded_file_is_there_after_a_restart(store: Store, root: Path) -> None:
    file = upload(store, lines(50))
    store.close()
    again = Store(root, limits=LIMITS, now=Clock())
    assert again.files.get(OWNER, file.id) == file
    assert custom_ids(content(again, file.id)) == [f"line-{number}" for number in range(1, 51)]
    again.close()


def test_an_upload_that_was_given_up_leaves_nothing(store: Store, root: Path) -> None:
    incoming = store.files.begin(OWNER, QUOTA)
    store.files.write(incoming, b"half")
    incoming.close()
    assert blobs(root) == set()


def test_files_and_batches_of_others_do_not_exist(store: Store) -> None:
    batch = create(store, lines(1))
    for forbidden in (
        lambda: store.files.get("bert", batch.input_file_id),
        lambda: store.files.open("bert", batch.input_file_id),
        lambda: store.files.delete("bert", batch.input_file_id),
        lambda: store.batches.get("bert", batch.id),
        lambda: store.batches.cancel("bert", batch.id),
    ):
        with pytest.raises(NotFoundError):
            forbidden()
    file = store.files.get(OWNER, batch.input_file_id)
    with pytest.raises(RequestError, match="input_file_id"):
        store.batches.create("bert", new_batch(file), QUOTA)
    assert store.files.page("bert", None, None, 10, True) == ([], False)
    assert store.batches.page("bert", None, 10) == ([], False)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "..", "/etc/passwd", "file-1/../x", "", "file-" + "g" * 32]
)
def test_no_name_from_outside_becomes_a_path(store: Store, name: str) -> None:
    with pytest.raises(NotFoundError):
        store.files.open(OWNER, name)
    incoming = store.files.begin(OWNER, QUOTA)
    file = store.files.accept(incoming, OWNER, f"{name}\n\x00", None, QUOTA)
    incoming.close()
    assert "\n" not in file.filename
    assert store._blobs.path(file.id).parent == store._blobs.folder


def test_pages_of_a_list_hold_everything_once(store: Store) -> None:
    ids = [upload(store, lines(1)).id for _ in range(7)]
    for newest_first, expected in ((False, ids), (True, ids[::-1])):
        seen: list[str] = []
        more = True
        while more:
            page, more = store.files.page(OWNER, None, seen[-1] if seen else None, 3, newest_first)
            seen += [file.id for file in page]
        assert seen == expected
    with pytest.raises(RequestError, match="after"):
        store.files.page(OWNER, None, "file-nobody", 3, True)


def test_a_batch_runs_to_its_end(store: Store, clock: Clock, root: Path) -> None:
    batch = started(store, lines(3))
    assert (batch.status, batch.total, batch.model) == ("in_progress", 3, "m")
    store.batches.record(batch.seq, [result(batch, 2), result(batch, 3, 400)])
    batch = store.batches.record(batch.seq, [result(batch, 1)])
    assert (batch.completed, batch.failed) == (2, 1)
    assert (batch.usage.input_tokens, batch.usage.cached_tokens, batch.usage.output_tokens) == (14, 4, 6)
    store.batches.step(batch.seq, Event.FINISH)
    clock.now_s += 5
    batch = store.batches.settle(batch.seq)
    assert (batch.status, batch.completed_at) == ("completed", 1_000_005)
    assert custom_ids(content(store, batch.output_file_id)) == ["line-2", "line-1"]
    (failure,) = content(store, batch.error_file_id)
    assert (failure["response"]["status_code"], failure["error"]) == (400, None)
    assert blobs(root) == {batch.input_file_id, batch.output_file_id, batch.error_file_id}


def test_a_line_keeps_its_first_result(store: Store) -> None:
    batch = started(store, lines(2))
    store.batches.record(batch.seq, [result(batch, 1), result(batch, 1, 500)])
    batch = store.batches.record(batch.seq, [result(batch, 1, 500), result(batch, 2)])
    assert (batch.completed, batch.failed, batch.error_bytes) == (2, 0, 0)


def test_lines_that_have_results_are_not_handed_out_again(store: Store) -> None:
    batch = started(store, lines(4))
    store.batches.record(batch.seq, [result(batch, 1), result(batch, 3)])
    assert [one.number for one in store.batches.pending(batch.seq, 0, 10)] == [2, 4]
    assert [one.number for one in store.batches.pending(batch.seq, 2, 10)] == [4]


def test_a_bad_input_fails_its_batch_and_says_where(store: Store) -> None:
    batch = started(store, jsonl([line(1), line(1)]))
    assert (batch.status, batch.failed_at) == ("failed", 1_000_000)
    (error,) = batch.errors
    assert (error.code, error.line) == ("duplicate_custom_id", 2)


def test_cancelling_keeps_what_is_done(store: Store) -> None:
    batch = started(store, lines(2))
    store.batches.record(batch.seq, [result(batch, 1)])
    assert store.batches.cancel(OWNER, batch.id).status == "cancelling"
    assert store.batches.cancel(OWNER, batch.id).status == "cancelling"
    store.batches.record(batch.seq, [never_run(batch.id, 2, "line-2", "batch_cancelled")])
    batch = store.batches.settle(batch.seq)
    assert (batch.status, batch.completed, batch.failed) == ("cancelled", 1, 1)
    assert custom_ids(content(store, batch.output_file_id)) == ["line-1"]
    (left,) = content(store, batch.error_file_id)
    assert (left["response"], left["error"]["code"]) == (None, "batch_cancelled")


def test_a_batch_cancelled_before_its_input_was_read_has_no_lines(store: Store) -> None:
    batch = create(store, lines(2))
    store.batches.cancel(OWNER, batch.id)
    assert validate(store, batch).status == "cancelling"
    assert store.batches.settle(batch.seq).status == "cancelled"


def test_an_ended_batch_cannot_be_cancelled(store: Store) -> None:
    batch = started(store, jsonl([1]))
    with pytest.raises(ConflictError, match="is failed"):
        store.batches.cancel(OWNER, batch.id)


def test_an_input_is_kept_while_its_batch_runs(store: Store, clock: Clock) -> None:
    batch = started(store, lines(1), window_s=86400 * 100)
    with pytest.raises(ConflictError, match="cancel that batch first"):
        store.files.delete(OWNER, batch.input_file_id)
    clock.now_s += 86400 * 40
    store.sweep()
    assert [one.number for one in store.batches.pending(batch.seq, 0, 10)] == [1]


def test_files_past_their_time_are_gone(store: Store, clock: Clock, root: Path) -> None:
    file = upload(store, lines(1))
    clock.now_s += LIMITS.retention_s
    with pytest.raises(NotFoundError):
        store.files.get(OWNER, file.id)
    store.sweep()
    assert blobs(root) == set()


def test_batches_that_ended_long_ago_are_forgotten_when_their_results_are(store: Store, clock: Clock) -> None:
    ended, running = started(store, lines(1)), started(store, lines(1), window_s=86400 * 100)
    store.batches.record(ended.seq, [result(ended, 1)])
    store.batches.step(ended.seq, Event.FINISH)
    store.batches.settle(ended.seq)
    clock.now_s += LIMITS.retention_s - 1
    store.sweep()
    assert store.batches.get(OWNER, ended.id).has_ended
    clock.now_s += 1
    store.sweep()
    assert store.batches.page(OWNER, None, 10) == ([store.batches.get(OWNER, running.id)], False)


def test_an_owner_may_have_a_retention_of_its_own(store: Store, clock: Clock) -> None:
    quota = Quota(retention_s=2 * HOUR_S)
    started_s = clock.now_s
    file = upload(store, lines(1), quota=quota)
    batch = validate(store, store.batches.create(OWNER, new_batch(file), quota))
    store.batches.record(batch.seq, [result(batch, 1)])
    store.batches.step(batch.seq, Event.FINISH)
    batch = store.batches.settle(batch.seq)
    other = store.batches.create("bert", new_batch(upload(store, lines(1), owner="bert")), QUOTA)
    store.batches.step(other.seq, Event.CANCEL)
    store.batches.settle(other.seq)
    for file_id in (file.id, batch.output_file_id):
        assert store.files.get(OWNER, file_id).expires_at == started_s + 2 * HOUR_S

    def quota_of(owner: str) -> Quota:
        return quota if owner == OWNER else QUOTA

    clock.now_s += 2 * HOUR_S - 1
    store.sweep(quota_of)
    assert store.batches.get(OWNER, batch.id).has_ended
    clock.now_s += 1
    store.sweep(quota_of)
    with pytest.raises(NotFoundError):
        store.batches.get(OWNER, batch.id)
    assert store.batches.get("bert", other.id).has_ended


def test_a_file_has_a_largest_size(tmp_path: Path) -> None:
    store = Store(tmp_path, limits=replace(LIMITS, max_file_bytes=1000))
    with pytest.raises(TooLargeError, match="1000 bytes"):
        upload(store, b"x" * 1001)
    assert upload(store, b"x" * 1000).bytes == 1000
    assert len(blobs(tmp_path)) == 1
    store.close()


def test_an_owner_may_keep_so_much(store: Store) -> None:
    quota = Quota(max_bytes=1500, max_open_batches=1)
    file = upload(store, lines(1) + b" " * 800, quota=quota)
    with pytest.raises(QuotaError, match="delete some first"):
        upload(store, b"x" * 1000, quota=quota)
    upload(store, b"x" * 1000, owner="bert", quota=quota)
    store.batches.create(OWNER, new_batch(file), quota)
    with pytest.raises(QuotaError, match="wait for one or cancel one"):
        store.batches.create(OWNER, new_batch(file), quota)


def test_uploads_under_way_take_of_what_an_owner_may_keep(store: Store) -> None:
    quota, mib = Quota(max_bytes=3 * MIB), b"x" * MIB
    first, second = store.files.begin(OWNER, quota), store.files.begin(OWNER, quota)
    other = store.files.begin("bert", quota)
    store.files.write(first, mib)
    store.files.write(second, mib)
    store.files.write(other, mib * 3)
    store.files.write(first, mib)
    with pytest.raises(QuotaError, match="delete some first"):
        store.files.write(second, mib)
    with pytest.raises(QuotaError, match="delete some first"):
        store.files.begin(OWNER, quota)
    assert store.files.accept(first, OWNER, "in.jsonl", None, quota).bytes == 2 * MIB
    first.close()
    second.close()
    third = store.files.begin(OWNER, quota)
    store.files.write(third, mib)
    store.files.accept(third, OWNER, "in.jsonl", None, quota)
    third.close()
    other.close()


def test_an_owner_may_keep_so_many_files(store: Store) -> None:
    quota = Quota(max_files=1)
    file = upload(store, lines(1), quota=quota)
    with pytest.raises(QuotaError, match="keeps 1 files of at most 1; delete some first"):
        upload(store, lines(1), quota=quota)
    upload(store, lines(1), owner="bert", quota=quota)
    store.files.delete(OWNER, file.id)
    upload(store, lines(1), quota=quota)


def test_an_owner_may_have_so_many_lines_under_way(store: Store) -> None:
    quota = Quota(max_open_lines=5)

    def validated(count: int) -> BatchRecord:
        batch = store.batches.create(OWNER, new_batch(upload(store, lines(count))), quota)
        found = store.batches.validation(batch)
        while not found.advance():
            pass
        found.close()
        return store.batches.validated(batch.seq, found, quota)

    first = validated(4)
    over = validated(2)
    assert (first.status, over.status) == ("in_progress", "failed")
    (error,) = over.errors
    assert error.code == "line_quota_exceeded"
    assert "2 lines, and 4 of this key's other batches" in error.message
    assert validated(1).status == "in_progress"
    with pytest.raises(QuotaError, match="as many as there may be, 5; wait"):
        validated(1)
    store.batches.record(first.seq, [result(first, 1), result(first, 2)])
    assert validated(2).status == "in_progress", "what is done does not count"


def test_a_state_directory_has_one_writer(store: Store, root: Path) -> None:
    with pytest.raises(StateError, match="in use by another process"):
        Store(root)
    store.close()
    Store(root).close()


@pytest.mark.parametrize("kind", ["a file", "below a file", "no database"])
def test_a_state_directory_that_cannot_be_used_is_named(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "state"
    if kind == "no database":
        root.mkdir()
        (root / "batches.sqlite").write_bytes(b"something else" * 1000)
    else:
        root.write_text("")
        root = root / "below" if kind == "below a file" else root
    with pytest.raises(StateError, match="--state-dir") as caught:
        Store(root)
    assert str(root) in str(caught.value)


def test_nobody_else_may_look_into_the_state_directory(tmp_path: Path) -> None:
    root = tmp_path / "wide"
    root.mkdir(mode=0o755)
    Store(root).close()
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
