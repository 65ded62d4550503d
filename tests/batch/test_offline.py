"""A batch without a server: one file in, one file out, and a run that was interrupted goes on."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from batch.scripted import SETTINGS, ScriptedRunner
from batch.stand import jsonl, line, lines
from omniserve.batch.offline import run_file, work_folder
from omniserve.batch.records import BatchRecord
from omniserve.batch.runner import LineResponse
from omniserve.errors import ConfigError, RequestError


def run(folder: Path, runner: ScriptedRunner, data: bytes, overwrite: bool = False) -> BatchRecord:
    source = folder / "in.jsonl"
    source.write_bytes(data)
    return asyncio.run(run_file(source, folder / "out.jsonl", runner, SETTINGS, overwrite))


def results(folder: Path) -> dict[str, int]:
    """Status by custom_id; every custom_id once."""
    found = [json.loads(one) for one in (folder / "out.jsonl").read_bytes().splitlines()]
    assert len({one["custom_id"] for one in found}) == len(found)
    return {one["custom_id"]: one["response"]["status_code"] for one in found}


def test_every_line_has_its_result_in_the_one_output(tmp_path: Path) -> None:
    async def behave(text: str, run: int) -> LineResponse | None:
        return LineResponse(400, {"error": {}}) if text == "question 2" else None

    batch = run(tmp_path, ScriptedRunner(behave), lines(5))
    assert (batch.completed, batch.failed) == (4, 1)
    assert results(tmp_path) == {f"line-{n}": 400 if n == 2 else 200 for n in range(1, 6)}
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}


def interrupt(folder: Path, count: int, num_done: int) -> None:
    """A run of `count` lines that ends when `num_done` of them are done, which is as far as it gets."""

    async def stick(text: str, run: int) -> LineResponse | None:
        if int(text.split()[1]) > num_done:
            await asyncio.Event().wait()
        return None

    async def main() -> None:
        is_far = asyncio.Event()

        def look(batch: BatchRecord) -> None:
            if batch.status == "in_progress" and batch.completed == num_done:
                is_far.set()

        source = folder / "in.jsonl"
        source.write_bytes(lines(count))
        made = run_file(source, folder / "out.jsonl", ScriptedRunner(stick), SETTINGS, on_progress=look)
        running = asyncio.create_task(made)
        await is_far.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(main())


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    interrupt(tmp_path, 20, 8)
    assert not (tmp_path / "out.jsonl").exists()
    after = ScriptedRunner()
    run(tmp_path, after, lines(20))
    assert len(results(tmp_path)) == 20
    assert after.runs == Counter({f"question {n}": 1 for n in range(9, 21)})


def test_unfinished_work_on_another_input_is_not_mixed_up(tmp_path: Path) -> None:
    interrupt(tmp_path, 3, 0)
    with pytest.raises(ConfigError, match="another input"):
        run(tmp_path, ScriptedRunner(), lines(4))
    assert work_folder(tmp_path / "out.jsonl").exists()


def test_an_output_that_is_there_is_only_replaced_when_told(tmp_path: Path) -> None:
    run(tmp_path, ScriptedRunner(), lines(1))
    with pytest.raises(ConfigError, match="--overwrite"):
        run(tmp_path, ScriptedRunner(), lines(2))
    run(tmp_path, ScriptedRunner(), lines(2), overwrite=True)
    assert len(results(tmp_path)) == 2


@pytest.mark.parametrize("lost", ["batches.sqlite*", "files/*"])
def test_a_run_killed_while_it_clears_up_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    class Killed(BaseException):
        pass

    def half_removed(folder: Path) -> None:
        if folder.exists():
            for path in folder.glob(lost):
                path.unlink()
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half_removed)
        with pytest.raises(Killed):
            run(tmp_path, ScriptedRunner(), lines(3))
    again = ScriptedRunner()
    with pytest.raises(ConfigError, match="--overwrite"):
        run(tmp_path, again, lines(3))
    assert not again.runs
    assert len(results(tmp_path)) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}


def test_a_bad_input_is_refused_with_its_lines_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="line 2: 'line-1' is the custom_id of line 1 already"):
        run(tmp_path, ScriptedRunner(), jsonl([line(1), line(1)]))
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl"}
