"""What the generating endpoints do, without HTTP: the order of checks, the place inside, the accounts.

Routes and lines of batches both come through here.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from omniserve.config import EngineConfig
from omniserve.errors import EngineDeadError, EngineGoneBeforeError, SloUnattainableError
from omniserve.server.attainment import Ended, Outcome
from omniserve.server.doors import Doors
from omniserve.server.engine_keeper import EngineKeeper
from omniserve.server.errors import CANCELLED_STATUS, QUEUE_TIMEOUT, ApiError, as_api_error, engine_ended
from omniserve.server.fields import FieldLog
from omniserve.server.generation import Generation, Run
from omniserve.server.metrics import ServerMetrics
from omniserve.server.prompts import check_counts
from omniserve.server.refusals import Refusal, RefusalLog
from omniserve.server.running import Running
from omniserve.server.settings import ServerConfig
from omniserve.server.tiers import BATCH_TIER, Tier, tier_of
from omniserve.server.work import CHAT, Origin, Reader, Work

logger = logging.getLogger("omniserve.server")

DISCONNECTED = "disconnected"
# Answers that say that the server could or would not serve, whatever the request was.
_TURNED_AWAY = (429, 503)


def new_answer_id(endpoint: str) -> str:
    return ("chatcmpl-" if endpoint == CHAT else "cmpl-") + uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class Endpoints:
    """The parts that a request passes."""

    keeper: EngineKeeper
    doors: Doors
    reader: Reader
    generation: Generation
    metrics: ServerMetrics
    refusals: RefusalLog
    field_log: FieldLog
    running: Running

    @property
    def state(self) -> str:
        """Whether requests are served, which they are when it is "ready" alone: the keeper's word, but for
        "stopping" and "unresponsive"."""
        if self.doors.is_draining:
            return "stopping"
        return "unresponsive" if self.keeper.is_silent else self.keeper.state

    def check_serving(self) -> None:
        """ApiError 503 when nothing can be served now: asked before a body is even read."""
        self.check_open()
        try:
            _ = self.keeper.llm
        except ApiError as error:
            self.metrics.unserved(error.reason)
            raise

    def check_open(self) -> None:
        """ApiError 503 once the server is about to stop: of work that can wait for an engine."""
        try:
            self.doors.check_serving()
        except ApiError as error:
            self.metrics.unserved(error.reason)
            raise

    @asynccontextmanager
    async def run(
        self, endpoint: str, body: Mapping[str, Any], origin: Origin
    ) -> AsyncIterator[tuple[Work, Run]]:
        """A request from its decoded body to its end, which is when this is left.

        Whatever goes wrong, here or inside, comes out as an ApiError.
        """
        is_line = origin.window_s is not None
        tier = BATCH_TIER if is_line else tier_of(body.get("service_tier"))
        origin.caller.check_tier(tier.asked)
        self.metrics.arrived(tier.service_class)
        started: Run | None = None
        try:
            with self.doors.enter(origin.request_id, origin.answer_id, tier, is_line):
                check_counts(body, self.keeper.llm.acceptance.max_model_len)
                work = self.reader.read(endpoint, body, tier, origin)
                self.field_log.note(work.ignored)
                started = self.generation.start(self.keeper.llm, work, origin)
                with self.running.hold(started):
                    yield work, started
        except asyncio.CancelledError:
            self._account(tier, origin, started, DISCONNECTED)
            self._judge_left(tier, origin, started)
            raise
        except Exception as error:
            told = self._told(error)
            if told.status_code == 500:
                logger.exception("request %s failed inside the server", origin.request_id)
            self._account(tier, origin, started, told.reason)
            self._judge(tier, started, told)
            if not is_line and (started is None or not started.has_token):
                self._note_refusal(tier, origin, told, error)
            raise told from error
        self._account(tier, origin, started, None)
        self._judge(tier, started, None)

    def _told(self, error: Exception) -> ApiError:
        """What the client hears of it."""
        if isinstance(error, EngineDeadError) and not isinstance(error, EngineGoneBeforeError):
            return engine_ended(self.keeper.is_steady)
        return as_api_error(error)

    def _judge(self, tier: Tier, run: Run | None, error: ApiError | None) -> None:
        """Whether it kept its targets, unless it could not be served as it was."""
        outcome = _outcome(run, error)
        if outcome is None:
            return
        if run is None:
            self.metrics.judged(Ended(tier.service_class, outcome, self.reader.slo_of(tier)))
            return
        slo = run.slo or self.reader.slo_of(tier)
        self.metrics.judged(Ended(tier.service_class, outcome, slo, run.ttft_s, run.tpot_s))

    def _judge_left(self, tier: Tier, origin: Origin, run: Run | None) -> None:
        """Its client went away: too late for its targets, or in time, which says nothing about them."""
        slo = (run and run.slo) or self.reader.slo_of(tier)
        waited_s = time.monotonic() - origin.arrived_s
        ttft_s, tpot_s = (run.ttft_s, run.tpot_s) if run is not None and run.has_token else (waited_s, None)
        self.metrics.judged(Ended(tier.service_class, "left", slo, ttft_s, tpot_s))

    def _note_refusal(self, tier: Tier, origin: Origin, told: ApiError, error: Exception) -> None:
        """For the operator, when it was turned away. error: before it was put into words for the client."""
        if told.status_code not in _TURNED_AWAY:
            return
        times: tuple[float, ...] = ()
        if isinstance(error, SloUnattainableError):
            times = (error.predicted_ttft_s, error.target_ttft_s)
        kind = tier.service_class
        self.refusals.note(Refusal(time.time(), origin.request_id, kind, told.reason, told.message, *times))

    def _account(self, tier: Tier, origin: Origin, run: Run | None, trouble: str | None) -> None:
        """One that never had a token was refused, whyever."""
        if run is None or not run.has_token:
            self.metrics.refused(tier.service_class, trouble or "unknown")
            return
        reason = trouble or run.outputs[0].finish_reason or "unknown"
        duration_s = time.monotonic() - origin.arrived_s
        self.metrics.finished(tier.service_class, reason, duration_s, run.served)


def make_endpoints(
    config: ServerConfig, engine_config: EngineConfig, keeper: EngineKeeper, names: Sequence[str]
) -> Endpoints:
    """The parts that a request passes. names: those of the model."""
    metrics = ServerMetrics(names[0], engine_config.classes, engine_config.page_size)
    return Endpoints(
        keeper=keeper,
        doors=Doors(config),
        reader=Reader(names, engine_config, is_shared=bool(config.api_keys)),
        generation=Generation(config, metrics),
        metrics=metrics,
        refusals=RefusalLog(),
        field_log=FieldLog(),
        running=Running(),
    )


def _outcome(run: Run | None, error: ApiError | None) -> Outcome | None:
    """As attainment counts it; None for a request that is its sender's fault."""
    if error is None:
        return "finished"
    if error.status_code in _TURNED_AWAY and error.code != QUEUE_TIMEOUT and not (run and run.has_token):
        return "refused"
    is_ours = error.status_code >= 500 or error.status_code in (*_TURNED_AWAY, CANCELLED_STATUS)
    return "failed" if is_ours else None
