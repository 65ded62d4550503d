"""`omniserve batch run` and `omniserve state check` as typed, with a real engine on a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from batch.stand import LIMITS, jsonl, lines, started
from conftest import TinyLlama
from omniserve.batch.offline import work_folder
from omniserve.batch.store import Store
from omniserve.cli import main
from omniserve.engine.llm import LLM
from omniserve.types import SamplingParams

PROMPT = "once upon a time"


def completion(custom_id: str, model: str, **fields: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 5, "temperature": 0} | fields
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


@pytest.mark.slow
def test_a_batch_file_is_run_by_the_engine(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    model = str(tiny_llama())
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(
        jsonl(
            [
                completion("plain", model),
                completion("two", model, n=2, temperature=1, seed=3),
                completion("biased", model, logit_bias={"7": 100}),
                completion("scored", model, echo=True, logprobs=1, max_tokens=0),
                completion("strange", model, suffix="end"),
                completion("long", model, max_tokens=10**6),
            ]
        )
    )
    settings = ["--model", model, "--device-threads", "1", "--host-threads", "1"]
    assert main(["batch", "run", str(source), "-o", str(output), *settings]) == 0
    results = {one["custom_id"]: one["response"] for one in map(json.loads, output.read_text().splitlines())}
    with LLM(model=model, device_threads=1, host_threads=1) as llm:
        (expected,) = llm.generate([PROMPT], SamplingParams(max_tokens=5, temperature=0.0))
        biased = llm.tokenizer.decode([7] * 5)
    assert results["plain"]["body"]["choices"][0]["text"] == expected.text
    assert results["plain"]["body"]["usage"]["completion_tokens"] == len(expected.token_ids)
    assert len(results["two"]["body"]["choices"]) == 2
    refused = {name: one for name, one in results.items() if one["status_code"] == 400}
    assert set(refused) == {"strange", "long"}
    assert refused["strange"]["body"]["error"]["code"] == "unsupported_parameter"
    assert refused["long"]["body"]["error"]["code"] == "context_length_exceeded"
    assert results["biased"]["body"]["choices"][0]["text"] == biased
    assert results["scored"]["body"]["choices"][0]["text"] == PROMPT


@pytest.mark.slow
def test_an_engine_that_is_killed_under_a_batch_file_is_started_again(
    tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    model, count = str(tiny_llama()), 200
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(jsonl(completion(str(i), model, max_tokens=60, ignore_eos=True) for i in range(count)))
    settings = ["--model", model, "--device-threads", "1", "--host-offload", "never"]
    command = [
        sys.executable,
        "-m",
        "omniserve.cli",
        "batch",
        "run",
        str(source),
        "-o",
        str(output),
        *settings,
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        deadline = time.monotonic() + 120
        while not (work_folder(output) / "batches.sqlite").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (engine,) = children(run.pid)
        os.kill(engine, signal.SIGKILL)
        _, told = run.communicate(timeout=120)
    assert run.returncode == 0, told
    assert b"killed by signal 9" in told
    results = [json.loads(one) for one in output.read_text().splitlines()]
    assert {one["custom_id"] for one in results} == {str(i) for i in range(count)}
    assert [one["response"]["status_code"] for one in results] == [200] * count


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in found for child in file.read_text().split()]


@pytest.mark.slow
def test_a_batch_file_of_a_model_that_does_not_start_is_told_so_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(jsonl([completion("one", "no/such-model")]))
    assert main(["batch", "run", str(source), "-o", str(output), "--model", "no/such-model"]) == 1
    assert "no/such-model" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl"}


@pytest.mark.parametrize("count", ["0", "-1", "many"])
def test_lines_in_flight_are_at_least_one(
    count: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    with pytest.raises(SystemExit) as ended:
        main(["batch", "run", *files, "--concurrency", count])
    assert ended.value.code == 2
    assert f"--concurrency: must be an integer of at least 1, got '{count}'" in capsys.readouterr().err


def test_a_batch_file_is_run_without_loading_an_http_server() -> None:
    parts = "batch_lines", "endpoints", "engine_keeper", "model_names"
    modules = ", ".join(f"omniserve.server.{part}" for part in parts)
    code = f"import sys, {modules}; print(sorted({{'fastapi', 'uvicorn'}} & set(sys.modules)))"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.strip() == "[]"


def test_state_check_says_what_is_there_and_fails_on_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path, limits=LIMITS)
    batch = started(store, lines(2))
    store.close()
    assert main(["state", "check", "--state-dir", str(tmp_path)]) == 0
    assert "1 files, 1 batches (1 open), 0 problems" in capsys.readouterr().out
    (tmp_path / "files" / batch.input_file_id).unlink()
    assert main(["state", "check", "--state-dir", str(tmp_path)]) == 1
    assert "is gone" in capsys.readouterr().err
