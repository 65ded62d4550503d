"""Flags become the load they say, and records the figures they say."""

from __future__ import annotations

import argparse
import json
import math
import re
from itertools import islice, pairwise
from pathlib import Path

import httpx
import pytest

from omniserve.bench.attainment import Outcome, Record
from omniserve.bench.http_api import check, error_text, retry_after_s
from omniserve.bench.http_load import PROBE, Known, make_load
from omniserve.bench.http_plot import reached
from omniserve.bench.http_report import Goal, class_figures, read_goal, sender_late
from omniserve.bench.http_target import Answer
from omniserve.bench.load import Cancelled, Load, Refused, Usage
from omniserve.bench.workloads import Arrival
from omniserve.commands.bench import add_parser
from omniserve.errors import ConfigError, OmniServeError

LS, BE = "latency_sensitive", "best_effort"


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return parser.parse_args(["bench", *flags])


def load(*flags: str, known: Known | None = None) -> Load:
    return make_load(parse(*flags), known or Known(), is_length_fixed=True)


def chats(*flags: str, known: Known | None = None) -> list[Arrival]:
    return list(load(*flags, known=known).streams[0].arrivals)


# ---------------------------------------------------------------- what is sent


def test_without_a_rate_all_arrive_at_once() -> None:
    arrivals = chats("--num-prompts", "3", "--random-input-len", "7", "--random-output-len", "5")
    assert arrivals == [Arrival(0.0, 7, 5)] * 3
    assert load("--num-prompts", "3").streams[0].is_closed_loop is False


def test_without_a_rate_and_with_few_places_the_loop_is_closed() -> None:
    assert load("--max-concurrency", "4").streams[0].is_closed_loop is True
    assert load("--max-concurrency", "4", "--request-rate", "2").streams[0].is_closed_loop is False


def test_a_rate_gives_poisson_arrivals_and_infinite_burstiness_constant_ones() -> None:
    drawn = [a.at_s for a in chats("--request-rate", "10", "--num-prompts", "2000")]
    assert drawn[-1] == pytest.approx(200, rel=0.1)
    constant = [a.at_s for a in chats("--request-rate", "10", "--num-prompts", "5", "--burstiness", "inf")]
    assert [b - a for a, b in pairwise([0.0, *constant])] == pytest.approx([0.1] * 5)


def test_the_seed_fixes_times_and_lengths() -> None:
    flags = ["--request-rate", "5", "--num-prompts", "50", "--random-range-ratio", "0.9"]
    assert chats(*flags) == chats(*flags)
    assert chats(*flags) != chats(*flags, "--seed", "1")


def test_random_lengths_fill_their_range() -> None:
    flags = ["--random-input-len", "100", "--random-range-ratio", "0.2", "--num-prompts", "2000"]
    prompts = {a.num_prompt for a in chats(*flags)}
    assert (min(prompts), max(prompts)) == (80, 120)


def test_a_duration_leaves_out_what_would_come_later() -> None:
    arrivals = chats("--request-rate", "10", "--duration", "3")
    assert 15 < len(arrivals) < 45
    assert arrivals[-1].at_s < 3


def test_requests_are_cut_to_the_context_of_the_model() -> None:
    cut = load("--num-prompts", "1", "--be-backlog", "1", known=Known(max_model_len=600))
    (chat,) = cut.streams[0].arrivals
    assert (chat.num_prompt, chat.num_output) == (472, 128)
    assert cut.backlog is not None
    assert max(sum(size) for size in islice(cut.backlog.sizes, 500)) == 600


def trace_file(folder: Path) -> str:
    path = folder / "burstgpt.csv"
    path.write_text(
        "Timestamp,Request tokens,Response tokens\n" + "".join(f"{2 * i},9,{i + 1}\n" for i in range(5))
    )
    return str(path)


def test_a_trace_is_replayed_at_its_own_times_or_in_its_rhythm_at_a_rate(tmp_path: Path) -> None:
    flags = ["--dataset-name", "burstgpt", "--dataset-path", trace_file(tmp_path)]
    assert [(a.at_s, a.num_output) for a in chats(*flags)] == [(2.0 * i, i + 1) for i in range(5)]
    assert [a.at_s for a in chats(*flags, "--request-rate", "2")] == [0.5 * i for i in range(5)]
    assert len(chats(*flags, "--num-prompts", "2")) == 2


def test_a_trace_may_give_the_lengths_alone(tmp_path: Path) -> None:
    flags = ["--dataset-name", "burstgpt", "--dataset-path", trace_file(tmp_path), "--no-self-timed"]
    constant = ["--request-rate", "4", "--burstiness", "inf"]
    assert chats(*flags, *constant) == [Arrival((i + 1) / 4, 9, i + 1) for i in range(5)]


def test_azure_without_a_file_is_the_trace_that_comes_with_the_package() -> None:
    assert chats("--dataset-name", "azure", "--num-prompts", "2")[1] == Arrival(4.314579, 396, 109)


def test_sharegpt_without_a_file_has_its_lengths_fitted() -> None:
    arrivals = chats("--dataset-name", "sharegpt", "--num-prompts", "4000")
    assert sum(a.num_output for a in arrivals) / 4000 == pytest.approx(338, rel=0.1)


def test_best_effort_streams_and_probes_go_on_in_the_background() -> None:
    found = load("--be-request-rate", "4", "--be-burstiness", "inf", "--probe-request-rate", "2")
    by_class = {stream.service_class: list(islice(stream.arrivals, 3)) for stream in found.background}
    assert [a.at_s for a in by_class[BE]] == [0.25, 0.5, 0.75]
    assert {a.num_output for a in by_class[PROBE]} == {1}
    assert found.backlog is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--be-backlog", "2", "--be-batch-lines", "3"], "not allowed with"),
        (["--request-rate", "0"], "must be a number above 0 or inf, got '0'"),
        (["--be-backlog", "1.5"], "must be a number above 0, got '1.5'"),
        (["--extra-body", "[1]"], "must be a JSON object"),
        (["--percentile-metrics", "ttft,speed"], "must be of ttft,tpot,itl,e2el"),
        (["--metric-percentiles", "50,101"], "must be numbers from 0 to 100, got '101'"),
        (["--random-range-ratio", "1"], r"must be a number in \[0, 1\)"),
    ],
)
def test_flags_that_can_not_be_are_refused_by_name(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(*flags)
    assert re.search(message, capsys.readouterr().err)


# ---------------------------------------------------------------- what is reported


def record(due_s: float, token_s: list[float], outcome: Outcome = "finished", kind: str = LS) -> Record:
    return Record(kind, due_s, 10, len(token_s), due_s, token_s, outcome)


RECORDS = [
    record(0.0, [0.5, 0.75, 1.0]),  # TTFT 500 ms, TPOT 250 ms
    record(1.0, [2.0, 2.25, 2.5, 4.0]),  # TTFT 1000 ms, TPOT 667 ms: the last of all
    record(2.0, [], "refused"),
    record(0.0, [3.0, 3.5], kind=BE),
    record(1.0, [3.75], "unfinished", kind=BE),
]


def test_goodput_is_requests_per_second_that_met_every_target_given() -> None:
    for goal, good in ((Goal(0.5, 0.25), 1), (Goal(ttft_s=1.0), 2), (Goal(tpot_s=0.1), 0)):
        figures = class_figures(RECORDS, LS, 4.0, goal, [50])
        assert figures["request_goodput"] == pytest.approx(good / 4)
        assert figures["attained_offered"]["both"] == pytest.approx(good / 3)
        assert figures["attained_admitted"]["both"] == pytest.approx(good / 2)


def test_figures_have_the_names_and_units_of_vllm() -> None:
    figures = class_figures(RECORDS, LS, 4.0, None, [0, 99])
    assert (figures["completed"], figures["num_prompts"], figures["outcomes"]["refused"]) == (2, 3, 1)
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (20, 7)
    assert (figures["request_throughput"], figures["output_throughput"]) == pytest.approx((0.5, 1.75))
    assert figures["total_token_throughput"] == pytest.approx(27 / 4)
    assert (figures["mean_ttft_ms"], figures["std_ttft_ms"]) == (750.0, 250.0)
    assert (figures["p0_tpot_ms"], figures["p99_tpot_ms"]) == (250.0, pytest.approx(2000 / 3))
    assert figures["median_itl_ms"] == 250.0
    assert (figures["p0_e2el_ms"], figures["p99_e2el_ms"]) == (1000.0, 3000.0)


def test_tokens_of_best_effort_requests_that_were_cut_off_count_and_the_requests_do_not() -> None:
    figures = class_figures(RECORDS, BE, 4.0, Goal(ttft_s=3.0), [50])
    assert figures["total_output_tokens"] == 3
    assert figures["completed"] == 1
    assert figures["attained_offered"] == {"requests": 1, "ttft": 1.0, "tpot": 1.0, "both": 1.0}


def test_the_server_s_own_count_of_prompts_is_compared_with_what_was_asked_for() -> None:
    counted = record(0.0, [0.5])
    counted.counted_prompt = 12
    figures = class_figures([counted, *RECORDS[:2]], LS, 4.0, None, [50])
    assert (figures["prompts_counted_by_server"], figures["prompts_of_other_length"]) == (1, 1)
    assert figures["total_input_tokens"] == 12 + 10 + 10


def test_a_class_of_which_nothing_came_has_no_latencies() -> None:
    figures = class_figures([record(0.0, [], "failed")], LS, 1.0, Goal(), [99])
    assert (figures["mean_ttft_ms"], figures["p99_e2el_ms"], figures["request_goodput"]) == (None, None, 0.0)
    assert json.loads(json.dumps(figures)) == figures


def test_what_the_sender_lost_is_said() -> None:
    late = record(1.0, [3.0])
    late.sent_s = 1.5
    assert sender_late([record(0.0, [1.0]), late]) == {"late_p99_s": 0.5, "late_max_s": 0.5}
    assert sender_late([]) == {}


def test_the_curve_of_a_class_ends_at_the_share_that_finished() -> None:
    one_token, broken = record(3.0, [3.25]), record(3.0, [3.1, 3.2], "failed")
    records = [*RECORDS[:3], one_token, broken]
    assert reached(records, "ttft_s") == ([0.25, 0.5, 1.0], [0.2, 0.4, 0.6])
    assert reached(records, "tpot_s") == ([0.25, pytest.approx(2 / 3)], [0.25, 0.5])


def test_goals_are_read_in_milliseconds() -> None:
    assert read_goal(["ttft:500", "tpot:80.5"]) == Goal(0.5, 0.0805)
    assert read_goal(["tpot:80"]) == Goal(math.inf, 0.08)
    assert read_goal([]) is None


@pytest.mark.parametrize("words", [["ttft"], ["ttft:0"], ["ttft:nan"], ["ttft:1", "ttft:2"], ["itl:5"]])
def test_goals_that_mean_nothing_are_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^be-goodput: "):
        read_goal(words, "be-goodput")


# ---------------------------------------------------------------- what servers say


def event(chunk: object) -> bytes:
    return f"data: {json.dumps(chunk)}\n\n".encode()


def text(content: str, reason: str | None = None) -> bytes:
    return event({"choices": [{"text": content, "finish_reason": reason}]})


def delta(reason: str | None = None, **fields: str) -> bytes:
    return event({"choices": [{"delta": fields, "finish_reason": reason}]})


@pytest.mark.parametrize(
    ("is_chat", "received", "count"),
    [
        (False, text("a"), 1),
        (False, text(""), 1),  # half a character
        (False, text("", "stop"), 0),
        (False, text("a", "length"), 1),
        (False, text("a") + text("b"), 2),
        (False, event({"choices": [], "usage": None}), 0),
        (True, delta(role="assistant", content=""), 0),
        (True, delta(content="a"), 1),
        (True, delta(content=""), 1),
        (True, delta(reasoning_content="a"), 1),
        (True, delta("stop"), 0),
    ],
)
def test_a_chunk_stands_for_a_token_or_not(is_chat: bool, received: bytes, count: int) -> None:
    assert Answer(is_chat).feed(received) == count


def test_an_answer_ends_with_its_reason_or_with_the_word_for_it() -> None:
    for end in (text("a", "length"), b"data: [DONE]\n\n"):
        answer = Answer(is_chat=False)
        answer.feed(text("a"))
        with pytest.raises(OmniServeError, match="in the middle of the answer"):
            answer.check_ended()
        answer.feed(end)
        answer.check_ended()


def test_the_last_usage_is_the_one_that_counts() -> None:
    """vLLM can send one with every chunk."""
    answer = Answer(is_chat=False)
    for n in (1, 2):
        answer.feed(event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": n}}))
    assert answer.usage == Usage(7, 2)


@pytest.mark.parametrize(
    ("received", "error", "message"),
    [
        (event({"error": {"message": "gone"}}), OmniServeError, "error in mid-stream: gone"),
        (b"data: {broken\n\n", OmniServeError, "no JSON object"),
        (b"data: 3\n\n", OmniServeError, "no JSON object"),
        (text("", "abort"), Cancelled, "finish_reason 'abort'"),
    ],
)
def test_what_breaks_an_answer_is_named(received: bytes, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Answer(is_chat=False).feed(received)


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (b'{"error": {"message": "no room", "code": "full"}}', "full: no room"),
        (b'{"message": "no room", "code": 429}', "429: no room"),
        (b'{"error": "no room"}', "no room"),
        (b"<html>bad gateway</html>", "<html>bad gateway</html>"),
        (b"[1]", "[1]"),
        (b"", ""),
    ],
)
def test_errors_are_read_however_they_are_wrapped(body: bytes, shown: str) -> None:
    assert error_text(body) == shown


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "9"}, 9.0),
        ({"retry-after": "86400"}, 120.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
        ({"retry-after": "-1"}, None),
        ({}, None),
    ],
)
def test_how_long_to_stay_away_is_read_from_either_header(
    headers: dict[str, str], seconds: float | None
) -> None:
    assert retry_after_s(headers) == seconds


@pytest.mark.parametrize(
    ("status", "error"), [(429, Refused), (503, Refused), (529, Refused), (404, OmniServeError)]
)
def test_no_room_is_told_from_every_other_no(status: int, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"/v1/x: {status} no"):
        check(httpx.Response(status, json={"error": {"message": "no"}}), "/v1/x")
    check(httpx.Response(200), "/v1/x")
