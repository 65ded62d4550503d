"""The keeper of engines: one that ends is followed by another, as long as others can be started."""

from __future__ import annotations

import asyncio
import threading

import pytest

from omniserve.errors import EngineDeadError
from omniserve.server import engine_keeper
from omniserve.server.engine_keeper import EngineKeeper
from omniserve.server.errors import ApiError
from server.scripted import PATIENCE_S, ScriptedLLM


@pytest.mark.parametrize("limit", [1, 3])
def test_starts_that_fail_in_a_row_end_a_keeper_that_has_a_limit(
    monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(engine_keeper, "FIRST_PAUSE_S", 0.001)

    async def story() -> None:
        ready, made = [ScriptedLLM(), None, ScriptedLLM()], 0

        def make() -> ScriptedLLM:
            nonlocal made
            made += 1
            one = ready.pop(0) if ready else None
            if one is None:
                raise EngineDeadError("no memory")
            return one

        keeper = EngineKeeper(make, limit)  # type: ignore[arg-type]
        running = asyncio.create_task(keeper.run())
        await keeper.wait_up()
        keeper.llm.end.set()  # type: ignore[attr-defined]
        if limit > 1:
            while made < 3 or keeper.state != "ready":
                await asyncio.sleep(0.001)
            keeper.llm.end.set()  # type: ignore[attr-defined]
        with pytest.raises(EngineDeadError, match="no memory"):
            await running
        assert made == (2 if limit == 1 else 6), "one that did start begins the count anew"

    asyncio.run(story())


def test_a_keeper_is_not_ready_from_the_moment_its_engine_ends() -> None:
    """The end of an engine may take seconds to clear away, in which there is none."""
    cleared = threading.Event()

    class SlowToClose(ScriptedLLM):
        def close(self) -> None:
            assert cleared.wait(PATIENCE_S)

    async def story() -> None:
        keeper = EngineKeeper(SlowToClose)  # type: ignore[arg-type]
        running = asyncio.create_task(keeper.run())
        await keeper.wait_up()
        keeper.llm.end.set()  # type: ignore[attr-defined]
        while keeper._llm is not None:
            await asyncio.sleep(0.001)
        assert keeper.state == "restarting"
        with pytest.raises(ApiError, match="restarting"):
            _ = keeper.llm
        cleared.set()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(story())
