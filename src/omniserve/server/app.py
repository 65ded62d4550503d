"""The FastAPI app, put together from its parts. Starts and stops nothing but what is its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import Response

from omniserve import __version__
from omniserve.batch.service import BatchService
from omniserve.errors import RequestError
from omniserve.server.answers import error_answer
from omniserve.server.auth import Caller, Keyring
from omniserve.server.batch_errors import add_batch_error_handlers
from omniserve.server.dashboard.watch import Watch
from omniserve.server.endpoints import Endpoints
from omniserve.server.errors import as_api_error
from omniserve.server.gate import Gate
from omniserve.server.request_models import ChatRequest, CompletionRequest, ErrorBody, as_invalid
from omniserve.server.routes_admin import admin_router
from omniserve.server.routes_batches import CreateBatch, batches_router
from omniserve.server.routes_dashboard import dashboard_router
from omniserve.server.routes_files import files_router
from omniserve.server.routes_status import status_router
from omniserve.server.routes_text import text_router
from omniserve.server.settings import ServerConfig
from omniserve.server.tiers import BATCH_TIER
from omniserve.server.visitors import Visitors

SCHEMA_REF = "#/components/schemas/{model}"
_ERROR = {
    "description": "What went wrong",
    "content": {"application/json": {"schema": {"$ref": SCHEMA_REF.format(model="ErrorBody")}}},
}


def make_app(
    config: ServerConfig,
    endpoints: Endpoints,
    names: Sequence[str],
    batches: BatchService | None,
    watch: Watch,
    root: str | None = None,
) -> FastAPI:
    """batches: None on a server without a state directory, which has no files and batches.

    names: of the model; root: its own name, where it is served under others.
    """
    app = FastAPI(title="OmniServe", version=__version__, docs_url=None, redoc_url=None)
    app.include_router(text_router(endpoints))
    app.include_router(status_router(endpoints, names, root or names[0], batches))
    app.include_router(admin_router(endpoints, batches))
    app.include_router(dashboard_router(watch))
    if batches is not None:
        # Asynchronous, or each would run on a thread of its own, beside the loop that they ask about.
        async def check_upload() -> None:
            endpoints.check_open()

        async def check_create(request: Request) -> None:
            endpoints.check_open()
            caller: Caller = request.state.caller
            caller.check_tier(BATCH_TIER.asked, ", which is that of batches")

        app.include_router(files_router(lambda: batches, _owner, check_upload))
        app.include_router(batches_router(lambda: batches, _owner, check_create, endpoints.field_log))
        add_batch_error_handlers(app)
    app.add_middleware(
        Gate, keyring=Keyring(config), visitors=Visitors(config), max_body_bytes=config.max_body_bytes
    )
    app.add_exception_handler(HTTPException, _answer_error)
    app.add_exception_handler(RequestError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    _describe(app)
    return app


def _owner(request: Request) -> str:
    """Whose files and batches a request is about."""
    caller: Caller = request.state.caller
    return caller.owner


async def _answer_error(request: Request, error: Exception) -> Response:
    return error_answer(as_api_error(error))


async def _answer_invalid(request: Request, error: Exception) -> Response:
    """Bodies, paths and queries that FastAPI checks: the first part of a place says which of them it was."""
    assert isinstance(error, RequestValidationError)
    first = dict(error.errors()[0])
    first["loc"] = first["loc"][1:]
    return error_answer(as_invalid([first]))


def _describe(app: FastAPI) -> None:
    """Add what FastAPI cannot know to the OpenAPI document: bodies that routes decode themselves, errors."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            models: list[tuple[type[BaseModel], Literal["validation"]]] = [
                (model, "validation") for model in (ChatRequest, CompletionRequest, CreateBatch, ErrorBody)
            ]
            _, found = models_json_schema(models, ref_template=SCHEMA_REF)
            document = made()
            document.setdefault("components", {}).setdefault("schemas", {}).update(found["$defs"])
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
                    operation["responses"]["default"] = _ERROR
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
