"""One attempt at a line of a batch: it is answered, put off, or given up for the engines that died of it."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from dataclasses import replace

from omniserve.batch.line_runner import (
    EngineGone,
    LineResponse,
    LineRunner,
    Request,
    decode_request,
    failure,
    is_not_now,
)
from omniserve.batch.records import BatchRecord, Line, LineResult
from omniserve.batch.results import answered, request_id_of
from omniserve.batch.store import Store
from omniserve.batch.suspicion import given_up, is_given_up
from omniserve.batch.writer import Writer

log = logging.getLogger(__name__)


class Attempts:
    """num_given_up: lines so far that run no more."""

    def __init__(
        self, store: Store, writer: Writer, line_runner: LineRunner, now: Callable[[], float]
    ) -> None:
        self._store, self._writer, self._line_runner, self._now = store, writer, line_runner, now
        self.num_given_up = 0

    async def make(self, batch: BatchRecord, line: Line) -> tuple[Line, LineResult | None]:
        """The line, with what is known of it now, and its result; None: it is to be tried again later.

        A fault of ours is its result too, or nobody would ever hear of the line again.
        """
        request = decode_request(line)
        try:
            return await self._made(batch, line, request)
        except Exception as error:
            response = _failed_inside(request_id_of(batch.id, line.number), error)
            return line, answered(
                batch.id, line.number, request.custom_id, response.status_code, response.body
            )

    async def _made(self, batch: BatchRecord, line: Line, request: Request) -> tuple[Line, LineResult | None]:
        response: LineResponse | None = None
        try:
            if not is_given_up(line):
                response = await self._answer(batch, line, request)
        except EngineGone:
            line = await self._noted_death(batch, line)
        if is_given_up(line):
            log.error("line %d of %s is given up: engines die of it", line.number, batch.id)
            response = given_up(line)
            self.num_given_up += 1
        if response is None:
            return line, None
        told = request.custom_id, response.status_code, response.body
        return line, answered(batch.id, line.number, *told)

    async def _noted_death(self, batch: BatchRecord, line: Line) -> Line:
        """The line with one more death, which is on disk before the line may run again."""
        log.info("line %d of %s was in an engine that died", line.number, batch.id)
        try:
            await self._writer.run(self._store.batches.note_death, batch.seq, line.number)
        except Exception:
            log.exception("the death could not be recorded; it counts until the server ends")
        return replace(line, num_deaths=line.num_deaths + 1)

    async def _answer(self, batch: BatchRecord, line: Line, request: Request) -> LineResponse | None:
        """None: the line was not run and is to be tried again. EngineGone."""
        if request.body is None:
            message = "the body is not valid JSON in UTF-8, or nested too deeply"
            return failure(400, message, "invalid_request_error", "invalid_json")
        seconds_left = max(0.0, batch.expires_at - self._now())
        request_id = request_id_of(batch.id, line.number)
        try:
            response = await self._line_runner.run_line(
                batch.owner, batch.endpoint, request.body, request_id, seconds_left
            )
        except EngineGone:
            raise
        except Exception as error:
            response = _failed_inside(request_id, error)
        return None if is_not_now(response) else response


def _failed_inside(request_id: str, error: Exception) -> LineResponse:
    """The log gets where it happened and not what the error says, which may quote the request."""
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s failed inside the server: %s\n%s", request_id, type(error).__name__, where)
    message = "the server failed while it ran this request"
    return failure(500, message, "server_error", "internal_error")
