"""Batches and their lines: what was accepted, what is finished, and where it ends.

A result counts when the transaction that records it is committed. Before that its bytes lie behind the length
that counts, and are cut off when the store is opened after a crash; the line then runs again.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from omniserve.batch.database import Database
from omniserve.batch.errors import ConflictError, NotFoundError, QuotaError
from omniserve.batch.file_store import OPEN, FileStore, insert_file
from omniserve.batch.files import Blobs, new_id
from omniserve.batch.limits import ENDPOINTS, Limits, Quota
from omniserve.batch.lines import Validation
from omniserve.batch.records import BatchRecord, Line, LineError, LineResult, NewBatch, Usage
from omniserve.batch.states import ENDED, Event, IllegalEventError, Status, after
from omniserve.errors import RequestError

_USAGE = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")
# Bytes of input lines that one call hands out, unless a single line is longer.
MAX_PENDING_BYTES = 4 * 1024**2
_HALF = re.compile(r"[\ud800-\udfff]")


class BatchStore:
    """Every call blocks and runs on the writer's thread."""

    def __init__(
        self,
        database: Database,
        blobs: Blobs,
        files: FileStore,
        limits: Limits,
        now: Callable[[], float],
    ) -> None:
        self._database, self._blobs, self._files = database, blobs, files
        self._limits, self._now = limits, now

    def create(self, owner: str, new: NewBatch, quota: Quota) -> BatchRecord:
        """A batch in `validating`. Once this returns it is on disk, whatever happens."""
        if new.endpoint not in ENDPOINTS:
            raise RequestError(
                "endpoint", f"must be one of {', '.join(ENDPOINTS)}; got {new.endpoint[:80]!r}"
            )
        self._check_input(owner, new.input_file_id)
        now, batch_id = int(self._now()), new_id("batch_")
        values = {
            "id": batch_id,
            "owner": owner,
            "endpoint": new.endpoint,
            "input_file_id": new.input_file_id,
            "completion_window": new.completion_window,
            "expires_at": now + new.window_s,
            "output_life_s": new.output_life_s or quota.retention_s,
            "metadata": None if new.metadata is None else json.dumps(new.metadata),
            "output_file_id": new_id("file-"),
            "error_file_id": new_id("file-"),
            "created_at": now,
            "status": Status.VALIDATING,
        }
        marks = ", ".join("?" * len(values))
        with self._database.writing() as db:
            num_open = db.execute(f"SELECT count(*) FROM batches WHERE owner = ? AND {OPEN}", (owner,))
            if num_open.fetchone()[0] >= quota.max_open_batches:
                raise QuotaError(
                    "input_file_id",
                    f"{quota.max_open_batches} batches of this key have not ended, no more may be open; "
                    "wait for one or cancel one",
                )
            if _num_open_lines(db, owner) >= quota.max_open_lines:
                raise QuotaError(
                    "input_file_id",
                    f"lines of this key's batches without a result are as many as there may be, "
                    f"{quota.max_open_lines}; wait until some are done or cancel a batch",
                )
            db.execute(f"INSERT INTO batches ({', '.join(values)}) VALUES ({marks})", tuple(values.values()))
        self._database.at("create.committed")
        return self.get(owner, batch_id)

    def _check_input(self, owner: str, file_id: str) -> None:
        try:
            purpose = self._files.get(owner, file_id).purpose
        except NotFoundError as error:
            raise RequestError("input_file_id", error.reason) from None
        if purpose != "batch":
            raise RequestError("input_file_id", f"has purpose {purpose!r}; upload it with purpose 'batch'")

    def get(self, owner: str, batch_id: str) -> BatchRecord:
        row = self._database.db.execute(
            "SELECT * FROM batches WHERE id = ? AND owner = ?", (batch_id, owner)
        ).fetchone()
        if row is None:
            raise NotFoundError("batch_id", f"no batch {batch_id[:80]!r}; GET /v1/batches lists yours")
        return _record(row)

    def page(self, owner: str, after_id: str | None, limit: int) -> tuple[list[BatchRecord], bool]:
        """A page of an owner's batches behind `after_id`, newest first, and whether there are more."""
        last: int | None = None
        if after_id is not None:
            try:
                last = self.get(owner, after_id).seq
            except NotFoundError as error:
                raise RequestError("after", error.reason) from None
        rows = self._database.db.execute(
            "SELECT * FROM batches WHERE owner = ? AND (? IS NULL OR seq < ?) ORDER BY seq DESC LIMIT ?",
            (owner, last, last, limit + 1),
        ).fetchall()
        return [_record(row) for row in rows[:limit]], len(rows) > limit

    def open_batches(self) -> list[BatchRecord]:
        """All that have not ended, of all owners, the most urgent first."""
        query = f"SELECT * FROM batches WHERE {OPEN} ORDER BY expires_at, seq"
        return [_record(row) for row in self._database.db.execute(query)]

    def overview(self, limit: int) -> list[tuple[BatchRecord, str | None]]:
        """Of all owners: open batches, the most urgent first, then those that ended last; at most `limit` of
        either. With the name of the input file, None when it is gone."""
        found = list[tuple[BatchRecord, str | None]]()
        joined = "batches LEFT JOIN files ON files.id = input_file_id"
        for which, order in ((OPEN, "batches.expires_at, batches.seq"), (f"NOT {OPEN}", "ended_at DESC")):
            query = f"SELECT batches.*, filename AS name FROM {joined} WHERE {which} ORDER BY {order} LIMIT ?"
            for row in self._database.db.execute(query, (limit,)):
                values = dict(row)
                filename = values.pop("name")
                found.append((_record(values), filename))
        return found

    def validation(
        self, batch: BatchRecord, is_known_model: Callable[[str], bool] = lambda name: True
    ) -> Validation:
        """Reads the input of a batch; the caller closes it."""
        with self._database.disk():
            source = self._blobs.open(batch.input_file_id)
        return Validation(source, batch.endpoint, self._limits, is_known_model)

    def validated(self, seq: int, found: Validation, quota: Quota | None = None) -> BatchRecord:
        """Take in every line of a good input at once, or say why it is bad. Not of a cancelled batch."""
        self._database.at("validate.read")
        with self._database.writing() as db:
            batch = _by_seq(db, seq)
            if batch.status is Status.VALIDATING:
                if problems := found.errors or _too_many(db, batch.owner, found, quota or Quota()):
                    errors = json.dumps([asdict(error) for error in problems])
                    db.execute(
                        "UPDATE batches SET errors = ?, model = ? WHERE seq = ?", (errors, found.model, seq)
                    )
                    self._step(db, batch, Event.REJECT)
                else:
                    rows = zip(found.numbers, found.offsets, found.lengths, strict=True)
                    db.executemany(
                        f"INSERT INTO lines (batch, number, offset, length) VALUES ({seq}, ?, ?, ?)", rows
                    )
                    db.execute(
                        "UPDATE batches SET total = ?, model = ? WHERE seq = ?",
                        (len(found.numbers), found.model, seq),
                    )
                    self._step(db, batch, Event.ACCEPT)
        self._database.at("validate.committed")
        return _by_seq(self._database.db, seq)

    def reject(self, seq: int, problem: LineError) -> BatchRecord:
        """Fail a batch whose input cannot be read. Not one that is cancelled."""
        with self._database.writing() as db:
            batch = _by_seq(db, seq)
            if batch.status is Status.VALIDATING:
                db.execute(
                    "UPDATE batches SET errors = ? WHERE seq = ?", (json.dumps([asdict(problem)]), seq)
                )
                self._step(db, batch, Event.REJECT)
        return _by_seq(self._database.db, seq)

    def pending(self, seq: int, after_number: int, limit: int) -> list[Line]:
        """The next unfinished lines behind a line; StorageError while there is no room for their results."""
        self._files.check_room()
        return self.unfinished(seq, after_number, limit)

    def unfinished(self, seq: int, after_number: int, limit: int) -> list[Line]:
        db, found, num_bytes = self._database.db, list[Line](), 0
        rows = db.execute(
            "SELECT number, offset, length, num_deaths FROM lines "
            "WHERE batch = ? AND number > ? AND NOT is_finished ORDER BY number LIMIT ?",
            (seq, after_number, limit),
        ).fetchall()
        if not rows:
            return found
        with self._database.disk(), self._blobs.open(_by_seq(db, seq).input_file_id) as source:
            for number, offset, length, num_deaths in rows:
                source.seek(offset)
                found.append(Line(number, source.read(length), num_deaths))
                num_bytes += length
                if num_bytes >= MAX_PENDING_BYTES:
                    break
        return found

    def note_death(self, seq: int, number: int) -> None:
        """An engine ended while it had this line. Once this returns it is on disk, whatever happens."""
        with self._database.writing() as db:
            db.execute(
                "UPDATE lines SET num_deaths = num_deaths + 1 WHERE batch = ? AND number = ?", (seq, number)
            )
        self._database.at("death.committed")

    def record(self, seq: int, results: Sequence[LineResult]) -> BatchRecord:
        """Make results count, all at once. A line that has a result already keeps it."""
        db, at = self._database.db, self._database.at
        batch = _by_seq(db, seq)
        fresh = _only_unfinished(db, seq, results)
        if not fresh:
            return batch
        good = [result for result in fresh if result.is_success]
        bad = [result for result in fresh if not result.is_success]
        output_bytes, error_bytes = batch.output_bytes, batch.error_bytes
        with self._database.disk():
            if good:
                data = b"".join(result.data for result in good)
                output_bytes = self._blobs.append(batch.output_file_id, output_bytes, data)
            at("record.output_synced")
            if bad:
                data = b"".join(result.data for result in bad)
                error_bytes = self._blobs.append(batch.error_file_id, error_bytes, data)
            at("record.errors_synced")
        usage = sum((result.usage for result in good), batch.usage)
        with self._database.writing() as db:
            db.executemany(
                "UPDATE lines SET is_finished = 1 WHERE batch = ? AND number = ?",
                [(seq, result.number) for result in fresh],
            )
            db.execute(
                "UPDATE batches SET completed = completed + ?, failed = failed + ?, output_bytes = ?, "
                f"error_bytes = ?, {', '.join(f'{name} = ?' for name in _USAGE)} WHERE seq = ?",
                (len(good), len(bad), output_bytes, error_bytes, *_usage_values(usage), seq),
            )
            at("record.committing")
        at("record.committed")
        return _by_seq(self._database.db, seq)

    def cancel(self, owner: str, batch_id: str) -> BatchRecord:
        """Begin to cancel; a second time changes nothing. ConflictError once the batch ends."""
        batch = self.get(owner, batch_id)
        if batch.status not in (Status.CANCELLING, Status.CANCELLED):
            try:
                self.step(batch.seq, Event.CANCEL)
            except IllegalEventError:
                raise ConflictError(
                    "batch_id", f"{batch_id} is {batch.status}; only a batch that still runs can be cancelled"
                ) from None
            self._database.at("cancel.committed")
        return self.get(owner, batch_id)

    def step(self, seq: int, event: Event) -> BatchRecord:
        """Take a batch to its next state. IllegalEventError where that is not the next one."""
        with self._database.writing() as db:
            self._step(db, _by_seq(db, seq), event)
        self._database.at(f"{event}.committed")
        return _by_seq(self._database.db, seq)

    def close(self, seq: int, event: Event) -> BatchRecord:
        """`step` for a batch that its owner may have cancelled meanwhile; then it stays in `cancelling`."""
        batch = _by_seq(self._database.db, seq)
        return batch if batch.status is Status.CANCELLING else self.step(seq, event)

    def _step(self, db: sqlite3.Connection, batch: BatchRecord, event: Event) -> None:
        status, ending = after(batch.status, batch.ending, event)
        now = int(self._now())
        db.execute(
            f"UPDATE batches SET status = ?, ending = ?, {status}_at = ?, ended_at = ? WHERE seq = ?",
            (status, ending, now, now if status in ENDED else None, batch.seq),
        )

    def settle(self, seq: int) -> BatchRecord:
        """End a batch whose lines all have their result: its results become files of its owner."""
        with self._database.writing() as db:
            batch = _by_seq(db, seq)
            assert batch.num_left == 0, "a batch ends when every line has its result"
            self._end(db, batch, Event.SETTLE)
            self._database.at("settle.committing")
        self._database.at("settle.committed")
        return _by_seq(self._database.db, seq)

    def _end(self, db: sqlite3.Connection, batch: BatchRecord, event: Event) -> None:
        now = int(self._now())
        expires_at = now + (batch.output_life_s or self._limits.retention_s)
        for file_id, what, size in _results(batch):
            if size:
                name = f"{batch.id}_{what}.jsonl"
                insert_file(db, (file_id, batch.owner, name, "batch_output", size, now, expires_at))
        db.execute("DELETE FROM lines WHERE batch = ?", (batch.seq,))
        self._step(db, batch, event)

    def sweep(self, quota_of: Callable[[str], Quota]) -> None:
        """Forget batches that ended long ago and whose results are gone."""
        with self._database.writing() as db:
            for (owner,) in db.execute(f"SELECT DISTINCT owner FROM batches WHERE NOT {OPEN}").fetchall():
                retention_s = quota_of(owner).retention_s or self._limits.retention_s
                db.execute(
                    "DELETE FROM batches WHERE owner = ? AND ended_at <= ? AND NOT EXISTS "
                    "(SELECT 1 FROM files WHERE files.id IN (output_file_id, error_file_id))",
                    (owner, int(self._now()) - retention_s),
                )

    def recover(self) -> None:
        """Cut off what was appended and never recorded. A batch with damaged files fails."""
        for batch in self.open_batches():
            if losses := self._losses(batch):
                self._fail_damaged(batch, losses)
            else:
                for file_id, _, size in _results(batch):
                    self._blobs.cut(file_id, size)

    def _losses(self, batch: BatchRecord) -> list[LineError]:
        """What is gone that was on disk before: nobody but us writes there, so this is damage."""
        found = []
        if self._blobs.size(batch.input_file_id) is None:
            found.append(LineError("state_damaged", f"the input file {batch.input_file_id} is gone"))
        for file_id, what, size in _results(batch):
            there = self._blobs.size(file_id) or 0
            if there < size:
                message = f"the {what} file {file_id} holds {there} bytes, {size} were recorded"
                found.append(LineError("state_damaged", message))
        return found

    def _fail_damaged(self, batch: BatchRecord, losses: Sequence[LineError]) -> None:
        """End it, and leave to its owner what is still there of its results."""
        errors = json.dumps([asdict(error) for error in losses])
        with self._database.writing() as db:
            for file_id, _, size in _results(batch):
                there = min(size, self._blobs.size(file_id) or 0)
                column = "output_bytes" if file_id == batch.output_file_id else "error_bytes"
                db.execute(f"UPDATE batches SET {column} = ? WHERE seq = ?", (there, batch.seq))
            db.execute("UPDATE batches SET errors = ? WHERE seq = ?", (errors, batch.seq))
            self._end(db, _by_seq(db, batch.seq), Event.DAMAGE)

    def reserved_ids(self) -> set[str]:
        """Files that batches under way write to."""
        return {file_id for batch in self.open_batches() for file_id, _, _ in _results(batch)}


def _results(batch: BatchRecord) -> tuple[tuple[str, str, int], tuple[str, str, int]]:
    """Both results of a batch: file id, what it holds, bytes that count."""
    return (
        (batch.output_file_id, "output", batch.output_bytes),
        (batch.error_file_id, "error", batch.error_bytes),
    )


def _only_unfinished(db: sqlite3.Connection, seq: int, results: Sequence[LineResult]) -> list[LineResult]:
    """Without those of finished lines, and one for each line."""
    marks = ", ".join("?" * len(results))
    rows = db.execute(
        f"SELECT number FROM lines WHERE batch = ? AND NOT is_finished AND number IN ({marks})",
        (seq, *(result.number for result in results)),
    )
    wanted = {row[0] for row in rows}
    first = {result.number: result for result in reversed(results) if result.number in wanted}
    return list(first.values())


def _num_open_lines(db: sqlite3.Connection, owner: str) -> int:
    query = f"SELECT coalesce(sum(total - completed - failed), 0) FROM batches WHERE owner = ? AND {OPEN}"
    return int(db.execute(query, (owner,)).fetchone()[0])


def _too_many(db: sqlite3.Connection, owner: str, found: Validation, quota: Quota) -> list[LineError]:
    """What is wrong with a good input whose owner has too many lines under way."""
    count, others = len(found.numbers), _num_open_lines(db, owner)
    if count + others <= quota.max_open_lines:
        return []
    message = (
        f"{count} lines, and {others} of this key's other batches without a result, exceed the "
        f"{quota.max_open_lines} that a key may have; wait until some are done, or split the file"
    )
    return [LineError("line_quota_exceeded", message)]


def _by_seq(db: sqlite3.Connection, seq: int) -> BatchRecord:
    return _record(db.execute("SELECT * FROM batches WHERE seq = ?", (seq,)).fetchone())


def _record(row: sqlite3.Row | dict[str, Any]) -> BatchRecord:
    values = dict(row)
    usage = Usage(**{name: values.pop(name) for name in _USAGE})
    values["status"] = Status(values["status"])
    values["ending"] = Status(values["ending"]) if values["ending"] else None
    values["metadata"] = None if values["metadata"] is None else _loaded(values["metadata"])
    values["errors"] = tuple(LineError(**error) for error in _loaded(values["errors"]))
    return BatchRecord(**values, usage=usage)


def _loaded(text: str) -> Any:
    """JSON of a row. Half a surrogate pair, which no answer can hold, becomes U+FFFD in its texts."""
    return json.loads(text, object_pairs_hook=lambda pairs: {_whole(n): _whole(v) for n, v in pairs})


def _whole(value: Any) -> Any:
    return _HALF.sub("\ufffd", value) if isinstance(value, str) else value


def _usage_values(usage: Usage) -> tuple[int, ...]:
    return tuple(getattr(usage, name) for name in _USAGE)
