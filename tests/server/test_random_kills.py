"""kill -9 of any process of a real server at random moments: each line has one result, and it is right."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from batch.witness import Witness
from omniserve.batch.check import check_state
from server import counted
from server.process_tree import ENGINE, HOST, SERVER, tree, wait_gone
from server.processes import PATIENCE_S, Served

NUM_KILLS = int(os.environ.get("OMNISERVE_SERVER_KILLS", "3"))
SEED = int(os.environ.get("OMNISERVE_KILL_SEED", "0"))
# Five engines that die of a line would be its result.
KILLS_PER_BATCH = 4
# Kills come within this part of the time that a batch takes.
SPAN = 0.3
# Share of kills that hit while what the one before ended is being started again.
EARLY = 0.25
NUM_LINES, CONCURRENCY = 64, 8
KINDS = (SERVER, ENGINE, HOST)
URL = "/v1/chat/completions"
HELLO = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hello"}],
    "max_tokens": 8,
    "temperature": 0,
}
ARGUMENTS = (
    *("--served-model-name", "tiny", "--batch-concurrency", str(CONCURRENCY), "--no-pin-cpus"),
    # Batches decode with host attention: the host has work whenever it is killed.
    *("--host-offload", "always", "--device-threads", "1", "--host-threads", "1"),
    *("--device-memory-bytes", str(64 * 1024**2), "--host-memory-bytes", str(64 * 1024**2)),
)


def lines() -> list[dict[str, Any]]:
    """Texts of different lengths; now and then a line that is refused."""
    chance, found = random.Random(1), []
    for number in range(NUM_LINES):
        text = f"{number}: " + "".join(chance.choices("abcdefgh ", k=chance.randint(4, 120)))
        body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "temperature": 0}
        body |= {"max_tokens": chance.randint(8, 160), "ignore_eos": True}
        if number % 20 == 7:
            body["tools"] = [{"type": "function"}]
        found.append({"custom_id": f"line-{number}", "method": "POST", "url": URL, "body": body})
    return found


def outcome(result: dict[str, Any]) -> tuple[int, str]:
    body = result["response"]["body"]
    if result["response"]["status_code"] == 200:
        return 200, body["choices"][0]["message"]["content"]
    return result["response"]["status_code"], body["error"]["code"]


class Story:
    """One state directory and the servers that follow each other on it."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.state, log = folder / "state", folder / "runs"
        self.witness = Witness(self.state, log, folder / "copy")
        self._arguments = (str(model), "--state-dir", str(self.state), *ARGUMENTS)
        self._program = (sys.executable, counted.__file__, str(log))
        self._input = "".join(json.dumps(line) + "\n" for line in lines()).encode()
        self._chance = random.Random(SEED)
        self._bag: list[str] = []
        self._killed: set[int] = set()
        self._orphans: set[int] = set()
        self.kills: list[str] = []
        self.span_s = 0.0
        self.start()

    def start(self) -> None:
        self.server = Served(*self._arguments, program=self._program)

    # ------------------------------------------------------------ what a client does

    def submit(self) -> str:
        with self.server.client() as client:
            file = client.files.create(file=("lines.jsonl", self._input), purpose="batch")
            made = client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
        return made.id

    def has_ended(self, batch_id: str) -> bool:
        with self.server.client() as client:
            return client.batches.retrieve(batch_id).status not in ("validating", "in_progress", "finalizing")

    def outcomes(self, batch_id: str) -> dict[str, tuple[int, str]]:
        """What became of each line, by custom_id, of a batch that is let run to its end."""
        self.server.wait_until(lambda: self.has_ended(batch_id), "the batch is through")
        found: dict[str, tuple[int, str]] = {}
        with self.server.client() as client:
            batch = client.batches.retrieve(batch_id)
            assert batch.status == "completed"
            for file_id in (batch.output_file_id, batch.error_file_id):
                for raw in client.files.content(file_id).read().splitlines():
                    result = json.loads(raw)
                    assert result["custom_id"] not in found, "a line has two results"
                    found[result["custom_id"]] = outcome(result)
        counts, good = batch.request_counts, num_good(found)
        assert (counts.total, counts.completed, counts.failed) == (len(found), good, len(found) - good)
        return found

    def chat(self) -> str:
        with self.server.client() as client:
            return client.chat.completions.create(**HELLO).choices[0].message.content

    # ------------------------------------------------------------ what death does

    def kill(self, is_early: bool) -> None:
        """kill -9 of one process, whichever chance picks; look at what is on disk."""
        self._revive()
        waited_s = self._chance.uniform(0.0, self.span_s)
        time.sleep(waited_s)
        alive = self._alive()
        kind = self._kind(set(alive.values()), is_early)
        pid = self._chance.choice([pid for pid, its in alive.items() if its == kind])
        os.kill(pid, signal.SIGKILL)
        self._killed.add(pid)
        self.kills.append(kind)
        print(f"kill {len(self.kills)}: {kind}, {waited_s:.2f} s after {'a death' if is_early else 'a chat'}")
        if kind == SERVER:
            self.server.process.wait()
            self._orphans |= alive.keys() - {pid}
        self.witness.look(has_writer=self.server.process.poll() is None)

    def _alive(self) -> dict[int, str]:
        """Who can be killed. A server whose first engine was killed may end at any moment."""
        alive: dict[int, str] = {}
        while not alive:
            self._revive()
            wait_gone(self._killed)
            alive = tree(self.server.process.pid)
        return alive

    def _kind(self, alive: set[str], is_early: bool) -> str:
        """Each kind once before any comes again, but for those that are not there."""
        self._bag = self._bag or self._chance.sample(KINDS, len(KINDS))
        if not is_early and self._bag[-1] in alive:
            return self._bag.pop()
        return self._chance.choice(sorted(alive))

    def is_next_early(self) -> bool:
        return len(self.kills) >= len(KINDS) and self._chance.random() < EARLY

    def recover(self) -> None:
        """Until the present server serves; what was killed, and what lived for it, has ended then."""
        deadline = time.monotonic() + PATIENCE_S
        while not self._serves():
            assert time.monotonic() < deadline, self.server.log
            self._revive()
            time.sleep(0.02)
        wait_gone(self._killed | self._orphans)
        self._killed, self._orphans = set(), set()

    def _revive(self) -> None:
        """Start a server that is gone again, as a supervisor would; one that lives has to help itself."""
        if self.server.process.poll() is not None:
            self._bury()
            self.start()

    def _engines(self) -> list[int]:
        return [int(pid) for pid in re.findall(r"engine is up after .* \(pid (\d+)\)", self.server.log)]

    def _serves(self) -> bool:
        if self.server.process.poll() is not None or not set(self._engines()[-1:]) - self._killed:
            return False
        try:
            return self.server.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def _bury(self) -> None:
        """The server ended by our hand, or because its first engine did."""
        status = self.server.wait_ended()
        if self.server.process.pid not in self._killed:
            assert (status, self._engines()) == (1, []), self.server.log
            assert "killed by signal 9" in self.server.lines[-1]
        assert "Traceback" not in self.server.log
        self.server.close()


@contextmanager
def begun(model: Path, folder: Path) -> Iterator[Story]:
    story = Story(model, folder)
    try:
        yield story
        story.server.process.send_signal(signal.SIGTERM)
        assert story.server.wait_ended() == 0, story.server.log
        assert "Traceback" not in story.server.log
    finally:
        story.server.close()
        print(f"seed {SEED}: {dict(Counter(story.kills))}")


def kill_all_the_while(story: Story, batch_id: str, said: str) -> None:
    """Kills until they are enough for one batch, or it has ended; a chat is answered after each."""
    is_early = False
    for _ in range(min(KILLS_PER_BATCH, NUM_KILLS - len(story.kills))):
        if not is_early and story.has_ended(batch_id):
            return
        story.kill(is_early)
        is_early = story.is_next_early()
        if not is_early:
            story.recover()
            assert story.chat() == said
    story.recover()
    assert story.chat() == said


@pytest.mark.slow
@pytest.mark.timeout(180 + 30 * NUM_KILLS)
def test_kills_of_any_process_at_random_moments_cost_no_line_and_run_none_twice(
    tiny_model: Path, tmp_path: Path
) -> None:
    with begun(tiny_model, tmp_path) as story:
        story.server.wait_ready()
        said, began_s = story.chat(), time.monotonic()
        expected = story.outcomes(story.submit())
        story.span_s = SPAN * (time.monotonic() - began_s)
        assert expected.keys() == {line["custom_id"] for line in lines()}
        assert story.server.get("/admin/stats").json()["num_lane_tokens"] > 0, "the host had work"
        num_batches = 1
        while len(story.kills) < NUM_KILLS:
            batch_id, num_batches = story.submit(), num_batches + 1
            kill_all_the_while(story, batch_id, said)
            assert story.outcomes(batch_id) == expected
        story.witness.look(has_writer=True)
    check_runs(story, num_batches * num_good(expected))
    report = check_state(story.state)
    assert (report.num_batches, report.num_open, report.problems) == (num_batches, 0, [])


def num_good(outcomes: dict[str, tuple[int, str]]) -> int:
    return [status for status, _ in outcomes.values()].count(200)


def check_runs(story: Story, num_lines: int) -> None:
    """Every good line ran; again ran at most what was in flight when an engine died."""
    runs = {name: n for name, n in story.witness.runs().items() if name.startswith("batch_req_")}
    assert len(runs) == num_lines
    num_again = sum(runs.values()) - num_lines
    print(f"{num_lines} lines, {num_again} runs more")
    assert num_again <= CONCURRENCY * (len(story.kills) - story.kills.count(HOST))
