"""What requests may ask for: fields that are supported, ignored or refused, and wrong ones told by name."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from server.processes import Served

HELLO = [{"role": "user", "content": "Hello"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def chat(server: Served, **fields: Any) -> Any:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 4, "temperature": 0} | fields
    return server.post(CHAT, {name: value for name, value in body.items() if value is not ...})


def complete(server: Served, **fields: Any) -> Any:
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 4, "temperature": 0} | fields
    return server.post(COMPLETIONS, {name: value for name, value in body.items() if value is not ...})


def error_of(response: Any) -> tuple[int, str | None, str | None]:
    """Status, param and code of an answer in OpenAI's error shape, which is not wrapped twice."""
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    return response.status_code, error["param"], error["code"]


# ---------------------------------------------------------------- completions


def test_a_prompt_may_be_text_or_token_ids(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "max_tokens": 6, "temperature": 0}
    text = client.completions.create(prompt="Hello", **asked)
    ids = client.completions.create(prompt=list(_byte_ids("Hello")), **asked)
    assert text.object == "text_completion"
    assert text.choices[0].text == ids.choices[0].text


def _byte_ids(text: str) -> list[int]:
    """Of the byte tokenizer, whose alphabet is sorted by the characters that stand for bytes."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [alphabet.index(character) for character in text]


def test_each_prompt_of_a_list_has_n_choices_in_its_place(client: openai.OpenAI) -> None:
    prompts = ["Hello", "Good evening"]
    answer = client.completions.create(model="tiny", prompt=prompts, n=2, seed=7, max_tokens=6)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    alone = [client.completions.create(model="tiny", prompt=p, n=2, seed=7, max_tokens=6) for p in prompts]
    assert [c.text for c in answer.choices] == [c.text for one in alone for c in one.choices]
    assert answer.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)


def test_a_streamed_list_of_prompts_is_the_whole_one(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "prompt": ["Hello", "Bye"], "n": 2, "seed": 3, "max_tokens": 5, "echo": True}
    whole = client.completions.create(**asked)
    texts = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {c.index: c.text for c in whole.choices}
    assert texts[2].startswith("Bye")


def test_echo_scores_the_prompt_without_generating(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "prompt": "Hello", "max_tokens": 0, "echo": True, "logprobs": 2}
    whole = client.completions.create(**asked)
    (choice,) = whole.choices
    assert (choice.text, whole.usage.completion_tokens) == ("Hello", 0)
    scores = choice.logprobs
    assert "".join(scores.tokens) == "Hello"
    assert scores.text_offset == [0, 1, 2, 3, 4]
    assert [v is None for v in scores.token_logprobs] == [True, False, False, False, False]
    assert scores.top_logprobs[0] is None
    assert all(2 <= len(top) <= 3 for top in scores.top_logprobs[1:])
    (first, *_) = client.completions.create(**asked, stream=True)
    assert first.choices[0].logprobs.token_logprobs == scores.token_logprobs


def test_logprobs_of_a_chat_come_with_every_token(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 5, "temperature": 0}
    asked |= {"logprobs": True, "top_logprobs": 3, "extra_body": {"ignore_eos": True}}
    whole = client.chat.completions.create(**asked)
    content = whole.choices[0].logprobs.content
    assert len(content) == 5
    assert all(len(one.top_logprobs) == 3 for one in content)
    assert all(one.logprob == one.top_logprobs[0].logprob for one in content), "greedy: the likeliest"
    streamed = [
        one for chunk in client.chat.completions.create(**asked, stream=True)
        for one in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else ())
    ]  # fmt: skip
    assert [one.token for one in streamed] == [one.token for one in content]


# ---------------------------------------------------------------- fields


def test_text_parts_and_the_developer_role_mean_what_plain_text_and_system_do(server: Served) -> None:
    parts = [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief"}]
    plain = [{"role": "system", "content": "Be\nbrief"}, *HELLO]
    rich = [{"role": "developer", "content": parts}, *HELLO]
    texts = [chat(server, messages=m).json()["choices"][0]["message"]["content"] for m in (plain, rich)]
    assert texts[0] == texts[1]


def test_harmless_and_unknown_fields_are_named_in_a_header(server: Served) -> None:
    answer = chat(
        server, user="u", store=True, metadata={"a": "b"}, tools=[], parallel_tool_calls=True, wibble=1,
        messages=[{"role": "user", "content": "Hello", "name": "Ann"}], tool_choice="none",
    )  # fmt: skip
    assert answer.status_code == 200
    ignored = set(answer.headers["x-omniserve-ignored"].split(", "))
    tools = {"tools", "parallel_tool_calls", "tool_choice"}
    assert ignored == {"user", "store", "metadata", "wibble", "messages[].name"} | tools
    assert "x-omniserve-ignored" not in chat(server).headers
    chat(server, wibble=2)
    assert server.log.count("field wibble") == 1, "told once"


def test_unknown_keys_inside_fields_are_named_by_their_place(server: Served) -> None:
    part = {"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}, "absent": None}
    options = {"include_usage": True, "include_obfuscation": False, "absent": None}
    answer = chat(server, stream=True, stream_options=options, messages=[{"role": "user", "content": [part]}])
    ignored = answer.headers["x-omniserve-ignored"].split(", ")
    assert ignored == ["stream_options.include_obfuscation", "messages[].content[].cache_control"]
    options = {"include_usage": True, "wobble": 1}
    answer = complete(server, stream=True, stream_options=options)
    assert answer.headers["x-omniserve-ignored"] == "stream_options.wobble"
    assert server.log.count("field stream_options.wobble") == 1, "told in the log"


def test_names_of_unknown_fields_cannot_forge_headers(server: Served) -> None:
    messages = [{"role": "user", "content": "Hello", "\U00071ee8": 1}]
    answer = chat(server, **{"a\r\nset-cookie: b": 1, "é" * 100: 2, "messages": messages})
    assert answer.status_code == 200
    assert "set-cookie" not in answer.headers
    assert answer.headers["x-omniserve-ignored"] == "a??set-cookie??b, " + "?" * 64 + ", messages[].?"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("response_format", {"type": "json_object"}),
        ("functions", [{"name": "f"}]),
        ("modalities", ["text", "audio"]),
        ("chat_template", "x"),
        ("reasoning_effort", "high"),
        ("return_token_ids", True),
        ("return_tokens_as_token_ids", True),
        ("spaces_between_special_tokens", False),
    ],
)
def test_a_field_that_would_change_the_answer_is_refused_by_name(
    server: Served, field: str, value: object
) -> None:
    assert error_of(chat(server, **{field: value})) == (400, field, "unsupported_parameter")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": ...}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"temperature": "0"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e999}, None),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": ..., "max_completion_tokens": -5}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 2}, "n"),
        ({"n": 10**6}, "n"),
        ({"stop": [1]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"seed": 2**70}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"top_k": 2**31}, "top_k"),
        ({"top_k": 10**30}, "top_k"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"min_tokens": 10**30}, "min_tokens"),
        ({"stop_token_ids": [10**30]}, "stop_token_ids"),
        ({"logprobs": True, "top_logprobs": 10**30}, "top_logprobs"),
        ({"logit_bias": {"1" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {str(2**40): 1}}, "logit_bias"),
        ({"n": 10**30}, "n"),
        ({"priority": -(10**30)}, "priority"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"service_tier": "gold"}, "service_tier"),
        ({"service_tier": ["flex"]}, "service_tier"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"priority": 2**40}, "priority"),
        ({"model": 5}, "model"),
    ],
)
def test_a_wrong_value_is_named(server: Served, fields: dict[str, Any], param: str | None) -> None:
    if param is None:
        answer = server.post_raw(CHAT, b'{"model": "tiny", "messages": [], "temperature": 1e999}')
    else:
        answer = chat(server, **fields)
    status, found, _ = error_of(answer)
    assert (status, found) == (400, param)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"n": 0}, "invalid_value"),
        ({"n": 10**6}, "invalid_value"),
        ({"priority": 2**40}, "invalid_value"),
        ({"cache_salt": ""}, "invalid_value"),
        ({"messages": []}, "invalid_value"),
        ({"messages": [{"role": "tool", "content": ""}]}, "invalid_value"),
        ({"n": "1"}, "invalid_type"),
        ({"messages": ...}, "missing_required_parameter"),
    ],
)
def test_a_value_out_of_range_is_told_from_one_of_the_wrong_type(
    server: Served, fields: dict[str, Any], code: str
) -> None:
    assert error_of(chat(server, **fields))[2] == code


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ...}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [100000]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"logprobs": 10**30}, "logprobs"),
        ({"max_tokens": 10**30, "prompt": "x" * 5000}, "max_tokens"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
    ],
)
def test_a_wrong_completion_is_named(server: Served, fields: dict[str, Any], param: str) -> None:
    status, found, _ = error_of(complete(server, **fields))
    assert (status, found) == (400, param)


def test_null_is_as_good_as_nothing(server: Served) -> None:
    fields = dict.fromkeys(("stop", "seed", "user", "tools", "logprobs", "top_p", "stream", "service_tier"))
    answer = chat(server, **fields)
    assert answer.status_code == 200
    assert "x-omniserve-ignored" not in answer.headers


# ---------------------------------------------------------------- bodies


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"null", b'{"model": "\xff"}', b"[" * 100_000])
def test_a_malformed_body_is_told_as_such(server: Served, body: bytes) -> None:
    assert error_of(server.post_raw(CHAT, body)) == (400, None, "invalid_json")


def test_a_model_that_is_not_served_is_not_found(server: Served) -> None:
    assert error_of(chat(server, model="gpt-9")) == (404, "model", "model_not_found")
    assert chat(server, model="alias").json()["model"] == "alias"


def test_unknown_urls_and_methods_are_told_in_the_same_shape(server: Served) -> None:
    assert error_of(server.get("/v1/embeddings")) == (404, None, "unknown_url")
    assert error_of(server.get("/v2")) == (404, None, "unknown_url")
    answer = server.get(CHAT)
    assert error_of(answer) == (405, None, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize("num_bytes", [20_000, 10_000_000])
def test_an_overlong_prompt_is_refused_and_hurts_nobody(server: Served, num_bytes: int) -> None:
    long = [{"role": "user", "content": "word " * (num_bytes // 5)}]
    assert error_of(chat(server, messages=long)) == (400, "messages", "context_length_exceeded")
    assert error_of(complete(server, prompt="x" * num_bytes)) == (400, "prompt", "context_length_exceeded")
    assert chat(server).status_code == 200


def test_room_for_the_answer_counts_too(server: Served) -> None:
    assert error_of(complete(server, max_tokens=508)) == (400, "prompt", "context_length_exceeded")
    everything = complete(server, max_tokens=507, ignore_eos=True).json()
    assert everything["usage"]["total_tokens"] == 512
    open_ended = chat(server, max_tokens=..., ignore_eos=True).json()
    assert open_ended["usage"]["total_tokens"] == 512, "a chat without a limit has all that is left"


def test_a_prompt_that_leaves_no_room_to_score_it_is_told_how_much_can_be(server: Served) -> None:
    scored = complete(server, prompt="x" * 511, max_tokens=0, echo=True).json()
    assert scored["usage"]["completion_tokens"] == 0
    refused = complete(server, prompt="x" * 512, max_tokens=0, echo=True)
    assert error_of(refused) == (400, "prompt", "context_length_exceeded")
    message = refused.json()["error"]["message"]
    assert "it can score 511" in message
    assert "generate" not in message, "nothing was asked for"


def test_a_body_above_the_limit_is_refused(server: Served) -> None:
    body = b'{"model": "tiny", "prompt": "' + b"x" * 17 * 1024**2 + b'"}'
    assert error_of(server.post_raw(COMPLETIONS, body)) == (413, None, "request_too_large")
    pieces = (body[at : at + 65536] for at in range(0, len(body), 65536))
    assert error_of(server.post_raw(COMPLETIONS, pieces)) == (413, None, "request_too_large")


# ---------------------------------------------------------------- probes


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_may_ask_for_the_head_alone(server: Served, path: str) -> None:
    answer = httpx.head(server.base_url + path, timeout=10)
    assert (answer.status_code, answer.content) == (200, b"")


# ---------------------------------------------------------------- request ids


def test_a_request_id_goes_through_and_is_made_where_there_is_none(server: Served) -> None:
    assert server.get("/health", **{"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = server.get("/health").headers["x-request-id"]
    assert made.startswith("req_")
    assert server.get("/health", **{"x-request-id": "a b"}).headers["x-request-id"] != "a b"
    server.post(CHAT, {"model": "no"}, **{"x-request-id": "mine-2"})
    server.wait_until(lambda: "[mine-2]" in server.log, "log lines carry the id")


def test_prompts_are_not_logged(server: Served) -> None:
    chat(server, messages=[{"role": "user", "content": "a secret of mine"}])
    complete(server, prompt=["a secret of mine", 4])
    server.get("/health", **{"x-request-id": "after-the-secret"})
    server.wait_until(lambda: "after-the-secret" in server.log, "the log has come so far")
    assert "secret of mine" not in server.log
