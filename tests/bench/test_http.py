"""The load generator against a real HTTP server whose answers follow a script."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

from bench.openai_server import Barrier, OpenAIServer, Script, Seen, running_server
from omniserve.bench.attainment import Record
from omniserve.bench.http_api import Api, Extras, make_client
from omniserve.bench.http_names import COMPLETIONS
from omniserve.bench.http_target import HttpTarget
from omniserve.bench.load import Backlog, Load, Sender, Stream
from omniserve.bench.prompts import UNMEASURED, Prompts
from omniserve.bench.workloads import Arrival
from omniserve.cli import main

LS, BE = "latency_sensitive", "best_effort"


@pytest.fixture(scope="module")
def running() -> Iterator[OpenAIServer]:
    with running_server() as server:
        yield server


@pytest.fixture
def server(running: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> OpenAIServer:
    """The one server of this module, as if it had just started."""
    fresh = OpenAIServer()
    for name in ("script", "models", "count_prompt", "seen", "batches", "files"):
        setattr(running, name, getattr(fresh, name))
    monkeypatch.setattr("omniserve.bench.http_setup.ASK_AGAIN_S", 0.01)
    monkeypatch.setattr("omniserve.bench.http_batch.POLL_S", 0.01)
    running.not_ready = running.running = running.most_running = 0
    running.lines_per_look, running.has_batches = 2, True
    return running


def chats(count: int, num_output: int = 3) -> Stream:
    return Stream(LS, [Arrival(0.002 * i, 8, num_output) for i in range(count)])


def send(server: OpenAIServer, load: Load, endpoint: str = COMPLETIONS) -> list[Record]:
    async def run() -> list[Record]:
        async with make_client(server.base_url, "secret") as client:
            extras = {LS: Extras(), BE: Extras("flex")}
            target = HttpTarget(client, Api("tiny", endpoint, True), Prompts(UNMEASURED), extras)
            return await Sender(target, load).run()

    return asyncio.run(run())


def one(server: OpenAIServer, script: Script, endpoint: str = COMPLETIONS, **load: Any) -> Record:
    server.script = lambda _: script
    (record,) = send(server, Load([chats(1)], 0.0, **load), endpoint)
    return record


# ---------------------------------------------------------------- one request


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_a_streamed_answer_is_counted_token_by_token(server: OpenAIServer, endpoint: str) -> None:
    record = one(server, Script(), endpoint)
    assert (record.outcome, len(record.token_s), record.counted_prompt) == ("finished", 3, 8)
    assert record.token_s == sorted(record.token_s)
    (seen,) = server.seen
    assert seen.path == endpoint
    assert seen.num_output == 3
    assert (seen.body["stream"], seen.body["stream_options"]) == (True, {"include_usage": True})
    assert (seen.body["ignore_eos"], seen.body["min_tokens"]) == (True, 3)
    assert seen.headers["authorization"] == "Bearer secret"


def test_several_tokens_in_a_chunk_are_counted_by_the_server_s_own_word(server: OpenAIServer) -> None:
    server.script = lambda _: Script(lump=4)
    (record,) = send(server, Load([chats(1, num_output=12)], 0.0))
    assert (record.outcome, len(record.token_s)) == ("finished", 12)
    assert len(record.itl_s) <= 2


def test_comments_before_the_answer_are_no_tokens(server: OpenAIServer) -> None:
    record = one(server, Script(prefix=": keep-alive\n\n: keep-alive\n\n"))
    assert (record.outcome, len(record.token_s)) == ("finished", 3)


def test_an_answer_without_usage_is_counted_by_its_chunks(server: OpenAIServer) -> None:
    record = one(server, Script(has_usage=False))
    assert (record.outcome, len(record.token_s), record.counted_prompt) == ("finished", 3, None)


@pytest.mark.parametrize(
    ("script", "outcome", "reason"),
    [
        (
            Script(429, {"code": "slo_unattainable", "message": "predicted 3 s"}),
            "refused",
            "429 slo_unattainable",
        ),
        (Script(503, {"message": "full"}), "refused", "503 full"),
        (Script(400, {"code": "bad", "message": "max_tokens: too long"}), "failed", "max_tokens: too long"),
        (Script(error_after=1), "failed", "engine_dead: the engine is gone"),
        (Script(cut_after=2), "failed", "RemoteProtocolError"),
        (Script(give_up_after=1), "cancelled", "abort"),
        (Script(stop_after=2), "failed", "ended after 2 of 3 tokens"),
    ],
    ids=["refused", "full", "bad", "error", "dropped", "given-up", "short"],
)
def test_what_goes_wrong_is_told_apart_and_named(
    server: OpenAIServer, script: Script, outcome: str, reason: str
) -> None:
    record = one(server, script)
    assert record.outcome == outcome
    assert reason in record.reason
    assert len(server.seen) == 1, "it was asked again"


def test_tokens_that_came_before_the_break_are_kept(server: OpenAIServer) -> None:
    assert len(one(server, Script(cut_after=2)).token_s) == 2


def test_a_server_that_says_nothing_has_timed_out(server: OpenAIServer) -> None:
    async def never() -> None:
        await asyncio.sleep(3600)

    record = one(server, Script(before=never), timeout_s=0.2)
    assert (record.outcome, record.token_s) == ("timed_out", [])


def test_no_server_is_a_failure_of_each_request(server: OpenAIServer) -> None:
    class Nobody:
        base_url = "http://127.0.0.1:9"

    (record,) = send(Nobody(), Load([chats(1)], 0.0))  # type: ignore[arg-type]
    assert record.outcome == "failed"
    assert "ConnectError" in record.reason


# ---------------------------------------------------------------- many


def test_the_loop_is_open_a_server_that_answers_nobody_gets_every_request(server: OpenAIServer) -> None:
    """It answers when all are there: a generator that waited for one before the next would wait for ever."""
    barrier = Barrier(40)
    server.script = lambda _: Script(before=barrier.wait)
    records = send(server, Load([chats(40)], 0.0, timeout_s=30.0))
    assert {r.outcome for r in records} == {"finished"}
    assert [r.due_s for r in records] == sorted(r.due_s for r in records)


def test_two_classes_in_one_run_are_told_apart_by_their_tier(server: OpenAIServer) -> None:
    seen = server.seen

    async def until_the_backlog_turned_over() -> None:
        while sum("service_tier" in s.body for s in seen) < 6:
            await asyncio.sleep(0.001)

    def script(request: Seen) -> Script:
        return Script() if "service_tier" in request.body else Script(before=until_the_backlog_turned_over)

    server.script = script
    records = send(server, Load([chats(1)], 0.0, Backlog(BE, 2, repeat((5, 2))), timeout_s=30.0))
    assert [r.outcome for r in records if r.service_class == LS] == ["finished"]
    batch = [r for r in records if r.service_class == BE]
    assert sum(r.outcome == "finished" for r in batch) >= 4
    tiers = {request.body.get("service_tier"): request.num_output for request in server.seen}
    assert tiers == {None: 3, "flex": 2}


def test_a_full_class_is_left_alone_for_as_long_as_it_asks(server: OpenAIServer) -> None:
    """Each of the two places asks once and then waits for longer than the load lasts."""
    refusal = Script(429, {"code": "resource_unavailable"}, {"retry-after-ms": "60000"})
    server.script = lambda request: refusal if "service_tier" in request.body else Script()
    records = send(server, Load([chats(20)], 0.0, Backlog(BE, 2, repeat((5, 2)))))
    assert [r.outcome for r in records if r.service_class == BE] == ["refused"] * 2
    assert {r.outcome for r in records if r.service_class == LS} == {"finished"}


def test_prompts_are_all_different_from_their_first_words(server: OpenAIServer) -> None:
    send(server, Load([chats(10)], 0.0))
    assert len({tuple(s.prompt.split()[:3]) for s in server.seen}) == 10


# ---------------------------------------------------------------- the command


def bench(server: OpenAIServer, folder: Path, *flags: str, status: int = 0) -> dict[str, Any]:
    """Run the command; its result file."""
    arguments = ["bench", "--base-url", server.base_url, "--result-dir", str(folder), "--save-detailed"]
    arguments += ["--result-filename", "result.json", "--random-input-len", "6", "--random-output-len", "3"]
    arguments += [] if "--tokenizer" in flags else ["--tokenizer", "none"]
    assert main([*arguments, *flags]) == status
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def test_a_run_gives_vllms_figures_for_each_class(server: OpenAIServer, tmp_path: Path) -> None:
    limits = ["--goodput", "ttft:60000", "tpot:60000"]
    flags = ["--num-prompts", "20", "--request-rate", "500", "--be-backlog", "2", "--be-context", "8", "12"]
    report = bench(server, tmp_path, *flags, *limits, "--metric-percentiles", "50,99.9")
    chat, batch = report["classes"][LS], report["classes"][BE]
    assert (chat["num_prompts"], chat["completed"], chat["outcomes"]) == (20, 20, {"finished": 20})
    assert (chat["total_input_tokens"], chat["total_output_tokens"]) == (120, 60)
    assert chat["request_goodput"] == pytest.approx(20 / report["duration"])
    assert chat["attained_offered"] == {"requests": 20, "ttft": 1.0, "tpot": 1.0, "both": 1.0}
    assert chat["mean_ttft_ms"] > 0
    assert chat["p50_tpot_ms"] <= chat["p99.9_tpot_ms"]
    assert batch["completed"] > 0
    assert (batch["attained_offered"], batch["request_goodput"]) == (None, None)
    assert "intended arrival" in report["definitions"]
    assert len(report["requests"]) == chat["num_prompts"] + batch["num_prompts"]


def test_refusals_are_misses_over_the_offered_and_not_over_the_admitted(
    server: OpenAIServer, tmp_path: Path
) -> None:
    refused = iter([False, *([True, False] * 10)])  # the first one only asks whether there is an answer
    server.script = lambda _: Script(429, {"code": "slo_unattainable"}) if next(refused) else Script()
    report = bench(server, tmp_path, "--num-prompts", "20", "--goodput", "ttft:60000")
    chat = report["classes"][LS]
    assert chat["outcomes"] == {"finished": 10, "refused": 10}
    assert (chat["attained_offered"]["both"], chat["attained_admitted"]["both"]) == (0.5, 1.0)
    assert chat["reasons"] == {"/v1/completions: 429 slo_unattainable": 10}


def test_a_trace_is_replayed_in_its_order_and_with_its_lengths(server: OpenAIServer, tmp_path: Path) -> None:
    trace = tmp_path / "mooncake.jsonl"
    rows = [(0, 4, 5), (4, 9, 2), (30, 7, 3), (60, 3, 4)]
    trace.write_text(
        "".join(
            json.dumps({"timestamp": t, "input_length": i, "output_length": o}) + "\n" for t, i, o in rows
        )
    )
    report = bench(server, tmp_path, "--dataset-name", "mooncake", "--dataset-path", str(trace))
    sent = [(r["due_s"], r["num_prompt"], len(r["token_s"])) for r in report["requests"]]
    assert sent == [(t / 1e3, i, o) for t, i, o in rows]
    times = [r["sent_s"] for r in report["requests"]]
    assert times == sorted(times)
    assert {(len(s.prompt.split()), s.num_output) for s in server.load()} == {(i, o) for _, i, o in rows}


def test_prompts_have_the_exact_length_by_the_tokenizer_of_the_model(
    server: OpenAIServer, tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    """The tiny model has a token for each byte."""
    server.count_prompt = len
    flags = ["--num-prompts", "5", "--random-range-ratio", "0.5", "--tokenizer", str(tiny_llama())]
    chat = bench(server, tmp_path, *flags)["classes"][LS]
    assert (chat["prompts_counted_by_server"], chat["prompts_of_other_length"]) == (5, 0)
    assert len({len(s.prompt) for s in server.load()}) > 1


def test_a_chat_template_counts_as_part_of_the_prompt(
    server: OpenAIServer, tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    around = len("<user>\n<assistant>")
    server.count_prompt = lambda text: len(text) + around
    flags = ["--num-prompts", "3", "--random-input-len", "40", "--tokenizer", str(tiny_llama())]
    chat = bench(server, tmp_path, *flags, "--endpoint", "/v1/chat/completions")["classes"][LS]
    assert (chat["total_input_tokens"], chat["prompts_of_other_length"]) == (120, 0)


def test_without_a_known_tokenizer_the_run_says_so_and_takes_the_server_s_count(
    server: OpenAIServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.models = [{"id": "chat", "root": "/nowhere/chat", "owned_by": "vllm"}]
    server.count_prompt = lambda text: 2 * len(text.split())
    arguments = ["bench", "--base-url", server.base_url, "--num-prompts", "2", "--random-input-len", "6"]
    assert main([*arguments, "--random-output-len", "2"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "no tokenizer for /nowhere/chat" in shown
    assert "2 of 2 prompts had another length for the server" in shown


def test_extra_fields_tiers_and_targets_go_with_their_class(server: OpenAIServer, tmp_path: Path) -> None:
    flags = ["--num-prompts", "2", "--be-request-rate", "2000", "--be-context", "8", "8"]
    flags += ["--extra-body", '{"priority": 0}', "--be-extra-body", '{"priority": 9}']
    flags += ["--service-tier", "priority", "--goodput", "ttft:1500", "tpot:80.5", "--slo-headers"]
    flags += ["--request-rate", "40"]
    bench(server, tmp_path, *flags)
    seen = {s.body["service_tier"]: s for s in server.load()}
    assert set(seen) == {"priority", "flex"}
    assert (seen["priority"].body["priority"], seen["flex"].body["priority"]) == (0, 9)
    assert seen["priority"].headers["x-slo-ttft-ms"] == "1500"
    assert seen["priority"].headers["x-slo-tpot-ms"] == "80.5"
    assert "x-slo-ttft-ms" not in seen["flex"].headers


def test_a_server_of_another_make_is_asked_for_no_fields_of_vllm_and_may_stop_early(
    server: OpenAIServer, tmp_path: Path
) -> None:
    server.models = [{"id": "gpt", "owned_by": "system"}]
    server.script = lambda _: Script(stop_after=1)
    report = bench(server, tmp_path, "--num-prompts", "4")
    assert report["server"]["backend"] == "openai"
    assert report["classes"][LS]["outcomes"] == {"finished": 4}
    assert not any("ignore_eos" in s.body or "min_tokens" in s.body for s in server.seen)


def test_no_more_requests_are_under_way_than_allowed(server: OpenAIServer, tmp_path: Path) -> None:
    report = bench(server, tmp_path, "--num-prompts", "30", "--max-concurrency", "3")
    assert report["classes"][LS]["completed"] == 30
    assert server.most_running <= 3
    late = [r["sent_s"] - r["due_s"] for r in report["requests"]]
    assert max(late) < 1e-3, "in a closed loop nobody planned an earlier arrival"


def test_probes_pass_by_the_limit_and_are_reported_apart(server: OpenAIServer, tmp_path: Path) -> None:
    """The one place is taken until two probes have come."""
    seen = server.seen

    async def until_two_probes_came() -> None:
        while sum(s.num_output == 1 for s in seen) < 3:  # the first one looked whether there is an answer
            await asyncio.sleep(0.001)

    server.script = lambda s: Script() if s.num_output == 1 else Script(before=until_two_probes_came)
    flags = ["--num-prompts", "1", "--max-concurrency", "1", "--probe-request-rate", "200"]
    classes = bench(server, tmp_path, *flags, "--request-timeout", "30")["classes"]
    assert classes[LS]["num_prompts"] == 1
    assert classes["probe"]["num_prompts"] >= 2


def test_the_warm_up_is_sent_before_and_not_measured(server: OpenAIServer, tmp_path: Path) -> None:
    report = bench(server, tmp_path, "--num-prompts", "3", "--num-warmups", "2")
    assert report["classes"][LS]["num_prompts"] == 3
    assert len(server.load()) == 5
    assert len({s.prompt for s in server.load()}) == 5


def test_best_effort_work_alone_lasts_as_long_as_it_should(server: OpenAIServer, tmp_path: Path) -> None:
    flags = ["--num-prompts", "0", "--duration", "3", "--be-backlog", "3", "--be-context", "8", "8"]
    report = bench(server, tmp_path, *flags)
    assert set(report["classes"]) == {BE}
    assert report["duration"] >= 3
    assert report["classes"][BE]["completed"] >= 1


# ---------------------------------------------------------------- batches


BATCH = ["--be-context", "8", "8", "--be-output-share", "0.5"]


def test_a_batch_alone_runs_to_its_end(server: OpenAIServer, tmp_path: Path) -> None:
    server.lines_per_look = 5
    report = bench(server, tmp_path, "--num-prompts", "0", "--be-batch-lines", "5", *BATCH)
    assert report["batch"]["status"] == "completed"
    assert report["batch"]["counts"] == {"total": 5, "completed": 5, "failed": 0}
    assert report["batch"]["output_tokens"] == 5 * 4
    lines = [json.loads(line) for line in server.files["file-in"].splitlines()]
    assert len({line["custom_id"] for line in lines}) == 5
    assert {line["url"] for line in lines} == {"/v1/completions"}
    assert not any("stream" in line["body"] for line in lines)


def test_a_batch_is_cancelled_when_the_chats_are_done_and_what_it_did_counts(
    server: OpenAIServer, tmp_path: Path
) -> None:
    async def until_the_batch_has_begun() -> None:
        while not server.batches.get("batch-1", {}).get("request_counts", {}).get("completed"):
            await asyncio.sleep(0.001)

    server.script = lambda s: Script() if s.num_output == 1 else Script(before=until_the_batch_has_begun)
    flags = ["--num-prompts", "1", "--be-batch-lines", "1000", "--request-timeout", "30"]
    report = bench(server, tmp_path, *flags, *BATCH)
    assert report["classes"][LS]["completed"] == 1
    assert report["batch"]["status"] == "cancelled"
    assert 0 < report["batch"]["output_tokens"] < 4000


def test_a_server_without_batches_ends_the_run_with_its_own_words(
    server: OpenAIServer, capsys: pytest.CaptureFixture[str]
) -> None:
    never = Script(before=asyncio.Event().wait)
    server.script = lambda s: Script() if s.num_output == 1 else never
    server.has_batches = False
    arguments = ["bench", "--base-url", server.base_url, "--tokenizer", "none", "--num-prompts", "1"]
    assert main([*arguments, "--random-input-len", "4", "--be-batch-lines", "2"]) == 1
    assert "/v1/files: 404 no such endpoint" in capsys.readouterr().err


# ---------------------------------------------------------------- before the load


def test_a_server_that_is_loading_is_waited_for(server: OpenAIServer, tmp_path: Path) -> None:
    server.not_ready = 3
    loading = iter([True, True])
    server.script = lambda _: Script(503, {"message": "loading"}) if next(loading, False) else Script()
    assert bench(server, tmp_path, "--num-prompts", "2")["classes"][LS]["completed"] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "big"], "model: the server has no 'big'; it has: tiny"),
        (["--goodput", "ttft:soon"], "goodput: ttft must be a number of milliseconds above 0, got 'soon'"),
        (["--goodput", "e2el:10"], "goodput: takes ttft:MS and tpot:MS"),
        (["--dataset-name", "burstgpt"], "dataset-path: burstgpt needs the file of its publisher"),
        (["--num-prompts", "0"], "num-prompts: .* give the load a --duration"),
        (["--tokenizer", "no-such-folder"], "no-such-folder"),
        (["--be-backlog", "1", "--be-context", "9", "8"], "context: must be a range"),
        (["--base-url", "127.0.0.1:8000"], "base-url: must begin with http:// or https://"),
        (["--base-url", "http://127.0.0.1:9"], "base-url: the server is not ready"),
    ],
)
def test_what_does_not_fit_ends_the_run_by_name_before_anything_is_sent(
    server: OpenAIServer, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    arguments = ["bench", "--base-url", server.base_url, "--ready-check-timeout-sec", "0"]
    arguments += [] if "--tokenizer" in flags else ["--tokenizer", "none"]
    assert main([*arguments, *flags]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert server.seen == []


def test_an_address_that_is_no_api_is_told_at_once(
    server: OpenAIServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.models = None  # type: ignore[assignment]
    assert main(["bench", "--base-url", server.base_url, "--tokenizer", "none"]) == 1
    assert "base-url: /v1/models there is none of OpenAI's" in capsys.readouterr().err


@pytest.mark.parametrize(
    "script", [Script(give_up_after=0), Script(cut_after=0)], ids=["given-up", "dropped"]
)
def test_a_first_request_that_breaks_off_ends_the_run_with_one_line(
    server: OpenAIServer, capsys: pytest.CaptureFixture[str], script: Script
) -> None:
    server.script = lambda _: script
    flags = ["--tokenizer", "none", "--ready-check-timeout-sec", "0"]
    assert main(["bench", "--base-url", server.base_url, *flags]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_error_of_the_first_request_ends_the_run_at_once(
    server: OpenAIServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script = lambda _: Script(401, {"code": "invalid_api_key", "message": "no such key"})
    assert main(["bench", "--base-url", server.base_url, "--tokenizer", "none"]) == 1
    assert "401 invalid_api_key: no such key" in capsys.readouterr().err
    assert len(server.seen) == 1


def test_a_run_in_which_nothing_was_finished_has_failed(server: OpenAIServer, tmp_path: Path) -> None:
    answers = iter([Script()])
    server.script = lambda _: next(answers, Script(400, {"message": "no"}))
    report = bench(server, tmp_path, "--num-prompts", "2", status=1)
    assert report["classes"][LS]["outcomes"] == {"failed": 2}
    assert report["classes"][LS]["mean_ttft_ms"] is None


def test_a_plot_is_drawn_even_of_a_run_with_few_requests(server: OpenAIServer, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plots" / "run.png"
    bench(server, tmp_path, "--num-prompts", "2", "--goodput", "ttft:500", "--plot", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
