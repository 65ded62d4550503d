"""Streams that are long, broken, cancelled or left: nobody waits for ever and nothing stays behind."""

from __future__ import annotations

import asyncio
import random

import openai
import pytest
from starlette.types import Message

from omniserve.server import answers
from omniserve.server.engine_keeper import STEADY_S
from server.scripted import CHAT, HELLO, ScriptedLLM, Stand, events, standing


def test_a_silent_stream_is_kept_open_by_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answers.COMMENT_EVERY_S == 15.0
    monkeypatch.setattr(answers, "COMMENT_EVERY_S", 0.01)

    async def story() -> None:
        async with standing() as stand, stand.streaming() as (response, lines):
            assert response.status_code == 200, "the status goes out with the first comment"
            seen = [await anext(lines) for _ in range(6)]
            assert seen[::2] == [": still here"] * 3
            stand.llm.go.set()
            rest = [line async for line in lines]
            texts = [e["choices"][0]["delta"].get("content", "") for e in events(rest)[:-1]]
            assert "".join(texts) == "xxxx", "comments do not disturb events"

    asyncio.run(story())


def test_the_last_events_and_the_end_of_the_answer_are_one_message() -> None:
    async def story() -> list[Message]:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        stream = answers.EventStream(send, {})
        await stream.push(b"data: 1\n\n")
        await stream.close(b"data: [DONE]\n\n")
        return sent

    start, first, last = asyncio.run(story())
    assert (start["status"], first["body"], first["more_body"]) == (200, b"data: 1\n\n", True)
    assert last == {"type": "http.response.body", "body": b"data: [DONE]\n\n"}


def test_an_engine_that_dies_in_mid_stream_is_told_in_the_stream() -> None:
    async def story() -> None:
        async with standing(before=2) as stand:
            client = openai.AsyncOpenAI(base_url=stand.base_url + "/v1", api_key="x", max_retries=0)
            async with client:
                stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
                await anext(stream)
                whole = asyncio.create_task(stand.chat())
                await stand.until(lambda: len(stand.llm.running) == 2)
                stand.llm.end.set()
                with pytest.raises(openai.APIError, match="engine ended"):
                    async for _ in stream:
                        pass
            answer = await whole
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
            await stand.until(lambda: len(stand.engines) == 2)
            stand.llm.go.set()
            await stand.until(lambda: stand.server.keeper.state == "ready")
            assert (await stand.chat()).status_code == 200, "another engine serves"
            assert stand.server.keeper.num_restarts == 1

    asyncio.run(story())


def test_an_operator_cancels_a_request_by_its_id() -> None:
    async def story() -> None:
        async with standing(before=1) as stand:
            whole = asyncio.create_task(stand.chat(headers={"x-request-id": "slow-one"}))
            async with stand.streaming() as (_, lines):
                answer_id = events([await anext(lines)])[0]["id"]
                await stand.until(lambda: len(stand.llm.running) == 2)
                for request_id in ("slow-one", answer_id):
                    answer = await stand.http.post(f"/admin/requests/{request_id}/cancel")
                    assert answer.json()["num_cancelled"] == 1
                told = events([line async for line in lines])
            assert told[-1]["error"]["code"] == "request_cancelled", "and no [DONE]"
            assert (await whole).status_code == 499
            assert not stand.llm.running
            assert (await stand.http.post("/admin/requests/slow-one/cancel")).status_code == 404

    asyncio.run(story())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_takes_its_request_with_it(stream: bool) -> None:
    async def story() -> None:
        async with standing() as stand:
            _, writer = await _open(stand, stream)
            await stand.until(lambda: stand.llm.running)
            writer.close()
            await stand.until(lambda: not stand.llm.running)
            await stand.until(lambda: stand.doors.count(best_effort=False) == 0)

    asyncio.run(story())


async def _open(stand: Stand, stream: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = stand.base_url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = b'{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "stream": %b}'
    body %= b"true" if stream else b"false"
    head = b"POST %b HTTP/1.1\r\nhost: [::1]\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    writer.write(head % (CHAT.encode(), len(body)) + body)
    await writer.drain()
    return reader, writer


def test_connections_dropped_at_any_moment_leave_nothing_behind() -> None:
    """Some before the request is read, some while it waits, some in its answer, some at its end; cancelled by
    the operator at the same time, too."""
    rng = random.Random(5)

    async def one(stand: Stand) -> None:
        _, writer = await _open(stand, rng.random() < 0.5)
        await asyncio.sleep(rng.random() * 0.05)
        if rng.random() < 0.2 and stand.llm.running:
            await stand.http.post(f"/admin/requests/{rng.choice(sorted(stand.llm.running))}/cancel")
        if rng.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()

    async def story() -> None:
        async with standing(before=2) as stand:
            before = len(asyncio.all_tasks())
            wave = asyncio.gather(*(one(stand) for _ in range(200)))
            await asyncio.sleep(0.03)
            stand.llm.go.set()
            await wave
            await stand.until(lambda: not stand.llm.running)
            await stand.until(lambda: stand.doors.count(best_effort=False) == 0)
            await stand.http.aclose()
            await stand.until(lambda: len(asyncio.all_tasks()) <= before)

    asyncio.run(story())


def test_a_server_that_stops_lets_chats_end_and_admits_nothing_more() -> None:
    async def story() -> None:
        async with standing(before=1) as stand:
            flex = asyncio.create_task(stand.chat(service_tier="flex"))
            async with stand.streaming() as (_, lines):
                await anext(lines)
                await stand.until(lambda: len(stand.llm.running) == 2)
                stand.server.stop()
                await stand.until(lambda: stand.doors.is_draining)
                refused = await stand.chat()
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_stopping")
                assert (await stand.http.get("/ready")).json() == {"status": "stopping"}
                # A stop does not wait for best-effort work; this one must not end by itself.
                stand.llm.before = 0
                stand.llm.go.set()
                assert [line async for line in lines][-2] == "data: [DONE]"
            assert (await flex).status_code in (200, 503)

    asyncio.run(story())


def test_chats_that_outlast_the_grace_time_are_told() -> None:
    async def story() -> None:
        async with standing(before=1, grace_s=0.01) as stand:
            async with stand.streaming() as (_, lines):
                await anext(lines)
                stand.server.stop()
                told = events([line async for line in lines])
            assert told[-1]["error"]["code"] == "server_stopping"

    asyncio.run(story())


def test_an_engine_that_ends_while_the_server_stops_is_followed_by_no_other() -> None:
    async def story() -> None:
        async with standing(before=1) as stand:
            async with stand.streaming() as (_, lines):
                await anext(lines)
                stand.server.stop()
                await stand.until(lambda: stand.doors.is_draining)
                stand.llm.end.set()
                told = events([line async for line in lines])
            assert told[-1]["error"]["code"] == "engine_unavailable"
            await stand.until(lambda: stand.server.keeper.state == "stopped")
            assert len(stand.engines) == 1

    asyncio.run(story())


def test_a_request_in_an_engine_that_ends_soon_after_its_start_is_not_to_be_sent_again_in_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ScriptedLLM, "deadly", "attack")
    attack = [{"role": "user", "content": "attack"}]

    async def story() -> None:
        async with standing(before=9) as stand:
            stand.server.keeper._up_s -= STEADY_S
            first = await stand.chat(messages=attack)
            await stand.until(lambda: len(stand.engines) == 2 and stand.server.keeper.state == "ready")
            again = await stand.chat(messages=attack)
            assert [a.status_code for a in (first, again)] == [503, 503]
            assert "x-should-retry" not in first.headers, "it may have been any other request"
            assert again.headers["x-should-retry"] == "false"

    asyncio.run(story())
