"""What one client sends cannot hold up the others: sizes are looked at before contents."""

from __future__ import annotations

import asyncio
import json
import socket
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from server.processes import Served
from server.scripted import CHAT, COMPLETIONS, HELLO, Stand, standing
from server.test_overload import error_of


@pytest.mark.parametrize(
    ("path", "fields", "param", "code"),
    [
        ("completions", {"prompt": [7] * 513}, "prompt", "context_length_exceeded"),
        ("completions", {"prompt": [[7], [7] * 513]}, "prompt", "context_length_exceeded"),
        ("completions", {"prompt": ["a"] * 257}, "prompt", "invalid_value"),
        ("completions", {"prompt": "a", "stop": ["x"] * 257}, "stop", "invalid_value"),
        ("completions", {"prompt": "a", "bad_words": ["x"] * 257}, "bad_words", "invalid_value"),
        ("chat/completions", {"messages": HELLO * 513}, "messages", "context_length_exceeded"),
    ],
)
def test_more_items_than_any_valid_request_has_are_refused_uninspected(
    server: Served, path: str, fields: dict[str, Any], param: str, code: str
) -> None:
    answer = server.post(f"/v1/{path}", {"model": "tiny", **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)
    # Not one item was looked at: a wrong one among them is not what is told.
    wrong = {**fields, param: [*fields[param], {}]}
    assert server.post(f"/v1/{path}", {"model": "tiny", **wrong}).json()["error"]["code"] == code


def test_as_many_items_as_are_allowed_are_taken(server: Served) -> None:
    fields = {"prompt": [7] * 511, "max_tokens": 1, "stop": [f"stop {i}" for i in range(256)]}
    assert server.post("/v1/completions", {"model": "tiny", **fields}).status_code == 200


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_failure_of_the_server(server: Served) -> None:
    address = urlsplit(server.base_url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nx-request-id: leaver\r\n"
        connection.sendall(head + b"content-type: application/json\r\ncontent-length: 500\r\n\r\n{")
        # The last header and byte arrive together, so that an answered request says that they were read.
        assert server.get("/health").status_code == 200
    server.wait_until(lambda: "[leaver]" in server.log, "a log line of the request")
    told = [line for line in server.lines if "[leaver]" in line]
    assert [("INFO" in line, " gone " in line) for line in told] == [(True, True)]
    assert "ClientDisconnect" not in server.log


def test_a_chat_beyond_the_places_is_told_not_to_come_again_in_silence() -> None:
    async def story() -> None:
        async with standing(max_requests=1) as stand:
            first = asyncio.create_task(stand.chat())
            await stand.until(lambda: stand.llm.running)
            refused = await stand.chat()
            assert error_of(refused) == (429, "resource_unavailable")
            assert refused.headers["x-should-retry"] == "false"
            assert int(refused.headers["retry-after"]) * 1000 >= int(refused.headers["retry-after-ms"])
            assert stand.llm.num_encoded == 1, "nothing of it was tokenised"
            stand.llm.go.set()
            assert (await first).status_code == 200

    asyncio.run(story())


def test_a_batch_whose_body_is_no_json_is_told_as_a_chat_would_be(tmp_path: Path) -> None:
    async def story() -> None:
        async with standing(state_dir=tmp_path / "state") as stand:
            kind = {"content-type": "application/json"}
            answer = await stand.http.post("/v1/batches", content=b"{", headers=kind)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["code"]) == (400, None, "invalid_json")

    asyncio.run(story())


HALF = "\ud800"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/batches", {"input_file_id": HALF}, "input_file_id"),
        ("/v1/batches", {"metadata": {"a": HALF}}, "metadata.a"),
        ("/v1/batches", {"metadata": {HALF: 5}}, "metadata.?"),
        ("/v1/batches", {HALF: 1}, "?"),
        ("/v1/batches", {"endpoint": "\ude00\ud83d"}, "endpoint"),
        (CHAT, {"messages": [{"role": "user", "content": HALF + "x"}]}, "messages[0].content"),
        (COMPLETIONS, {"prompt": ["a", HALF]}, "prompt[1]"),
        (COMPLETIONS, [HALF], "[0]"),
    ],
)
def test_text_that_has_no_utf_8_is_refused_by_name_and_makes_nothing(
    tmp_path: Path, path: str, body: Any, param: str
) -> None:
    async def story() -> None:
        async with standing(before=9, state_dir=tmp_path / "state") as stand:
            kind = {"content-type": "application/json"}
            answer = await stand.http.post(path, content=json.dumps(body).encode(), headers=kind)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["code"]) == (400, param, "invalid_value")
            assert (await stand.http.get("/v1/batches")).json()["data"] == []
            assert stand.llm.num_encoded == 0

    asyncio.run(story())


def test_a_whole_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    async def story() -> None:
        async with standing(before=9, state_dir=tmp_path / "state") as stand:
            batch = await created(stand, metadata={"a": "\U0001f600"})
            assert batch.json()["metadata"] == {"a": "\U0001f600"}

    asyncio.run(story())


async def created(stand: Stand, **fields: Any) -> httpx.Response:
    """The answer to a batch of one line, whose body is plain ASCII."""
    line = {"custom_id": "1", "method": "POST", "url": CHAT, "body": {"model": "tiny", "messages": HELLO}}
    form = {"file": ("in.jsonl", json.dumps(line).encode())}
    sent = await stand.http.post("/v1/files", files=form, data={"purpose": "batch"})
    new = {"input_file_id": sent.json().get("id"), "endpoint": CHAT, "completion_window": "24h"} | fields
    kind = {"content-type": "application/json"}
    return await stand.http.post("/v1/batches", content=json.dumps(new).encode(), headers=kind)


def test_a_batch_on_disk_whose_metadata_has_no_utf_8_hinders_nobody(tmp_path: Path) -> None:
    async def story() -> None:
        async with standing(before=9, state_dir=tmp_path / "state") as stand:
            batch = (await created(stand, metadata={"a": "b"})).json()
        with closing(sqlite3.connect(tmp_path / "state" / "batches.sqlite")) as db:
            old = json.dumps({"a\udc00": "x\ud800"})
            db.execute("UPDATE batches SET metadata = ?", (old,))
            db.commit()
        async with standing(before=9, state_dir=tmp_path / "state") as stand:
            for path in ("/v1/batches", f"/v1/batches/{batch['id']}"):
                answer = await stand.http.get(path)
                assert answer.status_code == 200
                found = answer.json().get("data", [answer.json()])[0]
                assert found["metadata"] == {"a\ufffd": "x\ufffd"}
            await stand.server.watch.look()
            shown = (await stand.http.get("/dashboard/data")).json()
            assert shown["batches"]["list"][0]["label"] == "a\ufffd: x\ufffd"

    asyncio.run(story())


def test_fields_that_a_batch_does_not_know_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="omniserve.server")
    life = {"anchor": "created_at", "seconds": 7200, "wobble": 1}

    async def story() -> None:
        async with standing(before=9, state_dir=tmp_path / "state") as stand:
            answer = await created(
                stand, wibble=1, absent=None, output_expires_after=life, metadata={"m": "1"}
            )
            assert answer.status_code == 200
            assert answer.headers["x-omniserve-ignored"] == "wibble, output_expires_after.wobble"
            assert "field output_expires_after.wobble, which is ignored" in caplog.text
            assert "x-omniserve-ignored" not in (await created(stand)).headers
            forged = await created(stand, **{"a\r\nset-cookie: b": 1})
            assert forged.headers["x-omniserve-ignored"] == "a??set-cookie??b"

    asyncio.run(story())


def test_a_server_that_stops_takes_neither_files_nor_batches(tmp_path: Path) -> None:
    async def story() -> None:
        async with standing(before=9, state_dir=tmp_path / "state") as stand:
            stand.doors.is_draining = True
            form = {"file": ("in.jsonl", b"{}")}
            for answer in (
                await stand.http.post("/v1/files", files=form, data={"purpose": "batch"}),
                await stand.http.post("/v1/batches", content=b"{"),
            ):
                assert error_of(answer) == (503, "server_stopping")
                assert "retry-after" in answer.headers
            assert (await stand.http.get("/v1/files")).json()["data"] == [], "what is there can be read"

    asyncio.run(story())


def test_work_that_can_wait_is_taken_while_no_engine_runs(tmp_path: Path) -> None:
    async def story() -> None:
        async with standing(before=9, state_dir=tmp_path / "state") as stand:
            stand.server.keeper._llm, stand.server.keeper.state = None, "restarting"
            assert (await created(stand)).status_code == 200

    asyncio.run(story())
