"""/health, /ready, /version, /metrics, /v1/models: what this server is, and whether it serves."""

# No deferred annotations here: FastAPI reads those of routes that are made inside a function.
import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import PlainTextResponse, Response

from omniserve import __version__
from omniserve.batch.service import BatchService
from omniserve.server.answers import JsonBody
from omniserve.server.endpoints import Endpoints
from omniserve.server.errors import ApiError
from omniserve.server.scrape import Scrape


def status_router(
    endpoints: Endpoints, names: Sequence[str], root: str, batches: BatchService | None
) -> APIRouter:
    """names: those that the model is served under; root: its own. batches: None without a state directory."""
    router = APIRouter(tags=["status"])
    scrape = Scrape(endpoints, batches)
    created = int(time.time())

    def card(name: str) -> dict[str, Any]:
        shown: dict[str, Any] = {"id": name, "object": "model", "created": created, "owned_by": "omniserve"}
        shown |= {"root": root, "parent": None}
        if endpoints.keeper.state == "ready":
            shown["max_model_len"] = endpoints.keeper.llm.acceptance.max_model_len
        return shown

    # HEAD: what some load balancers ask with.
    @router.head("/health", include_in_schema=False)
    @router.get("/health")
    async def health() -> dict[str, str]:
        """The process lives and answers; whether it can serve is /ready's affair."""
        return {"status": "ok"}

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready", responses={503: {"description": "loading, restarting, unresponsive or stopping"}})
    async def ready() -> JsonBody:
        state = endpoints.state
        return JsonBody({"status": state}, 200 if state == "ready" else 503)

    @router.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(await scrape.exposition(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in names]}

    # Names of models may hold slashes.
    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name not in names:
            raise ApiError(
                404, f"the model {name!r:.200} does not exist", param="model", code="model_not_found"
            )
        return card(name)

    return router
