"""Tiers, targets and overload: who is served as what, who is turned away, how, and before what it costs."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from omniserve.config import EngineConfig
from omniserve.errors import SloUnattainableError
from omniserve.server.engine_keeper import SILENT_S
from omniserve.server.errors import timed_out
from omniserve.server.settings import ApiKey
from omniserve.server.tiers import Clamp
from omniserve.types import BEST_EFFORT, LATENCY_SENSITIVE, SLO, ServiceClass
from server.scripted import CHAT, COMPLETIONS, standing

CHAT_CLASS = ServiceClass("latency_sensitive", 0, False, SLO(1.0, 0.1), loosest=SLO(10.0, 1.0))
WITH_TARGETS = EngineConfig(classes=(CHAT_CLASS, BEST_EFFORT))


def error_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_the_tier_chooses_the_class_and_the_answer_states_the_one_that_was_got() -> None:
    async def story() -> None:
        async with standing(before=9) as stand:
            for asked, stated, kind in (
                (None, "default", "latency_sensitive"),
                ("auto", "default", "latency_sensitive"),
                ("default", "default", "latency_sensitive"),
                ("priority", "default", "latency_sensitive"),
                ("fast", "default", "latency_sensitive"),
                ("scale", "default", "latency_sensitive"),
                ("flex", "flex", "best_effort"),
            ):
                answer = await stand.chat(service_tier=asked)
                assert answer.json()["service_tier"] == stated
                assert stand.llm.asked[-1]["class"] == kind

    asyncio.run(story())


def test_best_effort_work_beyond_its_room_is_shed_before_it_costs_anything() -> None:
    async def story() -> None:
        async with standing(max_best_effort_requests=1) as stand:
            first = asyncio.create_task(stand.chat(service_tier="flex"))
            await stand.until(lambda: stand.llm.running)
            refused = [await stand.chat(service_tier="flex") for _ in range(4)]
            assert {error_of(r) for r in refused} == {(429, "resource_unavailable")}
            waits = [int(r.headers["retry-after-ms"]) for r in refused]
            assert all(0 < ms <= 120_000 for ms in waits)
            assert len(set(waits)) > 1, "clients do not come back all at once"
            assert "x-should-retry" not in refused[0].headers
            assert stand.llm.num_encoded == 1, "nothing of them was tokenised"
            chat = asyncio.create_task(stand.chat())
            await stand.until(lambda: len(stand.llm.running) == 2)
            stand.llm.go.set()
            assert {(await task).status_code for task in (first, chat)} == {200}
            assert (await stand.chat(service_tier="flex")).status_code == 200, "there is room again"

    asyncio.run(story())


def test_a_chat_that_would_miss_its_target_is_told_at_once_and_not_to_retry() -> None:
    async def story() -> None:
        async with standing(WITH_TARGETS) as stand:
            stand.llm.refuse_with = SloUnattainableError("its first token would be late", 2.5, 1.0)
            for stream in (False, True):
                refused = await stand.chat(stream=stream)
                assert error_of(refused) == (429, "slo_unattainable")
                assert refused.headers["x-should-retry"] == "false"
                assert refused.headers["x-omniserve-predicted-ttft-ms"] == "2500"
                assert refused.headers["x-omniserve-target-ttft-ms"] == "1000"
            metrics = (await stand.http.get("/metrics")).text
            labels = 'reason="slo_unattainable",service_class="latency_sensitive"'
            assert f"omniserve:refused_total{{{labels}}} 2.0" in metrics

    asyncio.run(story())


@pytest.mark.parametrize("stream", [False, True])
def test_a_long_chat_that_would_be_refused_whatever_its_tokens_are_is_never_tokenised(stream: bool) -> None:
    long = {"messages": [{"role": "user", "content": "x" * 2050}] * 2, "max_tokens": 3, "stream": stream}

    async def story() -> None:
        async with standing(WITH_TARGETS, before=9) as stand:
            stand.llm.refuse_with = SloUnattainableError("its first token would be late", 2.5, 1.0)
            refused = await stand.chat(**long)
            assert error_of(refused) == (429, "slo_unattainable")
            assert refused.headers["x-should-retry"] == "false"
            assert (stand.llm.num_encoded, stand.llm.asked) == (0, []), "neither tokenised nor sent"
            assert stand.llm.foreseen == [1], "a template may leave out all the rest"
            text = {"prompt": "x" * 4100, "stream": stream}
            assert error_of(await stand.http.post(COMPLETIONS, json=text)) == (429, "slo_unattainable")
            assert (stand.llm.num_encoded, stand.llm.foreseen.pop()) == (0, 4100)
            stand.llm.refuse_with = None
            fits = {"messages": [{"role": "user", "content": "x" * 4090}], "max_tokens": 3}
            assert (await stand.chat(**fits)).status_code == 200
            assert len(stand.llm.foreseen) == 1, "tokenising a short text costs less than asking"
            await stand.chat(**long, service_tier="flex")
            assert len(stand.llm.foreseen) == 1, "best-effort work has no targets"

    asyncio.run(story())


@pytest.mark.parametrize(("tier", "code"), [("default", "queue_timeout"), ("flex", "resource_unavailable")])
def test_who_waits_too_long_for_a_token_is_given_up(tier: str, code: str) -> None:
    async def story() -> None:
        async with standing(queue_timeout_s=0.02, best_effort_queue_timeout_s=0.02) as stand:
            for stream in (False, True):
                answer = await stand.chat(service_tier=tier, stream=stream)
                assert error_of(answer) == (429, code)
                assert ("x-should-retry" in answer.headers) == (tier == "default")
                assert not stand.llm.running, "the engine has forgotten it"

    asyncio.run(story())


def test_best_effort_work_that_waited_in_vain_does_not_come_back_all_at_once() -> None:
    waits = {timed_out(600.0, is_best_effort=True).headers["retry-after-ms"] for _ in range(20)}
    assert len(waits) > 1
    assert all(0 < int(ms) <= 120_000 for ms in waits)


def test_a_queue_timeout_of_0_is_none() -> None:
    async def story() -> None:
        async with standing(queue_timeout_s=0, best_effort_queue_timeout_s=0) as stand:
            waiting = [asyncio.create_task(stand.chat(service_tier=tier)) for tier in ("default", "flex")]
            await stand.until(lambda: len(stand.llm.running) == 2)
            stand.llm.go.set()
            assert [(await one).status_code for one in waiting] == [200, 200]

    asyncio.run(story())


def test_a_queue_timeout_ends_with_the_first_token() -> None:
    async def story() -> None:
        async with standing(before=1, queue_timeout_s=0.5) as stand, stand.streaming() as (_, lines):
            await anext(lines)
            await asyncio.sleep(0.6)
            stand.llm.go.set()
            assert [line async for line in lines][-2] == "data: [DONE]"

    asyncio.run(story())


@pytest.mark.parametrize(("lowest", "asked", "used"), [(0, -7, 0), (0, 3, 3), (None, -7, -7)])
def test_no_client_goes_before_all_others_unless_its_key_may(
    lowest: int | None, asked: int, used: int
) -> None:
    key = ApiKey("sk-a", clamp=Clamp(lowest_priority=lowest))

    async def story() -> None:
        async with standing(before=9, api_keys=(key,)) as stand:
            answer = await stand.chat(headers={"authorization": "Bearer sk-a"}, priority=asked)
            assert answer.status_code == 200
            assert stand.llm.asked[-1]["priority"] == used

    asyncio.run(story())


def test_headers_set_targets_within_every_clamp() -> None:
    key = ApiKey("sk-a", clamp=Clamp(tightest_ttft_s=2.0, loosest_tpot_s=0.5))

    async def story() -> None:
        async with standing(WITH_TARGETS, before=9, api_keys=(key,)) as stand:
            auth = {"authorization": "Bearer sk-a"}

            async def slo(**headers: str) -> Any:
                named = {f"x-slo-{name}-ms": value for name, value in headers.items()}
                answer = await stand.chat(headers=auth | named)
                assert answer.status_code == 200
                assert stand.llm.asked[-1]["slo"] is None or "x-slo-ttft-ms" in answer.headers
                return stand.llm.asked[-1]["slo"]

            assert await slo() == SLO(2.0, 0.1), "to say nothing is no way around a clamp"
            assert await slo(ttft="4000", tpot="200") == SLO(4.0, 0.2)
            assert await slo(ttft="4000") == SLO(4.0, 0.1)
            assert await slo(ttft="1", tpot="1") == SLO(2.0, 0.1), "no client promotes itself"
            assert await slo(ttft="9e9", tpot="9e9") == SLO(10.0, 0.5)
            for wrong in ("0", "-1", "nan", "inf", "soon"):
                answer = await stand.chat(headers=auth | {"x-slo-ttft-ms": wrong})
                assert answer.status_code == 400
                assert answer.json()["error"]["param"] == "x-slo-ttft-ms"
            flex = await stand.chat(headers=auth | {"x-slo-ttft-ms": "1"}, service_tier="flex")
            assert flex.headers["x-omniserve-ignored"] == "x-slo-ttft-ms"

    asyncio.run(story())


def test_a_request_without_headers_has_the_targets_of_its_class_within_its_keys_bounds() -> None:
    wide, tight = Clamp(tightest_ttft_s=0.5, loosest_ttft_s=5.0), Clamp(loosest_ttft_s=0.5)
    clamps = {"none": Clamp(), "wide": wide, "tighter than the class": tight, "loose": Clamp(20.0)}
    keys = tuple(ApiKey(name, clamp=clamp) for name, clamp in clamps.items())

    async def story() -> None:
        async with standing(WITH_TARGETS, before=9, api_keys=keys) as stand:
            found = []
            for name in clamps:
                answer = await stand.chat(headers={"authorization": f"Bearer {name}"})
                found.append((stand.llm.asked[-1]["slo"], answer.headers.get("x-slo-ttft-ms")))
            assert found == [(None, None)] * 3 + [(SLO(10.0, 0.1), "10000")]

        async with standing(before=9, api_keys=keys) as stand:
            assert (await stand.chat(headers={"authorization": "Bearer loose"})).status_code == 200
            assert stand.llm.asked[-1]["slo"] is None, "where nothing is promised there is nothing to bound"

    asyncio.run(story())


def test_targets_where_none_are_promised_are_refused() -> None:
    async def story() -> None:
        async with standing() as stand:
            answer = await stand.chat(headers={"x-slo-tpot-ms": "50"})
            assert answer.status_code == 400
            assert "--slo-ttft-s" in answer.json()["error"]["message"]

    assert LATENCY_SENSITIVE.slo is None
    asyncio.run(story())


def test_priority_goes_through_to_the_engine() -> None:
    async def story() -> None:
        async with standing(before=9) as stand:
            await stand.chat(priority=-3)
            await stand.chat()
            assert [asked["priority"] for asked in stand.llm.asked] == [-3, 0]

    asyncio.run(story())


def test_nothing_is_read_of_a_request_while_there_is_no_engine() -> None:
    async def story() -> None:
        async with standing() as stand:
            stand.server.keeper._llm, stand.server.keeper.state = None, "restarting"
            answer = await stand.http.post(CHAT, content=b"{broken")
            assert error_of(answer) == (503, "engine_unavailable")
            assert (await stand.http.get("/ready")).status_code == 503
            assert (await stand.http.get("/health")).status_code == 200

    asyncio.run(story())


def test_an_engine_that_gives_no_sign_of_life_is_not_ready_and_the_server_lives() -> None:
    async def story() -> None:
        async with standing() as stand:
            stand.llm.silent_s = SILENT_S
            ready = await stand.http.get("/ready")
            assert (ready.status_code, ready.json()["status"]) == (503, "unresponsive")
            assert (await stand.http.get("/health")).status_code == 200
            stand.llm.silent_s = 0.5
            assert (await stand.http.get("/ready")).status_code == 200

    asyncio.run(story())


def test_paused_best_effort_work_is_turned_away_until_it_is_resumed() -> None:
    async def story() -> None:
        async with standing() as stand:
            running = asyncio.create_task(stand.chat(service_tier="flex"))
            await stand.until(lambda: stand.llm.running)
            paused = (await stand.http.post("/admin/best_effort/pause")).json()
            assert paused == {"status": "paused", "num_requests": 1, "num_batch_lines": 0}
            assert error_of(await stand.chat(service_tier="flex")) == (429, "resource_unavailable")
            assert stand.llm.num_encoded == 1, "nothing of it was tokenised"
            drained = asyncio.create_task(stand.http.post("/admin/best_effort/drain"))
            stand.llm.go.set()
            assert (await stand.chat()).status_code == 200
            assert (await drained).json()["num_requests"] == 0
            assert (await running).status_code == 200, "what ran goes on"
            assert (await stand.http.post("/admin/best_effort/resume")).json()["status"] == "running"
            assert (await stand.chat(service_tier="flex")).status_code == 200

    asyncio.run(story())
