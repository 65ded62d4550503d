"""Keeps an engine running: starts it, notices its end, starts it again. HTTP outlives every engine."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Literal

from omniserve.engine.async_llm import AsyncLLM
from omniserve.server.errors import unavailable

logger = logging.getLogger("omniserve.server")

State = Literal["loading", "ready", "restarting", "stopped"]
# Seconds between the end of an engine and the start of the next: none after one that served for a while, then
# twice as many each time.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
STEADY_S = 60.0
# An engine that is alive gives a sign every second, an idle one every two.
SILENT_S = 5.0


class EngineKeeper:
    """`run` it as a task. make: starts an engine, blocking; called on a thread of its own each time.

    max_failed_starts: so many in a row, after the first engine, end `run`; None: it tries for ever.
    """

    def __init__(self, make: Callable[[], AsyncLLM], max_failed_starts: int | None = None) -> None:
        self._make, self._max_failed_starts = make, max_failed_starts
        self._is_up = asyncio.Event()
        self._llm: AsyncLLM | None = None
        self.state: State = "loading"
        self._retired = asyncio.Event()
        self._up_s = 0.0
        self.num_restarts = 0

    @property
    def silent_s(self) -> float | None:
        """Seconds since the last sign of life of the engine that runs; None while there is none."""
        return None if self._llm is None else self._llm.silent_s

    @property
    def is_silent(self) -> bool:
        """Whether the engine that runs gives no sign of life; it is killed if it stays so for long."""
        return self.silent_s is not None and self.silent_s >= SILENT_S

    @property
    def is_steady(self) -> bool:
        """Whether the newest engine served for a while. Ends of engines that did not may have one cause."""
        return time.monotonic() - self._up_s >= STEADY_S

    @property
    def llm(self) -> AsyncLLM:
        """The engine that runs now; ApiError 503 while there is none."""
        if self._llm is None:
            code = "server_loading" if self.state == "loading" else "engine_unavailable"
            raise unavailable(f"no engine is running now (it is {self.state}); try again soon", code)
        return self._llm

    async def run(self) -> None:
        """Until it is cancelled, or retired and its engine has ended. Raises what the very first start failed
        with, and the last of too many."""
        pause_s, num_failed = 0.0, 0
        while True:
            began_s = time.monotonic()
            try:
                llm = await self._start()
            except Exception as error:
                num_failed += 1
                if self.state == "loading" or num_failed == self._max_failed_starts:
                    raise
                logger.error("the engine did not start: %s", error)
            else:
                num_failed = 0
                await self._serve(llm)
            if self._retired.is_set():
                return
            self.state = "restarting"
            is_steady = time.monotonic() - began_s >= STEADY_S
            pause_s = 0.0 if is_steady or self.num_restarts == 0 else pause_s
            await asyncio.sleep(pause_s)
            if self._retired.is_set():
                return
            pause_s = min(LONGEST_PAUSE_S, 2 * pause_s or FIRST_PAUSE_S)
            self.num_restarts += 1

    async def wait_up(self) -> None:
        """Until the first engine is up."""
        await self._is_up.wait()

    async def _serve(self, llm: AsyncLLM) -> None:
        self._llm, self.state, self._up_s = llm, "ready", time.monotonic()
        self._is_up.set()
        logger.info("the engine is up after %.1f s (pid %d)", llm.startup_s, llm.engine_pid)
        try:
            why = await llm.wait_ended()
        finally:
            self._llm, self.state = None, "stopped" if self._retired.is_set() else "restarting"
        if not self._retired.is_set():
            logger.error("%s; starting it again", why)
        await asyncio.to_thread(llm.close)

    async def _start(self) -> AsyncLLM:
        """On a daemon thread: a model that takes minutes to load must not hold up the end of the server."""
        loop = asyncio.get_running_loop()
        made: asyncio.Future[AsyncLLM] = loop.create_future()

        def deliver(llm: AsyncLLM | None, error: BaseException | None) -> None:
            if made.cancelled():
                if llm is not None:
                    llm.close()
            elif error is not None:
                made.set_exception(error)
            elif llm is not None:
                made.set_result(llm)

        def work() -> None:
            llm, failure = None, None
            try:
                llm = self._make()
                _ = llm.tokenizer.longest_token  # looks at the whole vocabulary, the first time
            except Exception as error:
                failure = error
            try:
                loop.call_soon_threadsafe(deliver, llm, failure)
            except RuntimeError:  # the loop is closed: nobody waits for it anymore
                if llm is not None:
                    llm.close()

        threading.Thread(target=work, name="omniserve-start", daemon=True).start()
        return await made

    def retire(self) -> None:
        """Start no other engine once the one that runs has ended."""
        self._retired.set()

    async def stop(self) -> None:
        """End the engine that runs, if one does."""
        self.retire()
        self.state = "stopped"
        if self._llm is not None:
            await asyncio.to_thread(self._llm.close)
