"""/v1/batches: thin routes over the batch service."""

# No deferred annotations here: FastAPI reads those of routes that are made inside a function.
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, ConfigDict, ValidationError

from omniserve.batch.limits import check_metadata, life_seconds, window_seconds
from omniserve.batch.objects import batch_object, list_object
from omniserve.batch.records import BatchRecord, NewBatch
from omniserve.batch.service import BatchService
from omniserve.server.bodies import decoded
from omniserve.server.fields import FieldLog, ignored_headers, plain
from omniserve.server.request_models import as_invalid, extras

_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/CreateBatch"}}},
    }
}


class OutputExpiresAfter(BaseModel):
    """Other keys than these are ignored."""

    model_config = ConfigDict(extra="allow")
    anchor: str
    seconds: int


class CreateBatch(BaseModel):
    """`completion_window`: 24h, or as an extension any whole hours or days from 1h to 14d.

    Other fields than these are ignored.
    """

    model_config = ConfigDict(extra="allow")
    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: OutputExpiresAfter | None = None

    @property
    def ignored(self) -> list[str]:
        """Fields that nobody knows, as they may stand in a header."""
        inside = [f"output_expires_after.{name}" for name in extras(self.output_expires_after)]
        return [plain(name) for name in (*extras(self), *inside)]

    def checked(self) -> NewBatch:
        """RequestError naming the field and what it may be."""
        life = self.output_expires_after
        return NewBatch(
            self.endpoint,
            self.input_file_id,
            self.completion_window,
            window_seconds(self.completion_window),
            check_metadata(self.metadata),
            None if life is None else life_seconds("output_expires_after", life.anchor, life.seconds),
        )


def batches_router(
    get_service: Callable[..., BatchService],
    get_owner: Callable[..., str],
    check_create: Callable[..., Awaitable[None]],
    field_log: FieldLog,
) -> APIRouter:
    """Dependencies: the service, who is asking, and ApiError when no batch may be created now or by them."""
    Service = Annotated[BatchService, Depends(get_service)]
    Owner = Annotated[str, Depends(get_owner)]
    router = APIRouter(prefix="/v1/batches", tags=["batches"])

    @router.post("", openapi_extra=_BODY, dependencies=[Depends(check_create)])
    async def create(request: Request, response: Response, service: Service, owner: Owner) -> dict[str, Any]:
        asked = _asked(await request.body())
        field_log.note(asked.ignored)
        response.headers.update(ignored_headers(asked.ignored))
        return shown(service, await service.create(owner, asked.checked()))

    @router.get("")
    async def page(
        service: Service,
        owner: Owner,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> dict[str, Any]:
        batches, has_more = await service.batches(owner, after, limit)
        return list_object([shown(service, batch) for batch in batches], has_more)

    @router.get("/{batch_id}")
    async def batch(batch_id: str, service: Service, owner: Owner) -> dict[str, Any]:
        return shown(service, await service.batch(owner, batch_id))

    @router.post("/{batch_id}/cancel")
    async def cancel(batch_id: str, service: Service, owner: Owner) -> dict[str, Any]:
        return shown(service, await service.cancel(owner, batch_id))

    return router


def _asked(raw: bytes) -> CreateBatch:
    """ApiError 400 naming the first field that is wrong."""
    try:
        return CreateBatch.model_validate(decoded(raw))
    except ValidationError as error:
        raise as_invalid(error.errors(include_url=False, include_context=False)) from None


def shown(service: BatchService, batch: BatchRecord) -> dict[str, Any]:
    """A batch with what the runner expects of it."""
    return batch_object(batch, service.runner.eta_s(batch), service.runner.status.lines_per_s)
