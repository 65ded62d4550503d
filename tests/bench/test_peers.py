"""The comparison with peers: the same work for all, in turns; a peer that fails is named, others go on."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from conftest import TinyLlama
from omniserve.bench import peer_setup, peers
from omniserve.bench.measure import tree_busy_s
from omniserve.bench.peer_process import PeerError, PeerProcess, last_line
from omniserve.bench.peer_rounds import OURS, Case, Comparison, Contender, warm_ups
from omniserve.bench.peer_setup import Environment
from omniserve.bench.peer_tables import checks, failures, table

BATCH, PREFILL = Case(2, 5, 8), Case(1, 40, 1)
CASES = (BATCH, PREFILL)

# Stands in for an interpreter: speaks the protocol, says it took SECONDS, fails where it is told to.
SCRIPTED = """#!{python}
import json, sys, time
print(json.dumps({{"version": "1.0"}}), flush=True)
for number, line in enumerate(sys.stdin):
    request = json.loads(line)
    if number == {dies_at}:
        sys.exit("ValueError: out of luck")
    length = request["max_tokens"] - (number == {short_at})
    outputs = [[sum(prompt)] * length for prompt in request["prompts"]]
    print(json.dumps({{"seconds": {seconds}, "outputs": outputs}}), flush=True)
"""
WARM_UPS = len(warm_ups(CASES))

Scripted = Callable[..., Contender]


@pytest.fixture
def scripted(tmp_path: Path) -> Scripted:
    """`scripted(name, seconds)` -> a contender that says each answer took so long, whatever it was asked."""

    def make(name: str, seconds: float = 1.0, dies_at: int = -1, short_at: int = -1) -> Contender:
        path = tmp_path / name
        path.write_text(
            SCRIPTED.format(python=sys.executable, seconds=seconds, dies_at=dies_at, short_at=short_at)
        )
        path.chmod(0o755)
        return Contender(name, path, {"engine": name, "threads": 1})

    return make


def compare(contenders: list[Contender], tmp_path: Path, rounds: int = 1) -> tuple[dict[str, Any], list[str]]:
    """The report, and the parts as they were announced."""
    parts: list[str] = []
    comparison = Comparison(contenders, CASES, 1000, tmp_path / "logs", parts.append)
    for number in range(rounds):
        comparison.take_round(number)
    names = [c.name for c in contenders]
    report = {"threads": 1, "rounds": rounds, **comparison.measured.as_dict(names)}
    return report, parts


def printed(report: dict[str, Any]) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table(report))
    return capture.get()


# ---------------------------------------------------------------- the work


def test_prompts_are_as_long_as_said_and_differ_in_every_round() -> None:
    first, second = (BATCH.token_ids(seed, 1000) for seed in ("0", "1"))
    assert [len(prompt) for prompt in first] == [5, 5]
    assert len({tuple(prompt[:2]) for prompt in first + second}) == 4
    assert first == BATCH.token_ids("0", 1000)


def test_a_rate_counts_the_tokens_that_are_the_work() -> None:
    assert (BATCH.counted_tokens, PREFILL.counted_tokens) == (16, 40)


def test_every_batch_size_is_warmed_up_and_one_long_prompt() -> None:
    cases = peers.cases_of((1, 64), 64, (4096, 1024))
    assert warm_ups(cases) == [Case(1, 10, 4), Case(64, 10, 4), Case(1, 1024, 1)]


# ---------------------------------------------------------------- rounds


def test_ratios_and_start_up_come_from_every_round(scripted: Scripted, tmp_path: Path) -> None:
    report, _ = compare([scripted(OURS, 0.5), scripted("slow", 2.0)], tmp_path, rounds=2)
    batch, prefill = report["cases"]
    assert batch["tokens_per_s"][OURS]["median"] == 16 / 0.5
    assert prefill["tokens_per_s"]["slow"]["median"] == 40 / 2.0
    assert batch["ours_over"] == {"slow": {"median": 4.0, "low": 4.0, "high": 4.0}}
    assert batch["same_first_tokens"] == {"slow": 1.0}
    assert report["startup_s"].keys() == {OURS, "slow"}
    assert all(spread["low"] > 0 for spread in report["startup_s"].values())
    assert failures(report) == []


def test_peers_take_turns_within_a_case_and_begin_in_turns(scripted: Scripted, tmp_path: Path) -> None:
    _, parts = compare([scripted(OURS), scripted("other")], tmp_path, rounds=2)
    assert parts == [
        f"{OURS}: start-up", "other: start-up",
        f"{OURS}: 2 at once", "other: 2 at once", f"{OURS}: prompt of 40", "other: prompt of 40",
        "other: start-up", f"{OURS}: start-up",
        "other: 2 at once", f"{OURS}: 2 at once", "other: prompt of 40", f"{OURS}: prompt of 40",
    ]  # fmt: skip


def test_a_peer_that_dies_keeps_its_rates_and_is_left_out_afterwards(
    scripted: Scripted, tmp_path: Path
) -> None:
    mortal = scripted("mortal", dies_at=WARM_UPS + 1)  # at the second case of the first round
    report, parts = compare([scripted(OURS), mortal], tmp_path, rounds=2)
    batch, prefill = report["cases"]
    assert "mortal" in batch["tokens_per_s"]
    assert "mortal" not in prefill["tokens_per_s"]
    assert OURS in prefill["tokens_per_s"]
    assert parts.count("mortal: start-up") == 1
    (line,) = failures(report)
    assert line.startswith("mortal: mortal ended: ValueError: out of luck")


def test_a_peer_that_makes_too_few_tokens_is_not_measured(scripted: Scripted, tmp_path: Path) -> None:
    report, _ = compare([scripted(OURS), scripted("lazy", short_at=WARM_UPS)], tmp_path)
    assert "lazy" not in report["cases"][0]["tokens_per_s"]
    assert failures(report) == ["lazy: lazy made 14 tokens for 2 prompts, 8 asked for each"]


def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"ghost does not start: .*no-python"):
        PeerProcess(tmp_path / "no-python", {"engine": "ghost", "threads": 1}, tmp_path / "ghost.log")


# ---------------------------------------------------------------- real engines


def settings_of(engine: str, model: Path) -> dict[str, Any]:
    shapes = [(1, 2), *((c.prompts, c.prompt_tokens + c.output_tokens) for c in CASES)]
    return {
        "engine": engine, "model": str(model), "dtype": "float32", "threads": 1, "cpus": [], "shapes": shapes,
    }  # fmt: skip


def living_in(session: int) -> dict[int, str]:
    """Processes of a session and what they do (T: stopped), without ended ones that nobody asked after."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended meanwhile
            state, _, _, sid = stat.read_text().rpartition(")")[2].split()[:4]
            if int(sid) == session and state != "Z":
                found[int(stat.parent.name)] = state
    return found


def are_stopped(session: int) -> bool:
    """All processes of a session; a signal takes a moment to arrive."""
    for _ in range(500):
        states = living_in(session).values()
        if states and set(states) == {"T"}:
            return True
        time.sleep(0.01)
    return False


def test_a_peer_that_is_not_asked_takes_no_time_from_others(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    with PeerProcess(Path(sys.executable), settings_of("omniserve", tiny_llama()), tmp_path / "log") as peer:
        assert are_stopped(peer._process.pid)
        peer.generate(BATCH.token_ids("0", 500), 8)
        assert are_stopped(peer._process.pid)


def test_ours_and_transformers_answer_the_same_over_the_protocol(
    tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    """Whole texts: both ignore the end of text, and give exactly what was asked for."""
    prompts = BATCH.token_ids("0", 500)
    answers = []
    for engine in ("omniserve", "transformers"):
        settings = settings_of(engine, tiny_llama())
        with PeerProcess(Path(sys.executable), settings, tmp_path / "log") as peer:
            seconds, outputs = peer.generate(prompts, 8)
            assert seconds > 0
            assert peer.busy_s() > 0
            answers.append(outputs)
            session = peer._process.pid
            assert living_in(session)
        assert not living_in(session)
    assert answers[0] == answers[1]


def test_a_missing_peer_is_said_and_the_others_are_measured(
    tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def model() -> Path:
        return tiny_llama()

    monkeypatch.setattr(peer_setup, "PEERS_FOLDER", tmp_path)
    monkeypatch.setattr(peer_setup, "safetensors_model", model)
    absent = Environment("absent", "/no/such/engine.whl")
    monkeypatch.setitem(peers.PEERS, OURS, peers.Peer("omniserve", "float32", peers.own_python, model))
    monkeypatch.setitem(peers.PEERS, "vllm", peers.Peer("vllm", "float32", absent.python, model))
    monkeypatch.setattr(peers, "cases_of", lambda *_: list(CASES))
    out = tmp_path / "new" / "peers.json"
    assert peers.main(["--rounds", "1", "--threads", "1", "--peers", "vllm", "--out", str(out)]) == 1
    report = json.loads(out.read_text())
    assert report["cases"][0]["tokens_per_s"].keys() == {OURS}
    assert "/no/such/engine.whl cannot be installed" in report["peers"]["vllm"]["failure"]
    shown = capsys.readouterr().out
    assert "missing" in shown
    assert "vllm: /no/such/engine.whl cannot be installed: ERROR:" in shown


# ---------------------------------------------------------------- what is needed, what is shown


def test_the_table_shows_medians_ratios_and_who_is_missing(scripted: Scripted, tmp_path: Path) -> None:
    report, _ = compare([scripted(OURS, 0.5), scripted("slow", 2.0)], tmp_path)
    report["peers"]["absent"] = {"version": None, "failure": "absent cannot be installed"}
    text = printed(report)
    assert "32 (32 to 32)" in text
    assert "4.00x" in text
    (row,) = [line for line in text.splitlines() if "absent" in line]
    assert "missing" in row
    assert failures(report) == ["absent: absent cannot be installed"]
    assert "first tokens like ours, mean of cases: slow 100%" in checks(report)


def test_a_float32_gguf_holds_the_same_numbers_and_fields(tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
    from gguf.quants import dequantize, quantize

    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    writer = GGUFWriter(tmp_path / "q8.gguf", arch="llama")
    writer.add_context_length(123)
    writer.add_token_list(["a", "b"])
    writer.add_file_type(7)
    quantised = quantize(values, GGMLQuantizationType.Q8_0)
    writer.add_tensor("w", quantised, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    peer_setup.write_float32_gguf(GGUFReader(tmp_path / "q8.gguf"), tmp_path / "f32.gguf")
    made = GGUFReader(tmp_path / "f32.gguf")
    (tensor,) = made.tensors
    assert tensor.tensor_type == GGMLQuantizationType.F32
    np.testing.assert_array_equal(tensor.data, dequantize(quantised, GGMLQuantizationType.Q8_0))
    contents = {name: made.fields[name].contents() for name in made.fields}
    assert contents["llama.context_length"] == 123
    assert contents["tokenizer.ggml.tokens"] == ["a", "b"]
    assert contents["general.file_type"] == 0


def test_busy_time_of_a_process_holds_that_of_its_children() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True); input()"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert tree_busy_s(process.pid) >= 0.3
        process.communicate(b"\n")


def test_the_last_line_that_says_something() -> None:
    assert last_line("Traceback:\n  x\nValueError: y\n\n") == "ValueError: y"
    assert last_line("") == "it printed nothing"


@pytest.mark.parametrize("flags", [["--rounds", "0"], ["--concurrency", "0"], ["--threads", "100000"]])
def test_settings_out_of_range_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        peers.main(flags)
    assert end.value.code == 2
    assert flags[0] in capsys.readouterr().err
