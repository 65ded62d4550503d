"""What a state directory says of finished lines after a death, beside a log of every time a line was run."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path


class Witness:
    """Looks at what is on disk after each death and remembers how often each finished line had been run.

    log: a file with the id of a line for each time it was run. scratch: a folder for copies.
    """

    def __init__(self, state: Path, log: Path, scratch: Path) -> None:
        self.state, self._log, self._scratch = state, log, scratch
        self._runs_when_finished: dict[str, int] = {}

    def look(self, has_writer: bool = False) -> None:
        """Lines that had their result at the last look were not run since; results that count are whole.

        has_writer: the process that writes is alive.
        """
        finished = self._finished(has_writer)
        runs = self.runs()
        for name, count in self._runs_when_finished.items():
            assert runs[name] == count, f"{name} was finished and ran again"
        assert set(finished) >= set(self._runs_when_finished), "a result that counted is gone"
        self._runs_when_finished = {name: runs[name] for name in finished}

    def runs(self) -> Counter[str]:
        return Counter(self._log.read_text().split()) if self._log.exists() else Counter()

    def _finished(self, has_writer: bool) -> list[str]:
        """Ids of the result lines that count."""
        database, mode = self.state / "batches.sqlite", "ro"
        if not has_writer:
            database, mode = self._copied(), "rw"
        if not database.exists():
            return []
        with closing(sqlite3.connect(f"{database.as_uri()}?mode={mode}", uri=True)) as db:
            if db.execute("PRAGMA user_version").fetchone()[0] == 0:
                return []
            rows = db.execute(
                "SELECT output_file_id, output_bytes FROM batches UNION ALL "
                "SELECT error_file_id, error_bytes FROM batches"
            ).fetchall()
        found: list[str] = []
        for file_id, size in rows:
            if size:
                data = (self.state / "files" / file_id).read_bytes()[:size]
                assert data.endswith(b"\n")
                found += [json.loads(one)["id"] for one in data.splitlines()]
        assert len(set(found)) == len(found), "a line has two results"
        return found

    def _copied(self) -> Path:
        """Whoever opens a database after a crash recovers it: the state itself stays as death left it."""
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir()
        for path in self.state.glob("batches.sqlite*"):
            shutil.copy(path, self._scratch)
        return self._scratch / "batches.sqlite"
