"""What the server counts and times, in a Prometheus registry of its own.

`omniserve:*` has a label for the service class. `vllm:*` has vLLM's names and labels and counts
latency-sensitive requests alone, so that dashboards, autoscalers and gateways made for vLLM are not misled by
batch work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from omniserve.types import BEST_EFFORT

TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.75, 1.0, 2.5, 10.0)
LABEL = "service_class"
VLLM_LABELS = ("model_name", "engine")
# Of AsyncLLM.stats(): docs/design.md says what each is.
ENGINE_NUMBERS = (
    "walks", "lane_passes", "device_tokens", "num_lane_tokens", "walk_s", "pass_s", "host_busy_share",
    "num_dropped", "num_displaced", "num_swapped_in", "num_broken_promises", "host_deaths", "num_refused",
    "uptime_s",
)  # fmt: skip


class VllmMetrics:
    """vLLM's series of its name, for requests that are not best-effort.

    A request waits until its first token and runs from then to its end.
    """

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._registry, self._values = registry, (model_name, "0")
        self.waiting = self._of(Gauge, "num_requests_waiting", "Requests without a token yet.")
        self.running = self._of(Gauge, "num_requests_running", "Requests that have tokens.")
        self.kv_usage = self._of(
            Gauge, "kv_cache_usage_perc", "Share of device pages that these requests hold, 0 to 1."
        )
        self.prompt_tokens = self._of(Counter, "prompt_tokens_total", "Prompt tokens of ended requests.")
        self.generation_tokens = self._of(Counter, "generation_tokens_total", "Tokens generated for them.")
        self._success = Counter(
            "vllm:request_success_total",
            "Requests that ended, by how they did.",
            (*VLLM_LABELS, "finished_reason"),
            registry=registry,
        )
        ttft, token = {"buckets": TTFT_BUCKETS}, {"buckets": TOKEN_BUCKETS}
        self.ttft = self._of(Histogram, "time_to_first_token_seconds", "Arrival to first token.", **ttft)
        self.gap = self._of(Histogram, "inter_token_latency_seconds", "Gap between two tokens.", **token)
        self.duration = self._of(Histogram, "e2e_request_latency_seconds", "Arrival to the end.", **ttft)

    def succeeded(self, reason: str) -> None:
        self._success.labels(*self._values, reason).inc()

    def _of(self, kind: type, name: str, text: str, **more: Any) -> Any:
        return kind(f"vllm:{name}", text, VLLM_LABELS, registry=self._registry, **more).labels(*self._values)


class ServerMetrics:
    """Per service class; seconds. Every request arrives once, and is then refused, or has a first token and
    is finished.

    What the engine itself counts comes from AsyncLLM.stats(), by `engine_state`, when somebody asks.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._vllm = VllmMetrics(self.registry, model_name)
        self._pages = Gauge(
            "omniserve:pages", "Pages of KV by side and owner.", ("owner",), registry=self.registry
        )
        self._engine = Gauge(
            "omniserve:engine", "Numbers of the engine's stats().", ("name",), registry=self.registry
        )
        counter = self._counter
        self._arrived = counter("requests_total", "Requests that arrived.")
        self._refused = counter(
            "refused_total", "Requests that were not run, by code of the answer.", "reason"
        )
        self._finished = counter("finished_total", "Requests that ended, by how they did.", "reason")
        self._prompt_tokens = counter("prompt_tokens_total", "Prompt tokens of requests that ended.")
        self._output_tokens = counter("output_tokens_total", "Tokens generated for requests that ended.")
        ttft, gap = "Arrival to the first token.", "Gap between two tokens of one text."
        self._ttft = self._histogram("time_to_first_token_seconds", ttft, TTFT_BUCKETS)
        self._gap = self._histogram("inter_token_latency_seconds", gap, TOKEN_BUCKETS)
        self._duration = self._histogram("request_seconds", "Arrival to the end.", TTFT_BUCKETS)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"omniserve:{name}", text, (LABEL, *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"omniserve:{name}", text, (LABEL,), registry=self.registry, buckets=buckets)

    def arrived(self, service_class: str) -> None:
        self._arrived.labels(service_class).inc()
        if service_class != BEST_EFFORT.name:
            self._vllm.waiting.inc()

    def refused(self, service_class: str, reason: str) -> None:
        """reason: the code of the answer."""
        self._refused.labels(service_class, reason).inc()
        if service_class != BEST_EFFORT.name:
            self._vllm.waiting.dec()

    def first_token(self, service_class: str, ttft_s: float) -> None:
        self._ttft.labels(service_class).observe(ttft_s)
        if service_class != BEST_EFFORT.name:
            self._vllm.waiting.dec()
            self._vllm.running.inc()
            self._vllm.ttft.observe(ttft_s)

    def token_gap(self, service_class: str, s: float) -> None:
        self._gap.labels(service_class).observe(s)
        if service_class != BEST_EFFORT.name:
            self._vllm.gap.observe(s)

    def finished(
        self, service_class: str, reason: str, num_prompt: int, num_output: int, duration_s: float
    ) -> None:
        """reason: "stop", "length", the code of an error, or "disconnected"."""
        self._finished.labels(service_class, reason).inc()
        self._prompt_tokens.labels(service_class).inc(num_prompt)
        self._output_tokens.labels(service_class).inc(num_output)
        self._duration.labels(service_class).observe(duration_s)
        if service_class != BEST_EFFORT.name:
            self._vllm.running.dec()
            self._vllm.prompt_tokens.inc(num_prompt)
            self._vllm.generation_tokens.inc(num_output)
            self._vllm.duration.observe(duration_s)
            self._vllm.succeeded(reason)

    def engine_state(self, stats: Mapping[str, Any]) -> None:
        """What AsyncLLM.stats() says now."""
        pages = stats["pages"]
        for owner, count in pages.items():
            self._pages.labels(owner).set(count)
        self._vllm.kv_usage.set(pages["device_latency_sensitive"] / max(1, pages["device_total"]))
        for name in ENGINE_NUMBERS:
            self._engine.labels(name).set(stats[name])

    def exposition(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self.registry)
