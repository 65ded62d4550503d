"""What one client sends cannot hold up the others: sizes are looked at before contents."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from server.processes import Served
from server.scripted import HELLO, standing
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
