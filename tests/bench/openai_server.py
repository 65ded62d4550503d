"""A small OpenAI-compatible server on a free port, whose answers follow a script."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse


@dataclass
class Script:
    """How one request is answered: a refusal, or as many tokens as it asks for.

    status, error, headers: of a refusal. before: awaited before the first byte; prefix: sent before all else.
    cut_after, error_after, give_up_after, stop_after: tokens after which the connection is dropped, an error
    comes in mid-stream, the server gives the request up, the text ends by itself. lump: tokens in one chunk.
    """

    status: int = 200
    error: dict[str, Any] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    before: Callable[[], Any] | None = None
    cut_after: int | None = None
    error_after: int | None = None
    stop_after: int | None = None
    give_up_after: int | None = None
    lump: int = 1
    prefix: str = ""
    has_usage: bool = True


class DropConnection(Exception):
    pass


@dataclass
class Seen:
    """A request as the server got it."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]

    @property
    def prompt(self) -> str:
        if "messages" in self.body:
            return str(self.body["messages"][0]["content"])
        return str(self.body["prompt"])

    @property
    def num_output(self) -> int:
        return int(self.body.get("max_tokens") or self.body.get("max_completion_tokens") or 0)


class OpenAIServer:
    """`script` says how each request is answered; `seen` are the requests in order of their arrival."""

    def __init__(self) -> None:
        self.script: Callable[[Seen], Script] = lambda _: Script()
        self.seen: list[Seen] = []
        self.models: list[dict[str, Any]] = [{"id": "tiny", "owned_by": "omniserve"}]
        self.count_prompt: Callable[[str], int] = lambda text: len(text.split())
        self.not_ready = 0
        self.running = self.most_running = 0
        self.batches: dict[str, dict[str, Any]] = {}
        self.files: dict[str, str] = {}
        self.lines_per_look = 2
        self.has_batches = True
        self.base_url = ""
        self.app = FastAPI()
        self._add_routes()

    def load(self) -> list[Seen]:
        """The requests that were not the one by which the client looked whether there is an answer."""
        return self.seen[1:]

    def _add_routes(self) -> None:
        app = self.app

        @app.get("/v1/models")
        async def models() -> Response:
            if self.not_ready:
                self.not_ready -= 1
                return _error(503, {"message": "loading", "code": "loading"})
            return JSONResponse({"object": "list", "data": self.models})

        @app.post("/v1/completions")
        @app.post("/v1/chat/completions")
        async def generate(request: Request) -> Response:
            seen = Seen(request.url.path, await request.json(), dict(request.headers))
            self.seen.append(seen)
            script = self.script(seen)
            if script.before is not None:
                await script.before()
            if script.status != 200:
                return _error(script.status, script.error or {}, script.headers)
            return StreamingResponse(self._stream(seen, script), media_type="text/event-stream")

        @app.post("/v1/files")
        async def upload(request: Request) -> Any:
            if not self.has_batches:
                return _error(404, {"message": "no such endpoint"})
            async with request.form() as form:
                content = await form["file"].read()  # type: ignore[union-attr]
                purpose = form["purpose"]
            self.files["file-in"] = content.decode()
            return {"id": "file-in", "object": "file", "purpose": purpose}

        @app.post("/v1/batches")
        async def create(request: Request) -> dict[str, Any]:
            asked = await request.json()
            total = len(self.files[asked["input_file_id"]].splitlines())
            counts = {"total": total, "completed": 0, "failed": 0}
            self.batches["batch-1"] = {
                "id": "batch-1",
                "status": "in_progress",
                "request_counts": counts,
            } | asked
            return self.batches["batch-1"]

        @app.get("/v1/batches/{name}")
        async def look(name: str) -> dict[str, Any]:
            batch = self.batches[name]
            if batch["status"] == "cancelling":
                self._end_batch(batch, "cancelled")
            elif batch["status"] == "in_progress":
                counts = batch["request_counts"]
                counts["completed"] = min(counts["total"], counts["completed"] + self.lines_per_look)
                if counts["completed"] == counts["total"]:
                    self._end_batch(batch, "completed")
            return batch

        @app.post("/v1/batches/{name}/cancel")
        async def cancel(name: str) -> dict[str, Any]:
            self.batches[name]["status"] = "cancelling"
            return self.batches[name]

        @app.get("/v1/files/{name}/content")
        async def content(name: str) -> Response:
            return Response(self.files[name])

    def _end_batch(self, batch: dict[str, Any], status: str) -> None:
        done = self.files["file-in"].splitlines()[: batch["request_counts"]["completed"]]
        bodies = [json.loads(line)["body"] for line in done]
        answers = [{"response": {"body": {"usage": {"completion_tokens": b["max_tokens"]}}}} for b in bodies]
        self.files["file-out"] = "".join(json.dumps(a) + "\n" for a in answers)
        batch |= {"status": status, "output_file_id": "file-out"}

    async def _stream(self, seen: Seen, script: Script) -> AsyncIterator[str]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            async for event in self._events(seen, script):
                yield event
        finally:
            self.running -= 1

    async def _events(self, seen: Seen, script: Script) -> AsyncIterator[str]:
        is_chat = "messages" in seen.body
        yield script.prefix
        if is_chat:
            yield _event(
                {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
            )
        total = seen.num_output if script.stop_after is None else script.stop_after
        for done in range(0, total, script.lump):
            if done == script.cut_after:
                raise DropConnection
            if done == script.error_after:
                yield _event({"error": {"code": "engine_dead", "message": "the engine is gone"}})
                return
            if done == script.give_up_after:
                yield _event({"choices": [{"text": "", "finish_reason": "abort"}]})
                return
            is_last = done + script.lump >= total
            choice: dict[str, Any] = {"finish_reason": "length" if is_last else None}
            choice |= {"delta": {"content": "x"}} if is_chat else {"text": "x"}
            yield _event({"choices": [choice], "usage": None})
        if script.has_usage:
            usage = {"prompt_tokens": self.count_prompt(seen.prompt), "completion_tokens": total}
            yield _event({"choices": [], "usage": usage})
        yield "data: [DONE]\n\n"


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


def _error(status: int, error: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": error}, status, headers)


@contextmanager
def running_server() -> Iterator[OpenAIServer]:
    """On 127.0.0.1 and a port that the system chose, in a thread of its own."""
    server = OpenAIServer()
    config = uvicorn.Config(server.app, host="127.0.0.1", port=0, log_level="critical", lifespan="off")
    runner = uvicorn.Server(config)
    thread = threading.Thread(target=runner.run)
    thread.start()
    try:
        while not runner.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        port = runner.servers[0].sockets[0].getsockname()[1]
        server.base_url = f"http://127.0.0.1:{port}"
        yield server
    finally:
        runner.force_exit = runner.should_exit = True
        thread.join()


class Barrier:
    """Holds every request until `count` of them are there, in the server's own loop."""

    def __init__(self, count: int) -> None:
        self._count, self._arrived = count, 0
        self._is_full = asyncio.Event()

    async def wait(self) -> None:
        self._arrived += 1
        if self._arrived == self._count:
            self._is_full.set()
        await self._is_full.wait()
