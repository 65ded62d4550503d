"""What the tests of batches share: inputs, a clock that is set by hand, and a store with an owner."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omniserve.batch.limits import Limits, Quota
from omniserve.batch.records import BatchRecord, FileRecord, LineResult, NewBatch
from omniserve.batch.results import answered
from omniserve.batch.store import Store

ENDPOINT = "/v1/chat/completions"
# The tests' disks may be small.
LIMITS = Limits(reserve_bytes=0)
QUOTA = Quota()
OWNER = "anna"


@dataclass
class Clock:
    """Seconds since the epoch, moved only by the test."""

    now_s: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


def line(number: int, **changes: Any) -> dict[str, Any]:
    body = {"model": "m", "messages": [{"role": "user", "content": f"question {number}"}]}
    return {"custom_id": f"line-{number}", "method": "POST", "url": ENDPOINT, "body": body} | changes


def jsonl(lines: Iterable[object]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in lines)


def lines(count: int) -> bytes:
    return jsonl(line(number) for number in range(1, count + 1))


def upload(store: Store, data: bytes, owner: str = OWNER, quota: Quota = QUOTA) -> FileRecord:
    incoming = store.files.begin(owner, quota)
    try:
        for begin in range(0, len(data), 1000):
            store.files.write(incoming, data[begin : begin + 1000])
        return store.files.accept(incoming, owner, "in.jsonl", None, quota)
    finally:
        incoming.close()


def new_batch(file: FileRecord, **changes: Any) -> NewBatch:
    values: dict[str, Any] = {
        "endpoint": ENDPOINT,
        "input_file_id": file.id,
        "completion_window": "24h",
        "window_s": 86400,
    }
    return NewBatch(**(values | changes))


def create(store: Store, data: bytes, **changes: Any) -> BatchRecord:
    return store.batches.create(OWNER, new_batch(upload(store, data), **changes), QUOTA)


def validate(store: Store, batch: BatchRecord) -> BatchRecord:
    found = store.batches.validation(batch)
    while not found.advance():
        pass
    found.close()
    return store.batches.validated(batch.seq, found)


def started(store: Store, data: bytes, **changes: Any) -> BatchRecord:
    """A batch in progress."""
    return validate(store, create(store, data, **changes))


def result(batch: BatchRecord, number: int, status_code: int = 200) -> LineResult:
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
    body = {"usage": usage} if status_code == 200 else {"error": {"message": "no"}}
    return answered(batch.id, number, f"line-{number}", status_code, body)


def content(store: Store, file_id: str, owner: str = OWNER) -> list[dict[str, Any]]:
    """The lines of a result file, parsed."""
    _, source = store.files.open(owner, file_id)
    with source:
        return [json.loads(raw) for raw in source]


def custom_ids(results: Sequence[dict[str, Any]]) -> list[str]:
    return [one["custom_id"] for one in results]


def blobs(root: Path) -> set[str]:
    """Every file of the state directory's two folders of bytes."""
    return {path.name for folder in ("files", "incoming") for path in (root / folder).iterdir()}
