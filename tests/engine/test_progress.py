"""Texts grow token by token: stop strings wherever they fall, n texts side by side, log probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniserve.engine.messages import Token
from omniserve.engine.progress import Progress
from omniserve.model.tokenizer import Tokenizer
from omniserve.types import Logprob, RequestOutput, SamplingParams, TokenLogprobs


@pytest.fixture(scope="module")
def bytewise(tiny_llama: Callable[..., Path]) -> Tokenizer:
    """One token for each byte of UTF-8."""
    return Tokenizer(tiny_llama())


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return Tokenizer(smollm2_path)


def push_all(tokenizer: Tokenizer, ids: Sequence[int], **params: Any) -> list[RequestOutput]:
    """Outputs token by token until the text ends; the last token has the finish reason "length"."""
    progress = Progress(tokenizer, "r", [1], SamplingParams(max_tokens=1000, **params), 0.0)
    outputs = []
    for i, token in enumerate(ids):
        reason = "length" if i == len(ids) - 1 else None
        progress.push(Token(0, token, finish_reason=reason), 0.0)
        outputs.append(progress.output())
        if progress.is_finished:
            break
    return outputs


def ending(outputs: Sequence[RequestOutput]) -> tuple[str, str | None, int | str | None]:
    last = outputs[-1].outputs[0]
    return last.text, last.finish_reason, last.stop_reason


# ---------------------------------------------------------------- stop strings


def test_a_stop_string_across_tokens_is_found(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("The quick brown fox jumps over")
    outputs = push_all(smollm2, ids, stop="ck brown f")
    assert ending(outputs) == ("The qui", "stop", "ck brown f")
    assert len(outputs[-1].token_ids) < len(ids)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("aaab", ["aab"], "a"),  # the first try at the match fails in its middle
        ("abcabd", ["abd", "cab"], "ab"),  # overlapping: the earlier ends first
        ("one two", ["two"], "one "),  # at the very end
        ("one two", ["one"], ""),  # at the very beginning
        ("say 🙂 now", ["🙂"], "say "),  # four tokens make one character
        ("say 🙂 now", ["\N{COMBINING ACUTE ACCENT}", "y 🙂 n"], "sa"),
        ("naïve", ["ïv"], "na"),
    ],
)
def test_stop_strings_end_the_text_before_them(
    bytewise: Tokenizer, text: str, stop: list[str], expected: str
) -> None:
    shown, reason, why = ending(push_all(bytewise, bytewise.encode(text), stop=stop))
    assert (shown, reason) == (expected, "stop")
    assert why in stop


def test_half_a_character_at_the_end_is_no_match_for_a_whole_one(bytewise: Tokenizer) -> None:
    outputs = push_all(bytewise, bytewise.encode("ab🙂")[:-1], stop="🙂")
    assert ending(outputs) == ("ab\N{REPLACEMENT CHARACTER}", "length", None)


def plain_stop(text: str, stops: Sequence[str], min_tokens: int) -> tuple[str, str | None]:
    """Text and stop string when each character is a token: the first moment at which a stop string that ends
    behind the first `min_tokens` characters is complete."""
    for length in range(min_tokens + 1, len(text) + 1):
        found = [(length - len(s), s) for s in stops if text[:length].endswith(s)]
        if found:
            at, stop = min(found, key=lambda f: f[0])
            return text[:at], stop
    return text, None


@given(
    text=st.text(alphabet="ab", min_size=1, max_size=30),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=3, unique=True),
    min_tokens=st.integers(0, 8),
)
@settings(max_examples=300, deadline=None)
def test_any_stop_strings_cut_as_a_plain_search_does_and_text_once_given_never_shrinks(
    bytewise: Tokenizer, text: str, stops: list[str], min_tokens: int
) -> None:
    outputs = push_all(bytewise, bytewise.encode(text), stop=stops, min_tokens=min_tokens)
    expected, why = plain_stop(text, stops, min_tokens)
    assert ending(outputs) == (expected, "length" if why is None else "stop", why)
    assert all(expected.startswith(output.text) for output in outputs)


def test_a_stop_string_or_token_stays_in_the_text_if_asked(bytewise: Tokenizer) -> None:
    ids = bytewise.encode("abcdef")
    kept = push_all(bytewise, ids, stop="cd", include_stop_str_in_output=True)
    assert ending(kept) == ("abcd", "stop", "cd")
    assert [o.text for o in kept] == ["a", "ab", "abc", "abcd"], "nothing is held back"
    for keep, expected in ((False, "ab"), (True, "abc")):
        params = SamplingParams(stop_token_ids=[ids[2]], include_stop_str_in_output=keep)
        progress = Progress(bytewise, "r", [1], params, 0.0)
        for token in ids[:2]:
            progress.push(Token(0, token), 0.0)
        progress.push(Token(0, ids[2], finish_reason="stop"), 0.0)
        (output,) = progress.output().outputs
        assert (output.text, output.token_ids, output.stop_reason) == (expected, ids[:3], ids[2])


def test_special_tokens_are_shown_if_asked(bytewise: Tokenizer) -> None:
    ids = [*bytewise.encode("a"), 256, *bytewise.encode("b")]
    assert ending(push_all(bytewise, ids))[0] == "ab"
    assert ending(push_all(bytewise, ids, skip_special_tokens=False))[0] == "a<bos>b"


# ---------------------------------------------------------------- n texts


def test_texts_of_one_request_grow_and_end_each_for_itself(bytewise: Tokenizer) -> None:
    progress = Progress(bytewise, "r", [1], SamplingParams(n=3, stop="x"), 0.0)
    a, b, x = (bytewise.encode(c)[0] for c in "abx")
    progress.push(Token(0, b, by_lane=True), 1.0, index=2)
    progress.push(Token(0, a), 2.0, index=0)
    progress.push(Token(0, x), 3.0, index=0)
    output = progress.output()
    assert [c.index for c in output.outputs] == [0, 1, 2]
    assert [c.text for c in output.outputs] == ["a", "", "b"]
    assert [c.finish_reason for c in output.outputs] == ["stop", None, None]
    assert progress.has_ended(0)
    assert not progress.is_finished
    assert not output.finished
    assert (output.metrics.num_lane_tokens, output.metrics.ttft_s) == (1, 1.0)
    progress.push(Token(0, b), 4.0, index=0)
    assert progress.output().outputs[0].text == "a", "a token behind the end changes nothing"
    progress.push(Token(0, a, finish_reason="length"), 5.0, index=1)
    progress.abort()
    ended = progress.output()
    assert [c.finish_reason for c in ended.outputs] == ["stop", "length", "abort"]
    assert ended.finished


def test_an_output_once_given_stays_as_it_is(bytewise: Tokenizer) -> None:
    progress = Progress(bytewise, "r", [1], SamplingParams(n=2, logprobs=0), 0.0)
    (a,) = bytewise.encode("a")
    token = Token(0, a, logprobs=TokenLogprobs([a], [-1.0], 1))
    progress.push(token, 1.0)
    before = progress.output()
    progress.push(token, 2.0)
    progress.push(token, 3.0, index=1)
    progress.abort()
    assert [(c.text, len(c.token_ids), len(c.logprobs or ())) for c in before.outputs] == [
        ("a", 1, 1), ("", 0, 0)
    ]  # fmt: skip
    assert not before.finished
    assert [c.text for c in progress.output().outputs] == ["aa", "a"]


def test_times_of_a_request_are_the_first_start_and_token_and_the_last_token_of_its_texts(
    bytewise: Tokenizer,
) -> None:
    """From its arrival at 10, on any clock."""
    progress = Progress(bytewise, "r", [1], SamplingParams(n=2), 10.0, 11.0)
    (a,) = bytewise.encode("a")
    progress.push(Token(0, a, started_s=13.0), 15.0, index=1)
    progress.push(Token(0, a, started_s=14.0), 16.0, index=0)
    progress.push(Token(0, a, finish_reason="length"), 18.0, index=0)
    progress.push(Token(0, a, finish_reason="length"), 17.0, index=1)
    output = progress.output()
    each = [(m.queued_s, m.started_s, m.ttft_s, m.last_token_s) for m in (c.metrics for c in output.outputs)]
    assert each == [(1.0, 4.0, 6.0, 8.0), (1.0, 3.0, 5.0, 7.0)]
    found = output.metrics
    assert (found.queued_s, found.started_s, found.ttft_s, found.last_token_s) == (1.0, 3.0, 5.0, 8.0)


# ---------------------------------------------------------------- log probabilities


def test_log_probabilities_come_by_token_id_with_rank_text_and_sum(bytewise: Tokenizer) -> None:
    a, b, c = (bytewise.encode(x)[0] for x in "abc")
    progress = Progress(bytewise, "r", [a, b], SamplingParams(logprobs=2, prompt_logprobs=1), 0.0)
    prompt = [None, TokenLogprobs([b, b], [-0.25, -0.25], 1)]
    progress.push(
        Token(0, c, logprobs=TokenLogprobs([c, a, b], [-3.0, -0.5, -1.0], 7), prompt_logprobs=prompt), 0.0
    )
    progress.push(Token(0, a, logprobs=TokenLogprobs([a, a, c], [-0.5, -0.5, -2.0], 1)), 0.0)
    output = progress.output()
    (text,) = output.outputs
    assert output.prompt_logprobs == [None, {b: Logprob(-0.25, 1, "b")}]
    assert text.logprobs == [
        {c: Logprob(-3.0, 7, "c"), a: Logprob(-0.5, 1, "a"), b: Logprob(-1.0, 2, "b")},
        {a: Logprob(-0.5, 1, "a"), c: Logprob(-2.0, 2, "c")},
    ]
    assert [next(iter(position)) for position in text.logprobs or []] == [c, a], "the chosen token first"
    assert text.cumulative_logprob == -3.5
