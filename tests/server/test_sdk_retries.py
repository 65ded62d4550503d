"""The real SDK with its own retries: what it sends again by itself, and what it leaves to its user."""

from __future__ import annotations

import asyncio

import openai
import pytest

from omniserve.errors import SloUnattainableError
from omniserve.server import doors
from server.scripted import HELLO, PATIENCE_S, Stand, standing


def sdk(stand: Stand, timeout_s: float = PATIENCE_S, retries: int = 2) -> openai.AsyncOpenAI:
    url = stand.base_url + "/v1"
    return openai.AsyncOpenAI(base_url=url, api_key="x", timeout=timeout_s, max_retries=retries)


def test_a_chat_refused_for_its_target_is_sent_once() -> None:
    """Sent again, it would be a new arrival that looks on time."""

    async def story() -> None:
        async with standing() as stand, sdk(stand) as client:
            stand.llm.refuse_with = SloUnattainableError("its first token would be late", 2.5, 1.0)
            with pytest.raises(openai.RateLimitError) as caught:
                await client.chat.completions.create(model="tiny", messages=HELLO)  # type: ignore[arg-type]
            assert caught.value.code == "slo_unattainable"
            assert len(stand.llm.asked) == 1

    asyncio.run(story())


def test_flex_work_without_a_place_comes_again_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "WHEN_PAUSED_S", (0.001, 0.002))

    async def story() -> None:
        async with standing(before=9) as stand, sdk(stand) as client:
            stand.doors.is_paused = True
            with pytest.raises(openai.RateLimitError) as caught:
                await client.chat.completions.create(
                    model="tiny",
                    messages=HELLO,  # type: ignore[arg-type]
                    service_tier="flex",
                )
            assert caught.value.code == "resource_unavailable"
            (counts,) = stand.server.endpoints.refusals.as_plain()["counts"]
            assert counts["count"] == 3, "once, and twice more"

    asyncio.run(story())


def test_a_client_that_times_out_takes_its_request_with_it() -> None:
    async def story() -> None:
        async with standing() as stand, sdk(stand, timeout_s=0.2, retries=0) as client:
            with pytest.raises(openai.APITimeoutError):
                await client.chat.completions.create(model="tiny", messages=HELLO)  # type: ignore[arg-type]
            assert len(stand.llm.asked) == 1
            await stand.until(lambda: not stand.llm.running)

    asyncio.run(story())
