"""What goes wrong, in OpenAI's error shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException

from omniserve.errors import EngineDeadError, EngineGoneBeforeError, RequestError, SloUnattainableError

INVALID_REQUEST = "invalid_request_error"
# Codes that other parts act upon.
RESOURCE_UNAVAILABLE = "resource_unavailable"
SLO_UNATTAINABLE = "slo_unattainable"
QUEUE_TIMEOUT = "queue_timeout"
CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"

# The operator ended it. As nginx says of clients that are gone; the SDK does not retry it.
CANCELLED_STATUS = 499

# Seconds after which best-effort work that waited in vain is asked to come again, drawn so that not all come
# at once.
AFTER_TIMEOUT_S = (5.0, 20.0)

# The SDK retries these by itself, unless told not to.
NO_RETRY = {"x-should-retry": "false"}


class ApiError(HTTPException):
    """A refusal or failure as the client sees it. `reason` is the code, or the type where there is none."""

    def __init__(
        self,
        status_code: int,
        message: str,
        *,
        kind: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status_code, message, dict(headers or {}))
        self.message, self.kind, self.param, self.code = message, kind, param, code

    @property
    def reason(self) -> str:
        return self.code or self.kind

    @property
    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


def invalid(param: str | None, message: str, code: str | None = "invalid_value") -> ApiError:
    """A request that can never be served as it is."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, code: str) -> ApiError:
    """The server cannot serve at all now."""
    return ApiError(503, message, kind="server_error", code=code, headers={"retry-after": "2"})


def engine_ended(is_steady: bool) -> ApiError:
    """The engine ended while it had this request, which may be the cause of it.

    is_steady: it had served for a while. If not, the SDK is told not to send the request again by itself: one
    that ends engines would take two more with it, and everybody else's requests in them.
    """
    if is_steady:
        return unavailable("the engine ended while it had this request; try again", "engine_unavailable")
    message = (
        "the engine ended while it had this request, soon after its start, and the request may be the cause; "
        "the server's log says more. Try again once /ready says 200"
    )
    return ApiError(503, message, kind="server_error", code="engine_unavailable", headers=NO_RETRY)


def no_room(message: str, retry_after_s: float, may_retry: bool = True) -> ApiError:
    """The class has no room now; the request was not run. may_retry: by itself, as the SDK would."""
    headers = {
        "retry-after-ms": str(round(retry_after_s * 1000)),
        "retry-after": str(math.ceil(retry_after_s)),
    }
    if not may_retry:
        headers |= NO_RETRY
    return ApiError(429, message, kind="rate_limit_error", code=RESOURCE_UNAVAILABLE, headers=headers)


def timed_out(waited_s: float, is_best_effort: bool) -> ApiError:
    """A request waited too long for its first token. A chat that came again in silence would look on time."""
    message = f"no token within {waited_s:g} s, the queue timeout of this class; the request was given up"
    if is_best_effort:
        return no_room(message, random.uniform(*AFTER_TIMEOUT_S))
    return ApiError(429, message, kind="rate_limit_error", code=QUEUE_TIMEOUT, headers=NO_RETRY)


def _unattainable(error: SloUnattainableError) -> ApiError:
    """The SDK would retry a 429 in silence, and the same chat would come again as a new, timely arrival."""
    headers = NO_RETRY | {
        "x-omniserve-predicted-ttft-ms": str(round(error.predicted_ttft_s * 1000)),
        "x-omniserve-target-ttft-ms": str(round(error.target_ttft_s * 1000)),
    }
    return ApiError(
        429, error.reason, kind="rate_limit_error", param="slo", code=SLO_UNATTAINABLE, headers=headers
    )


def as_api_error(error: Exception) -> ApiError:
    """How a failure is told to the client; what nobody foresaw is a 500 that says nothing of the inside."""
    match error:
        case ApiError():
            return error
        case SloUnattainableError():
            return _unattainable(error)
        case RequestError():
            return invalid(error.field, f"{error.field}: {error.reason}")
        case EngineGoneBeforeError():
            return unavailable("no engine is running now; try again soon", "engine_unavailable")
        case EngineDeadError():
            return engine_ended(is_steady=True)
        case HTTPException(status_code=404):
            return ApiError(404, "unknown URL; see docs/api.md for the endpoints", code="unknown_url")
        case HTTPException(status_code=405):
            message = "this endpoint does not know that method"
            return ApiError(405, message, code="method_not_allowed", headers=error.headers)
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
    return ApiError(
        500, "the server failed while it ran this request", kind="server_error", code="internal_error"
    )
