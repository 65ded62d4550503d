"""/v1/files: thin routes over the batch service. A file's name is shown again and never opened."""

# No deferred annotations here: FastAPI reads those of routes that are made inside a function.
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse

from omniserve.batch.errors import TooLargeError
from omniserve.batch.limits import life_seconds
from omniserve.batch.objects import file_object, list_object
from omniserve.batch.records import FileRecord
from omniserve.batch.service import BatchService, Upload
from omniserve.errors import RequestError
from omniserve.server.multipart import Part, form_parts

# Bytes of a form beside its file.
MAX_FORM_BYTES = 64 * 1024
# Of a number in a form; one that is longer is out of every range.
MAX_DIGITS = 20
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
                    },
                }
            }
        },
    }
}


def files_router(
    get_service: Callable[..., BatchService],
    get_owner: Callable[..., str],
    check_upload: Callable[..., Awaitable[None]],
) -> APIRouter:
    """Dependencies: the service, who is asking, and ApiError when no upload is taken now."""
    Service = Annotated[BatchService, Depends(get_service)]
    Owner = Annotated[str, Depends(get_owner)]
    router = APIRouter(prefix="/v1/files", tags=["files"])

    @router.post("", openapi_extra=_FORM, dependencies=[Depends(check_upload)])
    async def upload(request: Request, service: Service, owner: Owner) -> dict[str, Any]:
        _check_length(request, service.limits.max_file_bytes)
        return file_object(await _Receiver(service, owner).receive(request))

    @router.get("")
    async def page(
        service: Service,
        owner: Owner,
        purpose: str | None = None,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        files, has_more = await service.files(owner, purpose, after, limit, order == "desc")
        return list_object([file_object(file) for file in files], has_more)

    @router.get("/{file_id}")
    async def file(file_id: str, service: Service, owner: Owner) -> dict[str, Any]:
        return file_object(await service.file(owner, file_id))

    @router.delete("/{file_id}")
    async def delete(file_id: str, service: Service, owner: Owner) -> dict[str, Any]:
        await service.delete_file(owner, file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    @router.get("/{file_id}/content", response_class=StreamingResponse)
    async def content(file_id: str, service: Service, owner: Owner) -> StreamingResponse:
        found, pieces = await service.open_file(owner, file_id)
        headers = {
            "content-length": str(found.bytes),
            "content-disposition": f"attachment; filename*=utf-8''{quote(found.filename, safe='')}",
            "x-content-type-options": "nosniff",
        }
        return StreamingResponse(pieces, media_type="application/octet-stream", headers=headers)

    return router


def _check_length(request: Request, max_file_bytes: int) -> None:
    """A body that says that it is too large is refused before it is read."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_file_bytes + MAX_FORM_BYTES:
        raise TooLargeError("file", f"is larger than {max_file_bytes} bytes; split it")


class _Receiver:
    """Takes in one form: the file goes to disk as it comes, the fields around it are gathered."""

    def __init__(self, service: BatchService, owner: str) -> None:
        self._service, self._owner = service, owner
        self._upload: Upload | None = None
        self._file: Part | None = None
        self._fields: dict[str, bytes] = {}

    async def receive(self, request: Request) -> FileRecord:
        try:
            async for part, data in form_parts(request):
                await self._take(part, data)
            if self._upload is None or self._file is None:
                raise RequestError("file", "is missing")
            life_s = self._checked_life()
            return await self._upload.accept(self._file.filename or "", life_s)
        finally:
            if self._upload is not None:
                await self._upload.abandon()  # which does nothing to one that was accepted

    async def _take(self, part: Part, data: bytes) -> None:
        if part.name != "file":
            self._fields[part.name] = self._fields.get(part.name, b"") + data
            if sum(map(len, self._fields.values())) > MAX_FORM_BYTES:
                raise RequestError(
                    part.name, f"the form holds more than {MAX_FORM_BYTES} bytes beside the file"
                )
            return
        if self._upload is None:
            self._file, self._upload = part, await self._service.begin_upload(self._owner)
        if part is not self._file:
            raise RequestError("file", "was sent twice; one file for each request")
        await self._upload.write(data)

    def _checked_life(self) -> int | None:
        """Checks the fields; seconds that the file is to live, where they say so."""
        fields = {name: value.decode("utf-8", "replace") for name, value in self._fields.items()}
        if fields.get("purpose") != "batch":
            raise RequestError("purpose", f"must be 'batch', got {fields.get('purpose')!r}")
        anchor, seconds = (fields.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
        if anchor is None and seconds is None:
            return None
        is_number = seconds is not None and len(seconds) <= MAX_DIGITS and seconds.isdecimal()
        return life_seconds("expires_after", anchor, int(seconds or 0) if is_number else seconds)
