"""Looks at the server every two seconds, keeps the last minutes, and tells the page."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from omniserve import __version__
from omniserve.batch.errors import StorageError
from omniserve.batch.service import BatchService
from omniserve.errors import EngineDeadError
from omniserve.server.attainment import WINDOW_S
from omniserve.server.dashboard.history import History, Number, Rates
from omniserve.server.dashboard.latest import Latest
from omniserve.server.dashboard.views import batch_view, class_view, engine_view
from omniserve.server.endpoints import Endpoints
from omniserve.server.errors import ApiError
from omniserve.types import ServiceClass

logger = logging.getLogger("omniserve.server")

EVERY_S, SPAN_S = 2.0, 900.0
# An engine or a disk that has not answered by then is shown as it was; the next look awaits the same answer.
PATIENCE_S = 1.0
# Open batches, and ended ones, that the page lists.
MAX_BATCHES = 12
TIMES = ("ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s")
OF_CLASS = (*TIMES, "attainment", "tokens_per_s")


@dataclass(frozen=True, slots=True)
class Pace:
    """Of the engine between two looks; None while nobody knows. host_busy_share: of its threads' time."""

    chat_tokens_per_s: Number = None
    best_effort_tokens_per_s: Number = None
    host_busy_share: Number = None

    def tokens_per_s(self, kind: ServiceClass) -> Number:
        return self.best_effort_tokens_per_s if kind.best_effort else self.chat_tokens_per_s


def pace_of(stats: Mapping[str, Any], rates: Rates) -> Pace:
    """From AsyncLLM.stats(), whose counters and clock begin anew with each engine."""
    now_s, on_device = stats["uptime_s"], stats["harvested_device_tokens"]
    return Pace(
        rates.per_s("chat", now_s, stats["device_tokens"] - on_device),
        rates.per_s("best effort", now_s, on_device + stats["harvested_lane_tokens"]),
        rates.per_s("host", now_s, stats["host_busy_share"] * now_s),
    )


class Watch:
    """`run` it as a task; `data` costs no question to anybody, however many pages are open."""

    def __init__(
        self,
        endpoints: Endpoints,
        classes: tuple[ServiceClass, ...],
        model_name: str,
        batches: BatchService | None,
    ) -> None:
        self._endpoints, self._classes = endpoints, {kind.name: kind for kind in classes}
        self._model_name, self._batches = model_name, batches
        self._started_s = time.monotonic()
        names = [f"{kind}.{name}" for kind in self._classes for name in OF_CLASS]
        self._history = History([*names, "lanes"], SPAN_S, round(SPAN_S / EVERY_S))
        self._rates = Rates()
        self._engine = Latest(self._ask_engine, (ApiError, EngineDeadError))
        self._stored = Latest(self._ask_batches, (StorageError,))
        self._now: dict[str, dict[str, Any]] = {}
        self._pace = Pace()

    async def run(self) -> None:
        """Until it is cancelled."""
        try:
            while True:
                began_s = time.monotonic()
                try:
                    await self.look()
                except Exception:  # a page that stands still must not be all that tells of it
                    logger.exception("the live page could not be brought up to date")
                await asyncio.sleep(began_s + EVERY_S - time.monotonic())
        finally:
            self._engine.close()
            self._stored.close()

    async def look(self) -> None:
        """Bring everything up to date, and add a row to the history."""
        asked = [self._engine.refresh(PATIENCE_S)]
        if self._batches is not None:
            asked.append(self._stored.refresh(PATIENCE_S))
        await asyncio.gather(*asked)
        # What an engine that is silent said last is not as it is now.
        stats = None if self._engine.is_open else self._engine.value
        self._pace = Pace() if stats is None else pace_of(stats, self._rates)
        now_s = time.monotonic()
        ended = self._endpoints.metrics.attainment.snapshot(now_s)
        running = self._endpoints.running.snapshot(self._classes, now_s)
        self._now = {
            name: class_view(kind, asdict(ended[name]), asdict(running[name]), self._pace.tokens_per_s(kind))
            for name, kind in self._classes.items()
        }
        row: dict[str, Number] = {
            f"{kind}.{name}": shown[name] for kind, shown in self._now.items() for name in OF_CLASS
        }
        if stats is not None:
            row["lanes"] = stats["requests"]["lane"]
        self._history.add(time.time(), row)

    async def _ask_engine(self) -> dict[str, Any]:
        return await self._endpoints.keeper.llm.stats()

    async def _ask_batches(self) -> list[dict[str, Any]]:
        assert self._batches is not None
        eta_s = self._batches.runner.eta_s
        found = await self._batches.overview(MAX_BATCHES)
        return [batch_view(batch, filename, eta_s(batch)) for batch, filename in found]

    def data(self, since_s: float) -> dict[str, Any]:
        """Everything the page shows; of the history, what is later than `since_s`."""
        return {
            "now_s": time.time(),
            "every_s": EVERY_S,
            "span_s": SPAN_S,
            "window_s": WINDOW_S,
            "server": self._server_view(),
            "best_effort": self._best_effort_view(),
            "classes": self._now,
            "engine": self._engine_view(),
            "refusals": self._endpoints.refusals.as_plain(),
            "batches": self._batches_view(),
            "history": self._history.since(since_s),
        }

    def _server_view(self) -> dict[str, Any]:
        state = self._endpoints.state
        return {
            "model": self._model_name,
            "version": __version__,
            "state": "draining" if state == "stopping" else state,
            "num_restarts": self._endpoints.keeper.num_restarts,
            "uptime_s": time.monotonic() - self._started_s,
        }

    def _best_effort_view(self) -> dict[str, Any]:
        doors = self._endpoints.doors
        lines = 0 if self._batches is None else self._batches.runner.status.num_running
        num_requests = doors.count(best_effort=True)
        return {"is_paused": doors.is_paused, "num_requests": num_requests, "num_lines": lines}

    def _engine_view(self) -> dict[str, Any] | None:
        stats = self._engine.value
        if stats is None or self._endpoints.keeper.state != "ready":
            return None
        age_s = asyncio.get_running_loop().time() - self._engine.at_s
        return engine_view(stats, self._pace.host_busy_share, age_s)

    def _batches_view(self) -> dict[str, Any] | None:
        """None on a server without a state directory."""
        if self._batches is None:
            return None
        status = self._batches.runner.status
        return {
            "list": self._stored.value or [],
            "trouble": status.trouble or self._stored.trouble,
            "num_open": status.num_batches,
            "num_lines_left": status.num_lines_left,
            "lines_per_s": status.lines_per_s,
        }
