"""The command line: every setting is a flag, results on standard output, errors one line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from omniserve import cli
from omniserve.commands.engine_flags import engine_settings
from omniserve.config import EngineConfig
from omniserve.errors import ConfigError
from omniserve.types import SLO

SMALL = ["--host-offload", "never", "--max-model-len", "256"]


def omniserve(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "omniserve.cli", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True)


def test_every_setting_is_a_flag() -> None:
    shown = omniserve("generate", "--help").stdout
    missing = {f.name for f in fields(EngineConfig) if "--" + f.name.replace("_", "-") not in shown}
    assert missing == {"classes"}, "classes have targets as flags: --slo-ttft-s, --slo-tpot-s"
    assert "--slo-ttft-s" in shown
    assert "--slo-tpot-s" in shown


@pytest.mark.parametrize(
    ("flags", "values"),
    [
        (["--host-mlock"], {"host_mlock": True}),
        (["--no-host-mlock"], {"host_mlock": False}),
        (["--no-enable-prefix-caching"], {"enable_prefix_caching": False}),
    ],
)
def test_a_yes_or_no_setting_is_a_flag_without_a_value(flags: list[str], values: dict[str, bool]) -> None:
    assert engine_settings(cli._parser().parse_args(["generate", "hello", *flags])) == values


def test_two_flags_set_the_targets_of_the_default_class() -> None:
    def settings(*flags: str) -> dict[str, object]:
        return engine_settings(cli._parser().parse_args(["generate", "hello", *flags]))

    chat, batch = settings("--slo-ttft-s", "1.5", "--slo-tpot-s", "0.2")["classes"]  # type: ignore[misc]
    assert (chat.name, chat.slo, batch.slo) == ("latency_sensitive", SLO(1.5, 0.2), None)
    assert settings("--policy", "paper") == {"policy": "paper"}
    with pytest.raises(ConfigError, match="give both or none"):
        settings("--slo-ttft-s", "1.5")


def test_generate_prints_the_text_alone() -> None:
    result = omniserve("generate", "The capital of France is", "--max-tokens", "4", *SMALL)
    assert (result.returncode, result.stderr) == (0, "")
    assert "Paris" in result.stdout


def test_texts_from_int8_kv_are_marked_on_standard_error() -> None:
    settings = ["--host-offload", "always", "--host-kv-dtype", "int8", "--max-model-len", "256"]
    result = omniserve(
        "generate", "One, two,", "--json", "--max-tokens", "3", "--service-class", "best_effort", *settings
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["metrics"]["is_exact"] is False
    assert result.stderr == ("omniserve: 1 of 1 texts come from int8 KV on the host and are not exact\n")


def test_texts_from_rounded_weights_are_marked_on_standard_error() -> None:
    result = omniserve(
        "generate", "One, two,", "--json", "--max-tokens", "3", "--quantization", "int8", *SMALL
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["metrics"]["is_exact"] is False
    assert result.stderr == "omniserve: 1 of 1 texts come from int8 weights and are not exact\n"


def test_generate_reads_prompts_from_standard_input_and_prints_json() -> None:
    result = omniserve("generate", "--json", "--max-tokens", "3", *SMALL, stdin="One, two,\n\nA, B,\n")
    outputs = [json.loads(line) for line in result.stdout.splitlines()]
    assert [len(o["token_ids"]) for o in outputs] == [3, 3]


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["generate", "x", "--max-model-len", "99999999"], 1, "max_model_len"),
        (["generate", "x", "--max-tokens", "0"], 1, "max_tokens"),
        (["generate", "x", "--model", "nothing"], 1, "smollm2-135m"),
        (["generate", "x", "--reentry", "later"], 2, "same_iteration"),
        (["generate", "x", "--host-kv-dtype", "float16"], 2, "int8"),
        (["generate", "x", "--quantization", "awq"], 2, "int4"),
        (["generate", "x", "--page-size", "many"], 2, "page-size"),
        (["model", "fetch", "nothing"], 1, "smollm2-135m"),
        (["dance"], 2, "COMMAND"),
    ],
)
def test_a_wrong_command_says_what_is_wrong(arguments: list[str], status: int, says: str) -> None:
    result = omniserve(*arguments)
    assert result.returncode == status
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_model_fetch_prints_where_the_model_is(smollm2_path: Path) -> None:
    result = omniserve("model", "fetch")
    assert Path(result.stdout.strip()) == smollm2_path


@pytest.mark.slow
def test_the_demo_shows_chat_going_on_under_a_frozen_host(tmp_path: Path) -> None:
    report = tmp_path / "demo.json"
    result = omniserve("demo", "--seconds", "4", "--json", str(report))
    assert result.returncode == 0, result.stdout + result.stderr
    measured = json.loads(report.read_text())
    alone, mixed, frozen = measured["legs"]
    assert measured["equal"] == measured["compared"] > 0
    assert alone["lane_tokens"] == 0 < mixed["lane_tokens"]
    assert frozen["lane_tokens"] == 0 < len(frozen["chat"])
