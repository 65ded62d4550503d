"""Lines of batches answered by the very code of the endpoints, as best-effort work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from omniserve.batch.line_runner import EngineGone, LineCancelled, LineResponse
from omniserve.batch.results import usage_of
from omniserve.errors import EngineDeadError, EngineGoneBeforeError
from omniserve.server.auth import Caller
from omniserve.server.endpoints import Endpoints
from omniserve.server.errors import ApiError, invalid
from omniserve.server.gate import current_request_id
from omniserve.server.generation import Run
from omniserve.server.work import CHAT, FIELDS, Origin


class EndpointLines:
    """A LineRunner. The tier of a line is that of batches, whatever its body says.

    caller_of: an owner as it would call itself, so that prefixes are cached and priorities bounded as those
    of its other requests.
    """

    def __init__(self, endpoints: Endpoints, caller_of: Callable[[str], Caller] = Caller) -> None:
        self._endpoints, self._caller_of = endpoints, caller_of

    async def run_line(
        self, owner: str, endpoint: str, body: Mapping[str, Any], request_id: str, seconds_left: float
    ) -> LineResponse:
        """EngineGone when the engine ended while it had the line, and only then."""
        current_request_id.set(request_id)  # in the line's own task
        prefix = "chatcmpl-" if endpoint == CHAT else "cmpl-"
        origin = Origin(
            caller=self._caller_of(owner),
            headers={},
            arrived_s=time.monotonic(),
            request_id=request_id,
            answer_id=prefix + request_id.removeprefix("batch_req_"),
            window_s=seconds_left,
        )
        try:
            _check(endpoint, body)
            async with self._endpoints.run(endpoint, body, origin) as (_, run):
                return LineResponse(200, await _whole(run))
        except ApiError as error:
            cause = error.__cause__
            if isinstance(cause, EngineDeadError) and not isinstance(cause, EngineGoneBeforeError):
                raise EngineGone(error.message) from error
            return LineResponse(error.status_code, error.body)


async def _whole(run: Run) -> dict[str, Any]:
    try:
        return await run.whole()
    except asyncio.CancelledError:
        if not run.has_token:
            raise
        raise LineCancelled(usage_of({"usage": run.usage})) from None


def _check(endpoint: str, body: Mapping[str, Any]) -> None:
    if endpoint not in FIELDS:
        raise invalid(None, f"url: {endpoint} cannot be used in a batch; use {', '.join(FIELDS)}")
    if body.get("stream"):
        raise invalid("stream", "stream: a line of a batch is answered as a whole; leave it out")
