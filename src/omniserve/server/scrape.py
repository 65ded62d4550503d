"""One scrape of /metrics: asks every part how it is, then tells."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from omniserve.batch.service import BatchService
from omniserve.errors import EngineDeadError
from omniserve.server.endpoints import Endpoints
from omniserve.server.server_series import BatchFacts, ServerFacts
from omniserve.types import BEST_EFFORT, LATENCY_SENSITIVE

# An engine answers between two steps. One that does not is as good as gone; Prometheus waits 10 s at most.
ANSWER_S = 5.0


class Scrape:
    """batches: None on a server without a state directory."""

    def __init__(self, endpoints: Endpoints, batches: BatchService | None) -> None:
        self._endpoints, self._batches = endpoints, batches
        self._started_s = time.monotonic()

    async def exposition(self) -> bytes:
        """Everything in Prometheus's text format. Whatever is down, this answers."""
        metrics = self._endpoints.metrics
        await self._ask_engine()
        metrics.server.facts = self._facts(await self._batch_facts())
        return metrics.exposition()

    async def _ask_engine(self) -> None:
        keeper, series = self._endpoints.keeper, self._endpoints.metrics.engine
        engine = keeper.num_restarts
        if keeper.state == "ready":
            with suppress(EngineDeadError, TimeoutError):
                async with asyncio.timeout(ANSWER_S):
                    stats = await keeper.llm.stats()
                series.note(engine, stats)
                return
        series.gone()

    async def _batch_facts(self) -> BatchFacts | None:
        if self._batches is None:
            return None
        free_bytes = None
        with suppress(OSError):
            free_bytes = await self._batches.free_bytes()
        return BatchFacts(self._batches.runner.status, free_bytes, self._batches.limits.reserve_bytes)

    def _facts(self, batches: BatchFacts | None) -> ServerFacts:
        doors, keeper = self._endpoints.doors, self._endpoints.keeper
        return ServerFacts(
            is_ready=self._endpoints.state == "ready",
            num_restarts=keeper.num_restarts,
            engine_silent_s=keeper.silent_s,
            uptime_s=time.monotonic() - self._started_s,
            in_flight={
                LATENCY_SENSITIVE.name: doors.count(best_effort=False),
                BEST_EFFORT.name: doors.count(best_effort=True),
            },
            is_paused=doors.is_paused,
            batches=batches,
        )
