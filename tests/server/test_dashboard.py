"""The live page and its data: who may see them, what they say, and that nothing from users becomes markup."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from omniserve.config import EngineConfig
from omniserve.errors import SloUnattainableError
from omniserve.server.engine_keeper import SILENT_S
from omniserve.server.routes_dashboard import PAGE
from omniserve.server.settings import ApiKey
from omniserve.types import BEST_EFFORT, LATENCY_SENSITIVE, SLO
from server.scripted import Stand, standing

CHAT, FLEX = "latency_sensitive", "best_effort"
DATA = "/dashboard/data"
WITH_TARGETS = EngineConfig(classes=(replace(LATENCY_SENSITIVE, slo=SLO(1.0, 0.1)), BEST_EFFORT))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def told(stand: Stand, **query: Any) -> dict[str, Any]:
    """The data, brought up to date."""
    await stand.server.watch.look()
    answer = await stand.http.get(DATA, params=query)
    assert answer.status_code == 200
    return dict(answer.json())


# ---------------------------------------------------------------- who may see it


def test_with_an_admin_key_the_page_asks_for_it_and_the_data_are_for_it_alone() -> None:
    async def story() -> None:
        async with standing(api_keys=(ApiKey("sk-a"),), admin_key="sk-admin") as stand:
            page = await stand.http.get("/dashboard")
            assert page.status_code == 200
            assert page.headers["content-type"] == "text/html; charset=utf-8"
            assert page.text == PAGE.read_text(), "the same for everybody: nothing of the server is in it"
            for headers in ({}, bearer("sk-a"), bearer("sk-x"), {"authorization": "sk-admin"}):
                refused = await stand.http.get(DATA, headers=headers)
                assert refused.status_code == 401
                assert set(refused.json()) == {"error"}
            assert (await stand.http.get(f"{DATA}?key=sk-admin")).status_code == 401
            assert (await stand.http.get(f"{DATA}/", headers=bearer("sk-a"))).status_code == 401
            assert (await stand.http.get(DATA, headers=bearer("sk-admin"))).status_code == 200

    asyncio.run(story())


def test_without_an_admin_key_there_is_no_page_where_others_can_connect() -> None:
    async def story() -> None:
        async with standing(api_keys=(ApiKey("sk-a"),)) as stand:
            for path in ("/dashboard", DATA):
                answer = await stand.http.get(path, headers=bearer("sk-a"))
                assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")
                assert "--admin-key" in answer.json()["error"]["message"]
        async with standing() as stand:
            for path in ("/dashboard", DATA):
                assert (await stand.http.get(path)).status_code == 200

    asyncio.run(story())


# ---------------------------------------------------------------- the page


def test_only_the_pages_own_script_and_style_may_run_and_nothing_outside_is_asked() -> None:
    async def story() -> None:
        async with standing() as stand:
            answer = await stand.http.get("/dashboard")
            policy = dict(
                part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";")
            )
            assert policy["default-src"] == "'none'"
            assert policy["connect-src"] == "'self'"
            for tag in ("script", "style"):
                (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
                digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
                assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
            for name in ("base-uri", "form-action", "frame-ancestors", "trusted-types"):
                assert policy[name] == "'none'"
            assert policy["require-trusted-types-for"] == "'script'"
            assert answer.headers["x-content-type-options"] == "nosniff"

    asyncio.run(story())


def test_the_page_stands_alone() -> None:
    page = PAGE.read_text()
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*\s(?:src|href)=[\"'](?!data:)", page)
    assert not re.findall(r"@import|url\(", page)
    assert set(re.findall(r"https?://[\w./]+", page)) == {"http://www.w3.org/2000/svg"}, "a name, not a place"


def test_the_page_makes_markup_of_nothing() -> None:
    page = PAGE.read_text()
    for sink in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function("):
        assert sink not in page
    assert not re.findall(r"<[^>]*\son\w+=", page)
    assert not re.findall(r"<[^>]*\sstyle=", page)


# ---------------------------------------------------------------- the data


def test_a_quiet_server_says_so() -> None:
    async def story() -> None:
        async with standing(WITH_TARGETS) as stand:
            data = await told(stand)
            assert (data["server"]["state"], data["server"]["model"]) == ("ready", "tiny")
            chat, flex = data["classes"][CHAT], data["classes"][FLEX]
            assert chat["targets"] == {"ttft_s": 1.0, "tpot_s": 0.1}
            assert flex["targets"] is None
            assert (chat["attainment"], chat["num_offered"], chat["ttft_p99_s"]) == (None, 0, None)
            assert data["engine"]["pages"]["device_total"] == 8
            assert data["engine"]["host"]["state"] == "ready"
            assert data["refusals"] == {"counts": [], "last": []}
            assert data["batches"] is None

    asyncio.run(story())


def test_chats_that_end_show_in_attainment_times_tokens_and_history() -> None:
    async def story() -> None:
        async with standing(WITH_TARGETS, before=9) as stand:
            await told(stand)
            for _ in range(3):
                assert (await stand.chat(max_tokens=5)).status_code == 200
            stand.llm.refuse_with = SloUnattainableError("its first token would be late", 2.5, 1.0)
            assert (await stand.chat()).status_code == 429
            data = await told(stand)
            chat = data["classes"][CHAT]
            assert (chat["attainment"], chat["num_offered"]) == (0.75, 4)
            assert 0 < chat["ttft_p50_s"] <= chat["ttft_p99_s"] < 1
            columns = data["history"]["columns"]
            assert columns[f"{CHAT}.attainment"][-1] == 0.75
            assert columns[f"{CHAT}.ttft_p99_s"][-1] == pytest.approx(chat["ttft_p99_s"], rel=1e-3)
            assert columns["lanes"][-1] == 2

    asyncio.run(story())


def test_running_requests_show_how_long_they_wait_though_none_has_ended() -> None:
    nothing = {
        "num_waiting": 0,
        "longest_wait_s": None,
        "num_late": 0,
        "num_decoding": 0,
        "longest_gap_s": None,
    }

    async def story() -> None:
        async with standing(WITH_TARGETS, before=1) as stand:
            assert (await told(stand))["classes"][CHAT]["running"] == nothing
            async with stand.streaming() as (_, lines):
                await anext(lines)
                stand.llm.before = 0
                waiting = [asyncio.create_task(stand.chat(service_tier=tier)) for tier in ("auto", "flex")]
                await stand.until(lambda: len(stand.llm.running) == 3)
                first, late_s = await told(stand), time.monotonic() + 1.0
                await stand.until(lambda: time.monotonic() > late_s)
                second = await told(stand)
                stand.llm.go.set()
                await asyncio.gather(*waiting)
                assert [line async for line in lines]
            chat, flex = (second["classes"][name]["running"] for name in (CHAT, FLEX))
            assert (chat["num_waiting"], chat["num_late"], chat["num_decoding"]) == (1, 1, 1)
            assert (flex["num_waiting"], flex["num_late"], flex["num_decoding"]) == (1, 0, 0), "no target"
            assert chat["longest_wait_s"] > first["classes"][CHAT]["running"]["longest_wait_s"] > 0
            assert chat["longest_gap_s"] > first["classes"][CHAT]["running"]["longest_gap_s"] > 0
            assert (first["classes"][CHAT]["ttft_p99_s"], second["classes"][CHAT]["ttft_p99_s"]) == (
                None,
                None,
            )
            assert (await told(stand))["classes"][CHAT]["running"] == nothing

    asyncio.run(story())


def test_refusals_say_why_with_prediction_and_target_and_bad_requests_are_none() -> None:
    async def story() -> None:
        async with standing(WITH_TARGETS, max_best_effort_requests=1) as stand:
            stand.llm.refuse_with = SloUnattainableError("its first token would be late", 2.5, 1.0)
            await stand.chat(headers={"x-request-id": "mine"})
            stand.llm.refuse_with = None
            await stand.chat(temperature="hot")
            first = asyncio.create_task(stand.chat(service_tier="flex"))
            await stand.until(lambda: stand.llm.running)
            assert (await stand.chat(service_tier="flex")).status_code == 429
            stand.llm.go.set()
            assert (await first).status_code == 200
            newest, oldest = (await told(stand))["refusals"]["last"]
            assert (newest["code"], newest["service_class"]) == ("resource_unavailable", FLEX)
            assert newest["predicted_ttft_s"] is None
            assert (oldest["code"], oldest["request_id"]) == ("slo_unattainable", "mine")
            assert (oldest["predicted_ttft_s"], oldest["target_ttft_s"]) == (2.5, 1.0)
            assert oldest["why"] == "its first token would be late"

    asyncio.run(story())


def test_a_request_that_fails_after_its_first_token_was_not_refused() -> None:
    async def story() -> None:
        async with standing(before=1) as stand:
            async with stand.streaming() as (_, lines):
                await anext(lines)
                stand.llm.end.set()
                assert [line async for line in lines if "engine_unavailable" in line]
            assert (await told(stand))["refusals"]["last"] == []

    asyncio.run(story())


def test_the_page_says_of_a_silent_engine_what_ready_says() -> None:
    async def story() -> None:
        async with standing() as stand:
            stand.llm.silent_s = SILENT_S
            assert (await stand.http.get("/ready")).json()["status"] == "unresponsive"
            assert (await told(stand))["server"]["state"] == "unresponsive"

    asyncio.run(story())


def test_pausing_and_draining_show() -> None:
    async def story() -> None:
        async with standing() as stand:
            await stand.http.post("/admin/best_effort/pause")
            assert (await told(stand))["best_effort"]["is_paused"]
            await stand.http.post("/admin/best_effort/resume")
            assert not (await told(stand))["best_effort"]["is_paused"]
            stand.doors.is_draining = True
            assert (await told(stand))["server"]["state"] == "draining"

    asyncio.run(story())


def test_an_engine_that_died_is_not_shown_as_if_it_lived() -> None:
    async def story() -> None:
        async with standing() as stand:
            assert (await told(stand))["engine"] is not None
            stand.llm.end.set()
            await stand.until(lambda: stand.server.keeper.num_restarts == 1)
            await stand.until(lambda: stand.server.keeper.state == "ready")
            data = await told(stand)
            assert (data["server"]["num_restarts"], data["engine"]["age_s"] < 60) == (1, True)
            stand.server.keeper.state = "restarting"
            assert (await told(stand))["engine"] is None

    asyncio.run(story())


def test_an_engine_that_does_not_answer_holds_up_neither_page_nor_history() -> None:
    async def story() -> None:
        async with standing() as stand:
            await told(stand)
            stand.llm.is_silent = True
            before, after = await told(stand), await told(stand)
            assert after["engine"]["age_s"] > before["engine"]["age_s"] > 0
            assert after["engine"]["pages"] == before["engine"]["pages"], "as it was"
            assert after["history"]["columns"]["lanes"][-2:] == [None, None], "and not as if it were now"

    asyncio.run(story())


def test_looking_at_the_page_asks_the_engine_nothing() -> None:
    async def story() -> None:
        async with standing() as stand:
            await told(stand)
            await stand.until(lambda: stand.llm.num_stats >= 1)
            before = stand.llm.num_stats
            for _ in range(50):
                assert (await stand.http.get(DATA)).status_code == 200
            assert stand.llm.num_stats - before <= 2, "nothing but the look that comes every two seconds"

    asyncio.run(story())


def test_a_page_that_has_the_history_is_told_only_what_is_new() -> None:
    async def story() -> None:
        async with standing() as stand:
            at_s = (await told(stand))["history"]["at_s"]
            news = (await told(stand, since=at_s[-1]))["history"]
            assert news["at_s"]
            assert min(news["at_s"]) > at_s[-1]
            assert {len(values) for values in news["columns"].values()} == {len(news["at_s"])}
            for bad in ("nan", "inf", "soon"):
                assert (await stand.http.get(DATA, params={"since": bad})).status_code == 400

    asyncio.run(story())


def test_batches_of_everybody_show_with_their_names_as_plain_text(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    line = {"custom_id": evil, "method": "POST", "url": "/v1/chat/completions"}
    line |= {"body": {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}}

    async def story() -> None:
        keys = (ApiKey("sk-a", owner="team"),)
        async with standing(api_keys=keys, admin_key="sk-admin", state_dir=tmp_path / "s") as stand:
            own = bearer("sk-a")
            file = {"file": (evil + ".jsonl", json.dumps(line).encode() + b"\n"), "purpose": (None, "batch")}
            uploaded = (await stand.http.post("/v1/files", files=file, headers=own)).json()
            asked = {"input_file_id": uploaded["id"], "endpoint": line["url"], "completion_window": "24h"}
            asked["metadata"] = {"name": evil}
            batch = (await stand.http.post("/v1/batches", json=asked, headers=own)).json()
            await stand.until(lambda: stand.llm.running)
            await stand.server.watch.look()
            answer = await stand.http.get(DATA, headers=bearer("sk-admin"))
            assert answer.headers["content-type"] == "application/json"
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cache-control"] == "no-store"
            batches = answer.json()["batches"]
            (shown,) = batches["list"]
            assert (shown["id"], shown["owner"], shown["status"]) == (batch["id"], "team", "in_progress")
            assert (shown["label"], shown["filename"]) == (f"name: {evil}", f"{evil}.jsonl")
            assert (shown["total"], shown["completed"], batches["num_lines_left"]) == (1, 0, 1)
            assert shown["ended_at_s"] is None
            stand.llm.go.set()
            await stand.until(lambda: stand.server.batches.runner.status.num_batches == 0)
            await stand.server.watch.look()
            (shown,) = (await stand.http.get(DATA, headers=bearer("sk-admin"))).json()["batches"]["list"]
            assert (shown["status"], shown["completed"]) == ("completed", 1)

    asyncio.run(story())
