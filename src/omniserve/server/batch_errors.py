"""What refusals of the batch storage look like over HTTP. One table, and the handlers that use it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from omniserve.batch.errors import (
    ConflictError,
    NoDescriptorError,
    NotFoundError,
    QuotaError,
    StorageError,
    TooLargeError,
)
from omniserve.errors import OmniServeError, RequestError

# Error, HTTP status, OpenAI's error type, code. The SDK retries 409, 429 and 5xx by itself, and none of these
# gets better within seconds, so that all of them say x-should-retry: false.
_ANSWERS: tuple[tuple[type[OmniServeError], int, str, str | None], ...] = (
    (NotFoundError, 404, "invalid_request_error", None),
    (ConflictError, 409, "invalid_request_error", None),
    (TooLargeError, 413, "invalid_request_error", "file_too_large"),
    (QuotaError, 429, "insufficient_quota", "insufficient_quota"),
    (NoDescriptorError, 503, "server_error", "too_many_open_files"),
    (StorageError, 507, "server_error", "insufficient_storage"),
)


def add_batch_error_handlers(app: FastAPI) -> None:
    for kind, status, type_name, code in _ANSWERS:
        app.add_exception_handler(kind, _handler(status, type_name, code))


def _handler(
    status: int, type_name: str, code: str | None
) -> Callable[[Request, Exception], Awaitable[JSONResponse]]:
    async def answer(request: Request, error: Exception) -> JSONResponse:
        param = error.field if isinstance(error, RequestError) else None
        body = {"message": str(error), "type": type_name, "param": param, "code": code}
        return JSONResponse({"error": body}, status, {"x-should-retry": "false"})

    return answer
