"""The real `openai` client against a real server process."""

from __future__ import annotations

import asyncio
from pathlib import Path

import openai
import pytest

from server.processes import Served

HELLO = [{"role": "user", "content": "Hello"}]


def test_a_chat_is_answered_whole(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_completion_tokens=8, temperature=0, extra_body={"ignore_eos": True}
    )
    (choice,) = answer.choices
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "tiny"
    assert answer.service_tier == "default"
    assert (choice.index, choice.message.role, choice.finish_reason) == (0, "assistant", "length")
    assert choice.message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_a_streamed_chat_is_the_whole_one_in_pieces(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    *texts, last = chunks
    assert "".join(c.choices[0].delta.content or "" for c in texts) == whole.choices[0].message.content
    assert texts[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in texts[-2:]] == [None, whole.choices[0].finish_reason]
    assert all(c.usage is None for c in texts)
    assert (last.choices, last.usage.total_tokens) == ([], whole.usage.total_tokens)
    assert {c.id for c in chunks} == {chunks[0].id}


def test_streams_run_beside_each_other(server: Served) -> None:
    async def one(client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=12, temperature=0, stream=True
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream])

    async def all_of_them() -> list[str]:
        async with server.async_client() as client:
            return await asyncio.gather(*(one(client) for _ in range(8)))

    assert len(set(asyncio.run(all_of_them()))) == 1


def test_models_are_the_served_names(client: openai.OpenAI, tiny_model: Path) -> None:
    assert [m.id for m in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("alias").owned_by == "omniserve"
    card = client.models.retrieve("alias").model_dump()
    assert (card["root"], card["parent"], card["max_model_len"]) == (tiny_model.name, None, 512)
    with pytest.raises(openai.NotFoundError, match="does not exist") as caught:
        client.models.retrieve("gpt-9")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_the_server_says_that_it_lives_serves_and_what_it_is(server: Served) -> None:
    from omniserve import __version__

    assert server.get("/health").status_code == 200
    assert server.get("/ready").json() == {"status": "ready"}
    assert server.get("/version").json() == {"version": __version__}
    assert "omniserve:requests_total" in server.get("/metrics").text
