"""kill -9 at every write boundary and at random: nothing accepted is lost, nothing finished runs again."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from batch import kill_child
from batch.stand import LIMITS, OWNER, blobs
from batch.witness import Witness
from omniserve.batch.records import BatchRecord
from omniserve.batch.store import POINTS, Store

NUM_RANDOM_KILLS = int(os.environ.get("OMNISERVE_KILLS", "20"))
# A life without a kill takes about this long here; kills fall before and after it too.
LIFE_S = 0.25
# And one that hangs is given up after this long.
LIMIT_S = 30.0


@pytest.fixture(scope="module")
def context() -> Any:
    """Children are forked from a process that has imported everything: a life begins at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["batch.kill_child"])
    return context


class Root(Witness):
    """The folder that all lives of one story share."""

    def __init__(self, root: Path, scratch: Path) -> None:
        super().__init__(root / "state", root / "runs", scratch)
        self.root = root

    def at_the_end(self) -> None:
        """Everything promised is there, and every line of every batch has exactly one result."""
        store = Store(self.state, limits=LIMITS)
        try:
            batches, _ = store.batches.page(OWNER, None, 100)
            assert {batch.id for batch in batches} >= self._promised("batch_")
            kept = {file.id for file in store.files.page(OWNER, None, None, 1000, True)[0]}
            deleted = {b.input_file_id for b in batches if b.metadata == {"end": "completed"}}
            assert kept >= self._promised("file-") - deleted
            assert kept.isdisjoint(deleted)
            assert blobs(self.state) == kept
            ends = {batch.metadata["end"]: batch for batch in batches if batch.metadata}
            assert set(ends) == set(kill_child.SIZES)
            for end, batch in ends.items():
                self._check_batch(store, end, batch)
        finally:
            store.close()

    def _promised(self, prefix: str) -> set[str]:
        return {name for name in (self.root / "promised").read_text().split() if name.startswith(prefix)}

    def _check_batch(self, store: Store, end: str, batch: BatchRecord) -> None:
        size = kill_child.SIZES[end]
        assert (batch.status, batch.total) == (end, size)
        seen: dict[int, str] = {}
        for file_id in (batch.output_file_id, batch.error_file_id):
            with store.files.open(OWNER, file_id)[1] as source:
                for raw in source:
                    one = json.loads(raw)
                    number = int(one["custom_id"].removeprefix("line-"))
                    assert number not in seen
                    seen[number] = _outcome(one, end, number)
        answered = size if end == "completed" else kill_child.ANSWERED
        for number in range(1, size + 1):
            expected = "bad" if number % kill_child.BAD == 0 else "good"
            assert seen[number] == (expected if number <= answered else f"batch_{end}")
        good = list(seen.values()).count("good")
        assert (batch.completed, batch.failed) == (good, size - good)


def _outcome(one: dict[str, Any], end: str, number: int) -> str:
    if one["response"] is None:
        return str(one["error"]["code"])
    if one["response"]["status_code"] == 400:
        return "bad"
    assert one["response"]["body"] == {"text": f"{end} {number}"}
    return "good"


def begin(context: Any, *arguments: object) -> BaseProcess:
    process: BaseProcess = context.Process(target=kill_child.run, args=arguments, daemon=True)
    process.start()
    return process


def live_on(context: Any, witness: Root) -> None:
    """A last life that nobody ends."""
    process = begin(context, witness.root)
    process.join(LIMIT_S)
    assert process.exitcode == 0
    witness.look()
    witness.at_the_end()


# Where a second and a third time differ from the first.
AGAIN = (
    "upload.placed",
    "create.committed",
    "record.output_synced",
    "record.committing",
    "settle.committing",
)


@pytest.mark.parametrize(
    ("point", "passes"),
    [
        *((point, 1) for point in (*POINTS, kill_child.TORN)),
        *((point, 3) for point in (*AGAIN, kill_child.TORN)),
    ],
)
def test_death_at_a_write_boundary_loses_nothing(
    context: Any, tmp_path: Path, point: str, passes: int
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    witness = Root(root, tmp_path / "copy")
    process = begin(context, root, point, passes)
    process.join(LIMIT_S)
    assert process.exitcode == -signal.SIGKILL, "the boundary was not passed"
    witness.look()
    live_on(context, witness)


def test_deaths_at_random_moments_lose_nothing(context: Any, tmp_path: Path) -> None:
    chance, num_kills, life = random.Random(0), 0, 0
    while num_kills < NUM_RANDOM_KILLS:
        life += 1
        root = tmp_path / f"root-{life}"
        root.mkdir()
        witness = Root(root, tmp_path / "copy")
        for _ in range(min(5, NUM_RANDOM_KILLS - num_kills)):
            process = begin(context, root)
            process.join(chance.uniform(0.0, LIFE_S))
            if process.exitcode is not None:
                assert process.exitcode == 0
                break
            process.kill()
            process.join()
            num_kills += 1
            witness.look()
        live_on(context, witness)
