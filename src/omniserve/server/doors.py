"""Who may come in now: room for each class, best-effort work paused or not, and the end of the server."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from omniserve.server.errors import ApiError, no_room, unavailable
from omniserve.server.settings import ServerConfig
from omniserve.server.tiers import Tier

# Seconds after which a refused client is asked to come again, drawn so that not all come at once. The SDK
# takes no advice above 120 s.
WHEN_FULL_S = (1.0, 10.0)
WHEN_PAUSED_S = (20.0, 60.0)


@dataclass(slots=True, eq=False)
class Guest:
    """A request inside. is_line: of a batch; ended_by: why it is to end, set before its task is cancelled."""

    request_id: str
    answer_id: str
    tier: Tier
    is_line: bool
    task: asyncio.Task[object]
    ended_by: ApiError | None = None

    def end(self, why: ApiError) -> None:
        if self.ended_by is None:
            self.ended_by = why
            self.task.cancel()


class Doors:
    """Knows every request from before its body is looked at closely until its answer has ended.

    Lines of batches take no place of others: their number has a bound of its own.
    """

    def __init__(self, config: ServerConfig, rng: random.Random | None = None) -> None:
        self._config, self._rng = config, rng or random.Random()
        self._guests: set[Guest] = set()
        self._left = asyncio.Event()
        self.is_paused = False
        self.is_draining = False

    def count(self, best_effort: bool) -> int:
        """Requests inside that are no lines of batches."""
        return sum(g.tier.is_best_effort is best_effort and not g.is_line for g in self._guests)

    def check_serving(self) -> None:
        """ApiError 503 once the server is about to stop."""
        if self.is_draining:
            raise unavailable("the server is stopping; send this to another, or later", "server_stopping")

    def _check_room(self, tier: Tier, is_line: bool) -> None:
        self.check_serving()
        if tier.is_best_effort and self.is_paused:
            message = (
                "best-effort work is paused by the operator; try again later, or with service_tier 'auto'"
            )
            raise no_room(message, self._rng.uniform(*WHEN_PAUSED_S))
        limit = self._config.max_best_effort_requests if tier.is_best_effort else self._config.max_requests
        if not is_line and self.count(tier.is_best_effort) >= limit:
            kind = "best-effort" if tier.is_best_effort else "latency-sensitive"
            message = f"all {limit} places for {kind} requests are taken; try again later"
            # A chat that came again in silence would be a new, timely arrival.
            raise no_room(message, self._rng.uniform(*WHEN_FULL_S), may_retry=tier.is_best_effort)

    @contextmanager
    def enter(self, request_id: str, answer_id: str, tier: Tier, is_line: bool = False) -> Iterator[Guest]:
        """A place inside for the task at hand. ApiError when there is none, or it is told to end."""
        self._check_room(tier, is_line)
        task = asyncio.current_task()
        assert task is not None
        guest = Guest(request_id, answer_id, tier, is_line, task)
        self._guests.add(guest)
        try:
            yield guest
        except asyncio.CancelledError:
            if guest.ended_by is None:
                raise
            task.uncancel()
            raise guest.ended_by from None
        finally:
            self._guests.discard(guest)
            self._left.set()

    def end_request(self, request_id: str, why: ApiError) -> int:
        """End those with this id, of the request or of its answer; how many there were."""
        found = [g for g in self._guests if request_id in (g.request_id, g.answer_id)]
        for guest in found:
            guest.end(why)
        return len(found)

    def end_all(self, why: ApiError) -> None:
        for guest in list(self._guests):
            guest.end(why)

    async def wait_empty(self, best_effort: bool) -> None:
        """Until nobody of that kind is inside; lines of batches are the batches' own affair."""
        while self.count(best_effort):
            self._left.clear()
            await self._left.wait()
