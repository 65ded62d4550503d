"""What /metrics says of requests and of the engine."""

import asyncio
import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from omniserve.batch.jobs import RunnerStatus
from omniserve.config import EngineConfig
from omniserve.errors import EngineDeadError, SloUnattainableError
from omniserve.server import scrape
from omniserve.server.attainment import MISSED
from omniserve.server.metrics import ServerMetrics
from omniserve.server.served import Served
from omniserve.server.server_series import BatchFacts, ServerFacts
from omniserve.types import BEST_EFFORT, SLO, RequestMetrics, ServiceClass
from server.scripted import HELLO, PATIENCE_S, standing

MODEL = {"model_name": "tiny", "engine": "0"}
CHAT, BATCH = "latency_sensitive", "best_effort"
# Handed to the engine 0.01 s after its arrival, begun after 0.06, first token after 0.2, last after 0.25.
TIMES = RequestMetrics(0.2, 0.05, num_cached_tokens=4, queued_s=0.01, started_s=0.06, last_token_s=0.25)
SERVED = Served(7, 4, 2, 2, 1, 16, TIMES)


def value(metrics: ServerMetrics | str, name: str, **labels: str) -> float | None:
    text = metrics if isinstance(metrics, str) else metrics.exposition().decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return float(sample.value)
    return None


def series(metrics: ServerMetrics) -> Iterator[tuple[str, float]]:
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                yield sample.name, sample.value


def test_a_chat_waits_runs_and_ends_in_the_series_of_vllm() -> None:
    metrics = ServerMetrics("tiny")
    for _ in range(3):
        metrics.arrived(CHAT)
    metrics.refused(CHAT, "slo_unattainable")
    metrics.first_token(CHAT, 0.2)
    assert value(metrics, "vllm:num_requests_waiting", **MODEL) == 1
    assert value(metrics, "vllm:num_requests_running", **MODEL) == 1
    metrics.token_gap(CHAT, 0.05)
    metrics.finished(CHAT, "stop", 0.3, SERVED)
    assert value(metrics, "vllm:num_requests_running", **MODEL) == 0
    assert value(metrics, "vllm:prompt_tokens_total", **MODEL) == 7
    assert value(metrics, "vllm:generation_tokens_total", **MODEL) == 2
    assert value(metrics, "vllm:request_success_total", finished_reason="stop", **MODEL) == 1
    assert value(metrics, "vllm:time_to_first_token_seconds_sum", **MODEL) == pytest.approx(0.2)
    assert value(metrics, "vllm:inter_token_latency_seconds_count", **MODEL) == 1
    assert value(metrics, "vllm:request_time_per_output_token_seconds_sum", **MODEL) == pytest.approx(0.05)
    assert value(metrics, "vllm:e2e_request_latency_seconds_count", **MODEL) == 1
    labels = {"reason": "slo_unattainable", "service_class": CHAT}
    assert value(metrics, "omniserve:refused_total", **labels) == 1


def test_batch_work_is_in_no_series_of_vllm() -> None:
    """Gateways and autoscalers would take it for chats that wait."""
    metrics = ServerMetrics("tiny")
    metrics.arrived(BATCH)
    metrics.first_token(BATCH, 4.0)
    metrics.token_gap(BATCH, 1.0)
    metrics.arrived(BATCH)
    metrics.finished(BATCH, "length", 60.0, SERVED)
    metrics.refused(BATCH, "resource_unavailable")
    assert {v for name, v in series(metrics) if name.startswith("vllm:")} == {0.0}
    assert value(metrics, "omniserve:output_tokens_total", service_class=BATCH) == 2


def histogram(metrics: ServerMetrics | str, name: str) -> tuple[float | None, float | None]:
    """How many, and their sum."""
    return value(metrics, f"vllm:{name}_count", **MODEL), value(metrics, f"vllm:{name}_sum", **MODEL)


def test_what_waits_waits_for_capacity_in_the_series_of_vllm() -> None:
    metrics = ServerMetrics("tiny")
    for service_class in (CHAT, CHAT, BATCH):
        metrics.arrived(service_class)
    metrics.first_token(CHAT, 0.2)
    name = "vllm:num_requests_waiting_by_reason"
    assert value(metrics, name, reason="capacity", **MODEL) == 1
    assert value(metrics, name, reason="deferred", **MODEL) == 0
    assert value(metrics, "vllm:num_requests_waiting", **MODEL) == 1, "their sum"


def test_a_chat_that_ended_shows_what_its_time_went_to() -> None:
    metrics = ServerMetrics("tiny")
    metrics.finished(CHAT, "stop", 0.3, SERVED)
    for name, s in (("queue", 0.05), ("prefill", 0.14), ("decode", 0.05), ("inference", 0.19)):
        assert histogram(metrics, f"request_{name}_time_seconds") == (1, pytest.approx(s))


def test_a_chat_whose_engine_has_told_no_start_is_in_no_series_of_intervals() -> None:
    metrics = ServerMetrics("tiny")
    metrics.finished(CHAT, "stop", 0.3, replace(SERVED, metrics=RequestMetrics(0.2, queued_s=0.01)))
    for name in ("queue", "prefill", "decode", "inference"):
        assert histogram(metrics, f"request_{name}_time_seconds") == (0, 0)
    assert histogram(metrics, "request_prompt_tokens") == (1, 7)


def test_a_request_of_two_prompts_shows_its_sizes_and_what_was_cached_of_it() -> None:
    async def story() -> None:
        async with standing(before=9) as stand:
            stand.llm.metrics = TIMES
            body = {"model": "tiny", "prompt": ["Hello", "Goodbye"], "max_tokens": 3}
            for tier in ("default", "flex"):
                answer = await stand.http.post("/v1/completions", json=body | {"service_tier": tier})
                assert answer.status_code == 200
            text = (await stand.http.get("/metrics")).text
            assert histogram(text, "request_prompt_tokens") == (1, 12)
            assert histogram(text, "request_prefill_kv_computed_tokens") == (1, 12 - 2 * 4)
            assert histogram(text, "request_generation_tokens") == (1, 6)
            assert histogram(text, "request_max_num_generation_tokens") == (1, 3)
            assert histogram(text, "request_params_n") == (1, 1)
            assert histogram(text, "request_params_max_tokens") == (1, 3)
            assert value(text, "vllm:prompt_tokens_cached_total", **MODEL) == 8
            sources = {"local_compute": 4, "local_cache_hit": 8, "external_kv_transfer": 0}
            for source, count in sources.items():
                assert value(text, "vllm:prompt_tokens_by_source_total", source=source, **MODEL) == count
            assert histogram(text, "request_queue_time_seconds")[0] == 1

    asyncio.run(story())


def test_max_tokens_is_counted_of_requests_that_say_it() -> None:
    async def story() -> None:
        async with standing(before=9) as stand:
            assert (await stand.chat()).status_code == 200
            text = (await stand.http.get("/metrics")).text
            assert histogram(text, "request_params_max_tokens") == (0, 0)
            assert histogram(text, "request_params_n") == (1, 1)

    asyncio.run(story())


# Bounds of vLLM's buckets; those of sizes end at a model's context length there, at a million here.
SECONDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6)
HISTOGRAMS = {
    **{f"request_{name}_time_seconds": SECONDS for name in ("queue", "prefill", "decode", "inference")},
    "request_prompt_tokens": TOKENS,
    "request_prefill_kv_computed_tokens": TOKENS,
    "request_generation_tokens": TOKENS,
    "request_max_num_generation_tokens": TOKENS,
    "request_params_max_tokens": TOKENS,
    "request_params_n": (1, 2, 5, 10, 20),
}


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_histograms_have_the_buckets_and_labels_of_vllm(name: str) -> None:
    text = ServerMetrics("tiny").exposition().decode()
    (family,) = (f for f in text_string_to_metric_families(text) if f.name == f"vllm:{name}")
    assert family.type == "histogram"
    buckets = [s.labels for s in family.samples if s.name.endswith("_bucket")]
    assert [float(labels["le"]) for labels in buckets] == [*HISTOGRAMS[name], math.inf]
    assert all(labels == {**MODEL, "le": labels["le"]} for labels in buckets)


def test_a_scrape_asks_the_engine() -> None:
    async def story() -> None:
        async with standing() as stand:
            text = (await stand.http.get("/metrics")).text
            assert value(text, "omniserve:pages", owner="host_lanes") == 3
            assert value(text, "omniserve:lanes_in_flight") == 2
            assert value(text, "omniserve:ready") == 1
            usage = value(text, "vllm:kv_cache_usage_perc", **MODEL)
            assert usage == 0.25, "pages of latency-sensitive requests alone"
            assert value(text, "vllm:prefix_cache_queries_total", **MODEL) == 40
            assert value(text, "vllm:prefix_cache_hits_total", **MODEL) == 10
            assert value(text, "vllm:num_preemptions_total", **MODEL) == 0
            sizes = {"block_size": "16", "num_gpu_blocks": "8"}
            assert value(text, "vllm:cache_config_info", **MODEL, **sizes) == 1

    asyncio.run(story())


def test_a_scrape_between_two_engines_keeps_the_counters_and_no_gauge_of_the_dead_one() -> None:
    may_start = threading.Event()

    async def story() -> None:
        async with standing() as stand:
            make = stand.server.keeper._make

            def make_when_allowed() -> Any:
                assert may_start.wait(PATIENCE_S)
                return make()

            stand.server.keeper._make = make_when_allowed
            stand.llm.counted = {"walks": 70}
            await stand.http.get("/metrics")
            stand.llm.end.set()
            await stand.until(lambda: stand.server.keeper.state == "restarting")
            between = (await stand.http.get("/metrics")).text
            may_start.set()
            await stand.until(lambda: len(stand.engines) == 2 and stand.server.keeper.state == "ready")
            after = (await stand.http.get("/metrics")).text
            assert value(between, "omniserve:walks_total") == 70
            assert value(between, "omniserve:ready") == 0
            assert value(between, "omniserve:host_up") is None
            assert value(between, "vllm:kv_cache_usage_perc", **MODEL) == 0
            assert value(after, "omniserve:walks_total") == 77, "the new engine has walked 7 times"
            assert value(after, "omniserve:engine_restarts_total") == 1
            assert value(after, "omniserve:host_up") == 1

    asyncio.run(story())


def test_how_long_the_engine_is_silent_is_told_while_there_is_one() -> None:
    async def story() -> None:
        async with standing() as stand:
            stand.llm.silent_s = 7.5
            assert value((await stand.http.get("/metrics")).text, "omniserve:engine_silent_seconds") == 7.5
            stand.server.keeper._llm, stand.server.keeper.state = None, "restarting"
            assert value((await stand.http.get("/metrics")).text, "omniserve:engine_silent_seconds") is None

    asyncio.run(story())


def test_an_engine_that_does_not_answer_does_not_silence_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrape, "ANSWER_S", 0.01)

    async def story() -> None:
        async with standing() as stand:
            await stand.http.get("/metrics")
            stand.llm.is_silent = True
            text = (await stand.http.get("/metrics")).text
            assert value(text, "omniserve:walks_total") == 7
            assert value(text, "omniserve:lanes_in_flight") is None, "nobody knows"

    asyncio.run(story())


# ---------------------------------------------------------------- attainment

CHAT_CLASS = ServiceClass(CHAT, 0, False, SLO(10.0, 0.1))
WITH_TARGETS = EngineConfig(classes=(CHAT_CLASS, BEST_EFFORT))


def missed(text: str) -> dict[str, float | None]:
    name = "omniserve:slo_missed_total"
    return {what: value(text, name, service_class=CHAT, what=what) for what in MISSED}


def test_a_chat_counts_as_kept_or_by_what_it_missed() -> None:
    async def story() -> None:
        async with standing(WITH_TARGETS, before=9) as stand:
            assert (await stand.chat()).status_code == 200
            assert (await stand.chat(headers={"x-slo-ttft-ms": "10000"})).status_code == 200
            stand.llm.tpot_s = 0.2
            assert (await stand.chat()).status_code == 200
            stand.llm.refuse_with = SloUnattainableError("its first token would be late", 2.5, 1.0)
            assert (await stand.chat()).status_code == 429
            stand.llm.refuse_with = EngineDeadError("gone")
            assert (await stand.chat()).status_code == 503
            text = (await stand.http.get("/metrics")).text
            assert value(text, "omniserve:slo_met_total", service_class=CHAT) == 2
            assert missed(text) == {"ttft": 0, "tpot": 1, "refused": 2, "failed": 0}
            assert value(text, "omniserve:offered_requests", service_class=CHAT) == 5
            assert value(text, "omniserve:attainment_ratio", service_class=CHAT) == 0.4
            assert (value(text, "omniserve:goodput_requests_per_second", service_class=CHAT) or 0) > 0

    asyncio.run(story())


def test_who_is_given_up_or_cancelled_by_the_server_counts_as_failed() -> None:
    async def story() -> None:
        async with standing(WITH_TARGETS, queue_timeout_s=0.05) as stand:
            assert (await stand.chat()).status_code == 429, "no token in time"
            stand.llm.before = 1
            async with stand.streaming({"x-request-id": "one"}) as (_, lines):
                await anext(lines)
                assert (await stand.http.post("/admin/requests/one/cancel")).status_code == 200
                assert any("request_cancelled" in line for line in [line async for line in lines])
            assert missed((await stand.http.get("/metrics")).text)["failed"] == 2

    asyncio.run(story())


def test_invalid_requests_and_clients_that_leave_in_time_are_not_offered() -> None:
    async def story() -> None:
        async with standing(WITH_TARGETS, before=1) as stand:
            assert (await stand.chat(max_tokens="many")).status_code == 400
            assert (await stand.chat(model="another")).status_code == 404
            async with stand.streaming() as (_, lines):
                await anext(lines)
            await stand.until(lambda: not stand.doors.count(best_effort=False))
            text = (await stand.http.get("/metrics")).text
            labels = {"service_class": CHAT, "reason": "disconnected"}
            assert value(text, "omniserve:finished_total", **labels) == 1
            assert value(text, "omniserve:offered_requests", service_class=CHAT) == 0
            assert value(text, "omniserve:attainment_ratio", service_class=CHAT) is None

    asyncio.run(story())


def test_who_leaves_when_a_target_is_missed_already_was_served_too_late() -> None:
    """A server that answers nobody would else look as good as one that is not asked."""

    async def story() -> None:
        async with standing(WITH_TARGETS) as stand:
            with pytest.raises(httpx.ReadTimeout):
                await stand.http.post("/v1/chat/completions", json={"messages": HELLO}, timeout=0.2)
            await stand.until(lambda: not stand.doors.count(best_effort=False))
            assert missed((await stand.http.get("/metrics")).text) == dict.fromkeys(MISSED, 0)

        at_once = EngineConfig(classes=(replace(CHAT_CLASS, slo=SLO(0.05, 0.1)), BEST_EFFORT))
        async with standing(at_once) as stand:
            with pytest.raises(httpx.ReadTimeout):
                await stand.http.post("/v1/chat/completions", json={"messages": HELLO}, timeout=0.2)
            await stand.until(lambda: not stand.doors.count(best_effort=False))
            stand.llm.before, stand.llm.tpot_s = 2, 0.2
            async with stand.streaming() as (_, lines):
                await anext(lines)
            await stand.until(lambda: not stand.doors.count(best_effort=False))
            text = (await stand.http.get("/metrics")).text
            assert missed(text)["ttft"] >= 1
            assert sum(missed(text).values()) == 2, "the other one by its later tokens, or by the first too"
            assert value(text, "omniserve:slo_met_total", service_class=CHAT) == 0
            assert value(text, "omniserve:attainment_ratio", service_class=CHAT) == 0

    asyncio.run(story())


def test_a_class_without_targets_has_no_attainment() -> None:
    async def story() -> None:
        async with standing(WITH_TARGETS, before=9) as stand:
            assert (await stand.chat(service_tier="flex")).status_code == 200
            text = (await stand.http.get("/metrics")).text
            for name in ("attainment_ratio", "goodput_requests_per_second", "slo_met_total"):
                assert value(text, f"omniserve:{name}", service_class=BATCH) is None

    asyncio.run(story())


def test_requests_before_there_is_an_engine_are_counted_without_a_class() -> None:
    async def story() -> None:
        async with standing() as stand:
            stand.doors.is_draining = True
            assert (await stand.chat()).status_code == 503
            text = (await stand.http.get("/metrics")).text
            assert value(text, "omniserve:unserved_total", reason="server_stopping") == 1
            assert value(text, "omniserve:ready") == 0

    asyncio.run(story())


# ---------------------------------------------------------------- batches and the disk


def test_best_effort_work_that_is_paused_says_by_whom(tmp_path: Path) -> None:
    async def story() -> None:
        async with standing(state_dir=tmp_path / "state") as stand:
            await stand.http.post("/admin/best_effort/pause")
            text = (await stand.http.get("/metrics")).text
            assert value(text, "omniserve:best_effort_paused", reason="operator") == 1
            assert (value(text, "omniserve:state_free_bytes") or 0) > 0
            assert value(text, "omniserve:open_batches") == 0
            assert value(text, "omniserve:batch_eta_seconds") is None, "nobody knows the pace yet"

    asyncio.run(story())


@pytest.mark.parametrize(
    ("free_bytes", "trouble", "is_held"),
    [(1000, None, False), (999, None, True), (None, None, False), (1000, "the disk is full", True)],
)
def test_a_disk_that_is_full_or_fails_holds_best_effort_work(
    free_bytes: int | None, trouble: str | None, is_held: bool
) -> None:
    metrics = ServerMetrics("tiny")
    status = RunnerStatus(False, 2, 30, 4, 1.5, trouble, 1, 20.0, num_given_up=3)
    metrics.server.facts = ServerFacts(batches=BatchFacts(status, free_bytes, 1000))
    assert value(metrics, "omniserve:best_effort_paused", reason="disk") == is_held
    assert value(metrics, "omniserve:best_effort_paused", reason="operator") == 0
    assert value(metrics, "omniserve:overdue_batches") == 1
    assert value(metrics, "omniserve:batch_eta_seconds") == 20
    assert value(metrics, "omniserve:batch_lines_given_up_total") == 3
    assert value(metrics, "omniserve:state_free_bytes") == free_bytes
