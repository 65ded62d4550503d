"""/v1/chat/completions and /v1/completions: bodies in, answers out."""

# No deferred annotations here: FastAPI reads those of routes that are made inside a function.
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Send

from omniserve.server.answers import Answer, EventStream, send_failure, send_json
from omniserve.server.bodies import decoded
from omniserve.server.endpoints import Endpoints, new_answer_id
from omniserve.server.errors import ApiError
from omniserve.server.fields import ignored_headers
from omniserve.server.generation import Run
from omniserve.server.work import CHAT, COMPLETIONS, TPOT_HEADER, TTFT_HEADER, Origin, Work

SLO_PARAMETERS = [
    {"name": name, "in": "header", "required": False, "schema": {"type": "number", "exclusiveMinimum": 0}}
    for name in (TTFT_HEADER, TPOT_HEADER)
]


def text_router(endpoints: Endpoints) -> APIRouter:
    router = APIRouter(tags=["text"])

    def add(path: str, name: str) -> None:
        async def handle(request: Request) -> Response:
            endpoints.check_serving()
            body = decoded(await request.body())
            origin = Origin(
                caller=request.state.caller,
                headers=request.headers,
                arrived_s=request.state.arrived_s,
                request_id=request.state.request_id,
                answer_id=new_answer_id(path),
            )
            return Answer(lambda send: respond(endpoints, path, body, origin, send))

        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
        extra = {"requestBody": {"required": True, "content": content}, "parameters": SLO_PARAMETERS}
        answer = {
            "description": "The answer, or its events with `stream`",
            "content": {"text/event-stream": {}},
        }
        router.post(path, openapi_extra=extra, responses={200: answer}, name=name)(handle)

    add(CHAT, "ChatRequest")
    add(COMPLETIONS, "CompletionRequest")
    return router


async def respond(
    endpoints: Endpoints, path: str, body: Mapping[str, Any], origin: Origin, send: Send
) -> None:
    """Answer one request, whole or token by token."""
    stream: EventStream | None = None
    try:
        async with endpoints.run(path, body, origin) as (work, run):
            headers = _headers(work)
            if not work.stream:
                answer = await run.whole()
            else:
                stream = EventStream(send, headers)
                await _push_texts(stream, work, run)
        if stream is None:
            await send_json(send, 200, answer, headers)
        else:
            await stream.close(work.shape.last(run.usage))
    except ApiError as error:
        if stream is None:
            await send_failure(send, error)
        else:
            await stream.fail(error)
    finally:
        if stream is not None:
            stream.abandon()


async def _push_texts(stream: EventStream, work: Work, run: Run) -> None:
    opened: set[int] = set()
    async with aclosing(run.grown()) as grown:
        async for at in grown:
            events = b""
            for text in run.news(at):
                if text.index not in opened:
                    opened.add(text.index)
                    events += work.shape.opening(text.index)
                events += work.shape.chunk(text)
            if events:
                await stream.push(events)


def _headers(work: Work) -> dict[str, str]:
    """What the answer says beside itself: ignored fields, and targets of its own."""
    headers = ignored_headers(work.ignored)
    if work.slo is not None:
        headers |= {TTFT_HEADER: f"{work.slo.ttft_s * 1000:g}", TPOT_HEADER: f"{work.slo.tpot_s * 1000:g}"}
    return headers
