"""/admin: the operator's hand on best-effort work and on single requests, and the engine's reasons."""

# No deferred annotations here: FastAPI reads those of routes that are made inside a function.
from typing import Any

from fastapi import APIRouter

from omniserve.batch.service import BatchService
from omniserve.server.endpoints import Endpoints
from omniserve.server.errors import CANCELLED_STATUS, ApiError


def admin_router(endpoints: Endpoints, batches: BatchService | None) -> APIRouter:
    """Who may come here is the gate's affair."""
    router = APIRouter(prefix="/admin", tags=["admin"])
    doors = endpoints.doors

    def best_effort_status() -> dict[str, Any]:
        lines = 0 if batches is None else batches.runner.status.num_running
        state = "paused" if doors.is_paused else "running"
        return {"status": state, "num_requests": doors.count(best_effort=True), "num_batch_lines": lines}

    @router.get("/best_effort")
    async def best_effort() -> dict[str, Any]:
        return best_effort_status()

    @router.post("/best_effort/pause")
    async def pause() -> dict[str, Any]:
        """Start no more best-effort work; what runs goes on."""
        doors.is_paused = True
        if batches is not None:
            batches.runner.pause()
        return best_effort_status()

    @router.post("/best_effort/resume")
    async def resume() -> dict[str, Any]:
        doors.is_paused = False
        if batches is not None:
            batches.runner.resume()
        return best_effort_status()

    @router.post("/best_effort/drain")
    async def drain() -> dict[str, Any]:
        """Pause, and answer when no best-effort work runs anymore and all results are recorded."""
        doors.is_paused = True
        if batches is not None:
            await batches.runner.drain()
        await doors.wait_empty(best_effort=True)
        return best_effort_status()

    @router.post("/requests/{request_id}/cancel")
    async def cancel(request_id: str) -> dict[str, Any]:
        """By `x-request-id`, or by the id of the answer."""
        message, code = "the operator cancelled this request", "request_cancelled"
        why = ApiError(CANCELLED_STATUS, message, kind="server_error", code=code)
        count = doors.end_request(request_id, why)
        if not count:
            raise ApiError(404, f"no request {request_id!r:.200} is running", param="request_id")
        return {"id": request_id, "num_cancelled": count}

    @router.get("/explanations")
    async def explanations() -> dict[str, Any]:
        """Why the engine's last plans are as they are, and its last refusals (docs/policy.md)."""
        return await endpoints.keeper.llm.explain()

    @router.get("/stats")
    async def stats() -> dict[str, Any]:
        """Counters and gauges of the engine (docs/design.md)."""
        return await endpoints.keeper.llm.stats()

    return router
