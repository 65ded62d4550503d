"""`omniserve batch run` and `omniserve state check` as typed, with a real engine on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from batch.stand import LIMITS, jsonl, lines, started
from conftest import TinyLlama
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
                completion("strange", model, logit_bias={"1": 5}),
                completion("long", model, max_tokens=10**6),
            ]
        )
    )
    settings = ["--model", model, "--device-threads", "1", "--host-threads", "1"]
    assert main(["batch", "run", str(source), "-o", str(output), *settings]) == 0
    results = {one["custom_id"]: one["response"] for one in map(json.loads, output.read_text().splitlines())}
    with LLM(model=model, device_threads=1, host_threads=1) as llm:
        (expected,) = llm.generate([PROMPT], SamplingParams(max_tokens=5, temperature=0.0))
    assert results["plain"]["body"]["choices"][0]["text"] == expected.text
    assert results["plain"]["body"]["usage"]["completion_tokens"] == len(expected.token_ids)
    assert len(results["two"]["body"]["choices"]) == 2
    refused = {name: one for name, one in results.items() if one["status_code"] == 400}
    assert set(refused) == {"strange", "long"}
    assert "logit_bias" in refused["strange"]["body"]["error"]["message"]


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
