"""/v1/batches: thin routes over the batch service."""

# No deferred annotations here: FastAPI reads those of routes that are made inside a function.
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel

from omniserve.batch.limits import check_metadata, life_seconds, window_seconds
from omniserve.batch.objects import batch_object, list_object
from omniserve.batch.records import BatchRecord, NewBatch
from omniserve.batch.service import BatchService


class OutputExpiresAfter(BaseModel):
    anchor: str
    seconds: int


class CreateBatch(BaseModel):
    """`completion_window`: 24h, or as an extension any whole hours or days from 1h to 14d."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: OutputExpiresAfter | None = None

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


def batches_router(get_service: Callable[..., BatchService], get_owner: Callable[..., str]) -> APIRouter:
    """`get_service` and `get_owner` are dependencies: the service, and who is asking."""
    Service = Annotated[BatchService, Depends(get_service)]
    Owner = Annotated[str, Depends(get_owner)]
    router = APIRouter(prefix="/v1/batches", tags=["batches"])

    @router.post("")
    async def create(body: CreateBatch, service: Service, owner: Owner) -> dict[str, Any]:
        return shown(service, await service.create(owner, body.checked()))

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


def shown(service: BatchService, batch: BatchRecord) -> dict[str, Any]:
    """A batch with what the runner expects of it."""
    return batch_object(batch, service.runner.eta_s(batch), service.runner.status.lines_per_s)
