"""Files and batches over HTTP, with OpenAI's own client: its objects, its pages, its errors."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI, Header, Request
from fastapi.responses import JSONResponse

from batch.scripted import SETTINGS, ScriptedRunner
from batch.stand import ENDPOINT, LIMITS, blobs, jsonl, line, lines
from batch.test_faults import FULL, FaultyDisk
from omniserve.batch.limits import Quota
from omniserve.batch.service import BatchService
from omniserve.errors import RequestError
from omniserve.server.batch_errors import add_batch_error_handlers
from omniserve.server.fields import FieldLog
from omniserve.server.routes_batches import batches_router
from omniserve.server.routes_files import files_router


def app_of(service: BatchService) -> FastAPI:
    """The routes alone; an owner is whatever key is given."""
    app = FastAPI()

    def owner(authorization: str = Header()) -> str:
        return authorization

    async def bad_request(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestError)
        body = {"message": str(error), "type": "invalid_request_error", "param": error.field, "code": None}
        return JSONResponse({"error": body}, 400)

    app.add_exception_handler(RequestError, bad_request)
    add_batch_error_handlers(app)

    def is_open() -> None:
        """Always, to everybody."""

    app.include_router(files_router(lambda: service, owner, is_open))
    app.include_router(batches_router(lambda: service, owner, is_open, FieldLog()))
    return app


@dataclass
class Place:
    """A server on a free port of this machine."""

    service: BatchService
    url: str

    def client(self, key: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(api_key=key, base_url=f"{self.url}/v1", max_retries=0)


Promise = Callable[[openai.AsyncOpenAI, Place], Awaitable[None]]


@asynccontextmanager
async def serving(service: BatchService) -> AsyncIterator[Place]:
    server = uvicorn.Server(uvicorn.Config(app_of(service), log_level="error"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        task = asyncio.create_task(server.serve([listener]))
        try:
            yield Place(service, f"http://127.0.0.1:{listener.getsockname()[1]}")
        finally:
            server.should_exit = True
            await task


def run(root: Path, promise: Promise, **options: Any) -> None:
    async def main() -> None:
        options.setdefault("limits", LIMITS)
        service = BatchService(root, ScriptedRunner(), settings=SETTINGS, **options)
        service.start()
        try:
            async with serving(service) as place, place.client("anna") as client:
                await promise(client, place)
        finally:
            await service.stop()

    asyncio.run(main())


async def uploaded(client: openai.AsyncOpenAI, data: bytes) -> Any:
    return await client.files.create(file=("in.jsonl", data), purpose="batch")


async def submitted(client: openai.AsyncOpenAI, data: bytes, **options: Any) -> Any:
    file = await uploaded(client, data)
    options = {"endpoint": ENDPOINT, "completion_window": "24h"} | options
    return await client.batches.create(input_file_id=file.id, **options)


async def ended(client: openai.AsyncOpenAI, batch: Any) -> Any:
    while batch.status in ("validating", "in_progress", "finalizing", "cancelling"):
        await asyncio.sleep(0.002)
        batch = await client.batches.retrieve(batch.id)
    return batch


def test_a_batch_from_upload_to_results(tmp_path: Path) -> None:
    async def promise(client: openai.AsyncOpenAI, place: Place) -> None:
        batch = await submitted(client, lines(5), metadata={"job": "x"})
        assert (batch.object, batch.endpoint, batch.metadata) == ("batch", ENDPOINT, {"job": "x"})
        assert batch.expires_at - batch.created_at == 86400
        assert batch.output_file_id is None
        batch = await ended(client, batch)
        assert (batch.status, batch.model) == ("completed", "m")
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (5, 5, 0)
        assert (batch.usage.input_tokens, batch.usage.total_tokens) == (10, 15)
        assert (batch.errors, batch.error_file_id) == (None, None)
        results = [
            json.loads(one) for one in (await client.files.content(batch.output_file_id)).text.splitlines()
        ]
        assert sorted(one["custom_id"] for one in results) == [f"line-{n}" for n in range(1, 6)]
        assert set(results[0]) == {"id", "custom_id", "response", "error"}
        assert results[0]["id"].startswith("batch_req_")
        assert set(results[0]["response"]) == {"status_code", "request_id", "body"}
        file = await client.files.retrieve(batch.output_file_id)
        assert (file.purpose, file.status) == ("batch_output", "processed")

    run(tmp_path, promise)


def test_the_status_of_a_bad_input_names_its_lines(tmp_path: Path) -> None:
    async def promise(client: openai.AsyncOpenAI, place: Place) -> None:
        batch = await ended(client, await submitted(client, jsonl([line(1), line(1), 7])))
        assert (batch.status, batch.failed_at is not None, batch.errors.object) == ("failed", True, "list")
        assert [(error.code, error.line) for error in batch.errors.data] == [
            ("duplicate_custom_id", 2),
            ("invalid_json_line", 3),
        ]

    run(tmp_path, promise)


def test_lists_come_in_pages(tmp_path: Path) -> None:
    async def promise(client: openai.AsyncOpenAI, place: Place) -> None:
        batches = [await submitted(client, lines(1)) for _ in range(5)]
        assert [one.id async for one in client.batches.list(limit=2)] == [one.id for one in batches[::-1]]
        for batch in batches:
            await ended(client, batch)
        inputs = [one.id async for one in client.files.list(limit=2, purpose="batch", order="asc")]
        assert inputs == [one.input_file_id for one in batches]
        page = await client.files.list(limit=1)
        assert page.has_more

    run(tmp_path, promise)


def test_what_belongs_to_another_key_is_not_found(tmp_path: Path) -> None:
    async def promise(client: openai.AsyncOpenAI, place: Place) -> None:
        batch = await ended(client, await submitted(client, lines(1)))
        async with place.client("bert") as other:
            for call in (
                other.batches.retrieve(batch.id),
                other.batches.cancel(batch.id),
                other.files.retrieve(batch.output_file_id),
                other.files.content(batch.output_file_id),
                other.files.delete(batch.output_file_id),
            ):
                with pytest.raises(openai.NotFoundError):
                    await call
            with pytest.raises(openai.BadRequestError):
                await other.batches.create(
                    input_file_id=batch.input_file_id, endpoint=ENDPOINT, completion_window="24h"
                )
            assert (await other.batches.list()).data == (await other.files.list()).data == []
        assert (await client.files.delete(batch.output_file_id)).deleted
        with pytest.raises(openai.NotFoundError):
            await client.files.content(batch.output_file_id)

    run(tmp_path, promise)


TOO_MUCH: list[tuple[dict[str, Any], str]] = [
    ({"completion_window": "25m"}, "completion_window"),
    ({"completion_window": "15d"}, "completion_window"),
    ({"completion_window": "0h"}, "completion_window"),
    ({"endpoint": "/v1/embeddings"}, "endpoint"),
    ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
    ({"metadata": {"k" * 65: ""}}, "metadata"),
    ({"metadata": {"k": "v" * 513}}, "metadata"),
    ({"output_expires_after": {"anchor": "created_at", "seconds": 3599}}, "output_expires_after.seconds"),
    ({"output_expires_after": {"anchor": "now", "seconds": 3600}}, "output_expires_after.anchor"),
]


def test_a_batch_that_asks_for_too_much_is_refused_by_name(tmp_path: Path) -> None:
    async def promise(client: openai.AsyncOpenAI, place: Place) -> None:
        for changes, param in TOO_MUCH:
            with pytest.raises(openai.BadRequestError) as refusal:
                await submitted(client, lines(1), **changes)
            assert refusal.value.param == param

    run(tmp_path, promise)


def test_windows_beyond_24h_are_an_extension(tmp_path: Path) -> None:
    async def promise(client: openai.AsyncOpenAI, place: Place) -> None:
        life = {"anchor": "created_at", "seconds": 7200}
        for window, seconds in (("1h", 3600), ("36h", 129600), ("14d", 1209600)):
            batch = await submitted(client, lines(1), completion_window=window, output_expires_after=life)
            assert batch.completion_window == window
            assert batch.expires_at - batch.created_at == seconds
            batch = await ended(client, batch)
            file = await client.files.retrieve(batch.output_file_id)
            assert file.expires_at - file.created_at == 7200

    run(tmp_path, promise)


def test_cancelling_again_is_harmless_and_an_ended_batch_is_refused(tmp_path: Path) -> None:
    async def promise(client: openai.AsyncOpenAI, place: Place) -> None:
        place.service.runner.pause()
        batch = await submitted(client, lines(3))
        assert (await client.batches.cancel(batch.id)).status == "cancelling"
        assert (await ended(client, await client.batches.cancel(batch.id))).status == "cancelled"
        place.service.runner.resume()
        done = await ended(client, await submitted(client, lines(1)))
        with pytest.raises(openai.ConflictError, match="is completed"):
            await client.batches.cancel(done.id)

    run(tmp_path, promise)


def test_a_full_disk_answers_507_and_keeps_what_was_there(tmp_path: Path) -> None:
    disk = FaultyDisk()

    async def promise(client: openai.AsyncOpenAI, place: Place) -> None:
        file = await uploaded(client, lines(1))
        for call in ("write", "sync"):
            disk.fail(call, FULL)
            with pytest.raises(openai.APIStatusError) as refusal:
                await uploaded(client, lines(1))
            assert (refusal.value.status_code, refusal.value.code) == (507, "insufficient_storage")
            assert refusal.value.response.headers["x-should-retry"] == "false"
            disk.heal()
        assert blobs(tmp_path) == {file.id}

    run(tmp_path, promise, disk=disk)


def test_too_many_open_files_answer_503(tmp_path: Path) -> None:
    disk = FaultyDisk()

    async def promise(client: openai.AsyncOpenAI, place: Place) -> None:
        disk.fail("write", OSError(errno.EMFILE, "Too many open files"))
        with pytest.raises(openai.InternalServerError) as refusal:
            await uploaded(client, lines(1))
        assert (refusal.value.status_code, refusal.value.code) == (503, "too_many_open_files")
        disk.heal()
        await uploaded(client, lines(1))

    run(tmp_path, promise, disk=disk)


def test_uploads_have_a_largest_size_and_a_quota(tmp_path: Path) -> None:
    async def promise(client: openai.AsyncOpenAI, place: Place) -> None:
        with pytest.raises(openai.APIStatusError) as refusal:
            await uploaded(client, b"x" * 1001)
        assert refusal.value.status_code == 413
        await uploaded(client, b"x" * 1000)
        with pytest.raises(openai.RateLimitError) as quota:
            await uploaded(client, b"x" * 1000)
        assert quota.value.code == "insufficient_quota"
        assert len(blobs(tmp_path)) == 1

    limits = replace(LIMITS, max_file_bytes=1000)
    run(tmp_path, promise, limits=limits, quota_of=lambda owner: Quota(max_bytes=1500))


FILE = b'Content-Disposition: form-data; name="file"; filename="../../%s"\r\n\r\n'
LIFE = (
    b'\r\n--B\r\nContent-Disposition: form-data; name="expires_after[anchor]"\r\n\r\ncreated_at'
    b'\r\n--B\r\nContent-Disposition: form-data; name="expires_after[seconds]"\r\n\r\n%s'
)
PURPOSE = b'Content-Disposition: form-data; name="purpose"\r\n\r\nbatch'


NO_FORMS: list[tuple[bytes, str]] = [
    (b"", "ends before"),
    (b"nonsense", "not valid multipart"),
    (b"--B\r\n" + PURPOSE + b"\r\n--B--\r\n", "file: is missing"),
    (b"--B\r\n" + FILE + b"x\r\n--B--\r\n", "purpose: must be 'batch'"),
    (b"--B\r\n" + FILE + b"x\r\n--B\r\n" + FILE + b"y\r\n--B--\r\n", "sent twice"),
    (b"--B\r\n" + PURPOSE + b"\r\n--B\r\n" + FILE + b"x", "ends before"),
    (b"--B\r\n\r\nx\r\n--B--\r\n", "needs a name"),
    (b"--B\r\n" + FILE + b"x\r\n--B\r\n" + PURPOSE + LIFE % (b"9" * 5000) + b"\r\n--B--\r\n", "from 3600"),
    (b"--B\r\n" + PURPOSE + b"x" * 70000 + b"\r\n--B--\r\n", "beside the file"),
    (b"--B\r\nX: " + b"y" * 9000 + b"\r\n\r\n\r\n--B--\r\n", "Maximum header size"),
]


def test_a_form_that_is_none_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    async def promise(client: openai.AsyncOpenAI, place: Place) -> None:
        headers = {"authorization": "Bearer anna", "content-type": "multipart/form-data; boundary=B"}
        async with httpx.AsyncClient() as http:
            for body, said in NO_FORMS:
                answer = await http.post(f"{place.url}/v1/files", content=body, headers=headers)
                assert answer.status_code == 400
                assert said in answer.json()["error"]["message"]
                assert blobs(tmp_path) == set()

    run(tmp_path, promise)


def test_a_file_keeps_its_name_and_life_and_its_bytes_in_any_order_of_the_form(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000

    async def promise(client: openai.AsyncOpenAI, place: Place) -> None:
        life: Any = {"anchor": "created_at", "seconds": 3600}
        name = '../naïve "name".jsonl'
        file = await client.files.create(file=(name, data), purpose="batch", expires_after=life)
        assert file.expires_at is not None
        assert file.expires_at - file.created_at == 3600
        assert file.bytes == len(data)
        assert "name" in file.filename
        assert (await client.files.content(file.id)).content == data
        form = b"--B\r\n" + FILE + b"x\r\n--B\r\n" + PURPOSE + b"\r\n--B--\r\n"
        headers = {"authorization": "Bearer anna", "content-type": "multipart/form-data; boundary=B"}
        async with httpx.AsyncClient() as http:
            answer = await http.post(f"{place.url}/v1/files", content=form, headers=headers)
        assert answer.json()["filename"] == "../../%s"
        assert (await client.files.content(answer.json()["id"])).content == b"x"

    run(tmp_path, promise)
