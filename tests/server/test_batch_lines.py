"""Lines of batches over the endpoints' own code."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from omniserve.batch.line_runner import EngineGone, LineCancelled, LineResponse, is_not_now
from omniserve.batch.records import Usage
from omniserve.batch.runner import RunnerSettings
from omniserve.batch.suspicion import DEATHS_ALONE, DEATHS_AMONG_OTHERS
from omniserve.errors import EngineGoneBeforeError
from omniserve.server import engine_keeper
from omniserve.server.batch_lines import EndpointLines
from omniserve.server.gate import current_request_id
from omniserve.server.settings import ApiKey
from omniserve.server.tiers import Clamp
from server.scripted import CHAT, COMPLETIONS, HELLO, ScriptedLLM, Stand, standing

OWNER = "anonymous"
BODY = {"model": "tiny", "messages": HELLO, "max_tokens": 3}


def lines(stand: Stand) -> EndpointLines:
    return EndpointLines(stand.server.endpoints)


async def run(stand: Stand, body: dict[str, Any], endpoint: str = CHAT, left_s: float = 60.0) -> LineResponse:
    return await lines(stand).run_line(OWNER, endpoint, body, "batch_req_7", left_s)


def test_a_line_is_answered_as_the_endpoint_would_as_best_effort_work() -> None:
    async def story() -> None:
        async with standing(before=9) as stand:
            line = await run(stand, BODY | {"service_tier": "priority"}, left_s=90.0)
            flex = (await stand.chat(**BODY, service_tier="flex")).json()
            assert line.status_code == 200
            assert line.body["id"] == "chatcmpl-7"
            same = {"object", "model", "choices", "usage", "service_tier"}
            assert {k: line.body[k] for k in same} == {k: flex[k] for k in same}
            asked = stand.llm.asked[0]
            assert (asked["class"], asked["window"]) == ("best_effort", 90.0)
            text = await run(stand, {"prompt": "Hello", "max_tokens": 3}, COMPLETIONS)
            assert text.body["object"] == "text_completion"

    asyncio.run(story())


@pytest.mark.parametrize(
    ("endpoint", "body", "param"),
    [
        (CHAT, BODY | {"stream": True}, "stream"),
        (CHAT, BODY | {"temperature": "hot"}, "temperature"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        ("/v1/embeddings", {"input": "x"}, None),
    ],
)
def test_a_bad_line_has_its_error_as_an_answer(
    endpoint: str, body: dict[str, Any], param: str | None
) -> None:
    async def story() -> None:
        async with standing() as stand:
            answer = await run(stand, body, endpoint)
            assert (answer.status_code, answer.body["error"]["param"]) == (400, param)
            assert not is_not_now(answer)

    asyncio.run(story())


def test_a_line_whose_engine_dies_is_not_finished() -> None:
    async def story() -> None:
        async with standing() as stand:
            line = asyncio.create_task(run(stand, BODY))
            await stand.until(lambda: stand.llm.running)
            stand.llm.end.set()
            with pytest.raises(EngineGone):
                await line

    asyncio.run(story())


def test_a_line_that_finds_no_engine_was_turned_away_and_had_no_part_in_its_end() -> None:
    async def story() -> None:
        async with standing() as stand:
            stand.llm.refuse_with = EngineGoneBeforeError("the engine process was killed by signal 9")
            assert is_not_now(await run(stand, BODY))
            stand.server.keeper._llm = None
            assert is_not_now(await run(stand, BODY))

    asyncio.run(story())


def test_lines_take_no_place_of_flex_requests_and_wait_while_those_are_paused() -> None:
    async def story() -> None:
        async with standing(max_best_effort_requests=1) as stand:
            waiting = [
                asyncio.create_task(lines(stand).run_line(OWNER, CHAT, BODY, f"batch_req_{i}", 9))
                for i in "ab"
            ]
            await stand.until(lambda: len(stand.llm.running) == 2)
            stand.llm.go.set()
            assert (await stand.chat(service_tier="flex")).status_code == 200
            assert [(await line).status_code for line in waiting] == [200, 200]
            await stand.http.post("/admin/best_effort/pause")
            assert is_not_now(await run(stand, BODY))

    asyncio.run(story())


def test_lines_of_a_batch_are_their_owners_own_requests(tmp_path: Path) -> None:
    keys = (
        ApiKey("sk-a", clamp=Clamp(lowest_priority=5)),
        ApiKey("sk-b", owner="team"),
        ApiKey("sk-c", owner="team", clamp=Clamp(lowest_priority=-3)),
    )

    async def story() -> None:
        async with standing(before=9, api_keys=keys, state_dir=tmp_path / "state") as stand:

            async def asked(key: str) -> tuple[dict[str, Any], dict[str, Any]]:
                """What a line of a batch of that key came with, and a request of it."""
                auth = {"authorization": f"Bearer {key}"}
                body = BODY | {"priority": -9}
                line = {"custom_id": "1", "method": "POST", "url": CHAT, "body": body}
                form = {"file": ("in.jsonl", json.dumps(line).encode())}
                sent = await stand.http.post("/v1/files", files=form, data={"purpose": "batch"}, headers=auth)
                new = {"input_file_id": sent.json()["id"], "endpoint": CHAT, "completion_window": "24h"}
                count = len(stand.llm.asked)
                await stand.http.post("/v1/batches", json=new, headers=auth)
                await stand.until(lambda: len(stand.llm.asked) > count)
                await stand.chat(headers=auth, priority=-9, service_tier="flex")
                return stand.llm.asked[-2], stand.llm.asked[-1]

            salts = set()
            for key, priority in (("sk-a", 5), ("sk-b", -3), ("sk-c", -3)):
                line, chat = await asked(key)
                assert line["salt"] == chat["salt"], "a batch finds what its owner's chats have cached"
                assert line["priority"] == priority, "and no batch goes before all others"
                salts.add(line["salt"])
            assert len(salts) == 2, "that of one owner tells another nothing"

    asyncio.run(story())


def test_a_batch_with_a_line_that_kills_engines_ends_and_the_server_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ScriptedLLM, "deadly", "attack")
    monkeypatch.setattr(engine_keeper, "FIRST_PAUSE_S", 0.001)
    at_once = partial(RunnerSettings, first_pause_s=0.001, longest_pause_s=0.01)
    monkeypatch.setattr("omniserve.server.run.RunnerSettings", at_once)
    asked = [BODY | {"messages": [{"role": "user", "content": text}]} for text in ("a", "attack", "b")]
    content = "".join(
        json.dumps({"custom_id": str(i), "method": "POST", "url": CHAT, "body": body}) + "\n"
        for i, body in enumerate(asked)
    )

    async def story() -> None:
        async with standing(before=9, state_dir=tmp_path / "state") as stand:
            form = {"file": ("in.jsonl", content.encode())}
            sent = await stand.http.post("/v1/files", files=form, data={"purpose": "batch"})
            new = {"input_file_id": sent.json()["id"], "endpoint": CHAT, "completion_window": "24h"}
            batch = (await stand.http.post("/v1/batches", json=new)).json()
            while batch["status"] != "completed":
                batch = (await stand.http.get(f"/v1/batches/{batch['id']}")).json()
                await asyncio.sleep(0.01)
            assert batch["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
            errors = await stand.http.get(f"/v1/files/{batch['error_file_id']}/content")
            (failed,) = map(json.loads, errors.text.splitlines())
            assert (failed["custom_id"], failed["response"]["status_code"]) == ("1", 500)
            assert failed["response"]["body"]["error"]["code"] == "engine_error"
            await stand.until(lambda: stand.server.keeper.state == "ready")
            assert "omniserve:batch_lines_given_up_total 1.0" in (await stand.http.get("/metrics")).text
            assert len(stand.engines) == 1 + DEATHS_AMONG_OTHERS + DEATHS_ALONE
            assert (await stand.chat()).status_code == 200

    asyncio.run(story())


def test_a_line_that_nobody_wants_anymore_leaves_the_engine() -> None:
    async def story() -> None:
        async with standing() as stand:
            line = asyncio.create_task(run(stand, BODY))
            await stand.until(lambda: stand.llm.running)
            line.cancel()
            await asyncio.wait([line])
            assert line.cancelled()
            assert not stand.llm.running

    asyncio.run(story())


@pytest.mark.parametrize("before", [0, 2])
def test_a_line_that_is_cancelled_says_what_it_took_once_it_has_a_token(before: int) -> None:
    async def story() -> None:
        async with standing(before=before) as stand:
            line = asyncio.create_task(run(stand, BODY))
            await stand.until(lambda: stand.llm.running)
            line.cancel()
            with pytest.raises(asyncio.CancelledError) as left:
                await line
            assert line.cancelled()
            assert isinstance(left.value, LineCancelled) == (before > 0)
            if isinstance(left.value, LineCancelled):
                num_prompt = sum(len(message["content"]) for message in HELLO)
                assert left.value.usage == Usage(input_tokens=num_prompt, output_tokens=before)

    asyncio.run(story())


def test_what_is_logged_about_a_line_has_its_id() -> None:
    async def story() -> None:
        async with standing(before=9) as stand:
            await lines(stand).run_line(OWNER, CHAT, BODY, "batch_req_7", 9)
            assert current_request_id.get() == "batch_req_7"

    asyncio.run(story())


def test_a_deadline_that_is_past_is_no_negative_number() -> None:
    async def story() -> None:
        async with standing(before=9) as stand:
            assert (await run(stand, BODY, left_s=0.0)).status_code == 200
            assert stand.llm.asked[-1]["window"] > 0

    asyncio.run(story())
