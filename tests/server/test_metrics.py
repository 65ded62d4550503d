"""What /metrics says of requests and of the engine."""

import asyncio
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from omniserve.server.metrics import ServerMetrics
from server.scripted import standing

MODEL = {"model_name": "tiny", "engine": "0"}
CHAT, BATCH = "latency_sensitive", "best_effort"


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
    metrics.finished(CHAT, "stop", 7, 2, 0.3)
    assert value(metrics, "vllm:num_requests_running", **MODEL) == 0
    assert value(metrics, "vllm:prompt_tokens_total", **MODEL) == 7
    assert value(metrics, "vllm:generation_tokens_total", **MODEL) == 2
    assert value(metrics, "vllm:request_success_total", finished_reason="stop", **MODEL) == 1
    assert value(metrics, "vllm:time_to_first_token_seconds_sum", **MODEL) == pytest.approx(0.2)
    assert value(metrics, "vllm:inter_token_latency_seconds_count", **MODEL) == 1
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
    metrics.finished(BATCH, "length", 100, 50, 60.0)
    metrics.refused(BATCH, "resource_unavailable")
    assert {v for name, v in series(metrics) if name.startswith("vllm:")} == {0.0}
    assert value(metrics, "omniserve:output_tokens_total", service_class=BATCH) == 50


def test_a_scrape_asks_the_engine() -> None:
    async def story() -> None:
        async with standing() as stand:
            text = (await stand.http.get("/metrics")).text
            names = {f.name for f in text_string_to_metric_families(text)}
            assert value(text, "omniserve:pages", owner="host_lanes") == 3
            (usage,) = (
                s.value
                for f in text_string_to_metric_families(text)
                for s in f.samples
                if s.name == "vllm:kv_cache_usage_perc"
            )
            assert usage == 0.25, "pages of latency-sensitive requests alone"
            assert "omniserve:engine" in names

    asyncio.run(story())
