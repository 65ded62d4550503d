"""What the server counts and times, in a Prometheus registry of its own.

`omniserve:*` has a label for the service class. `vllm:*` has vLLM's names and labels and counts
latency-sensitive requests alone, so that dashboards, autoscalers and gateways made for vLLM are not misled by
batch work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from omniserve.types import LATENCY_SENSITIVE

TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.75, 1.0, 2.5, 10.0)
LABEL = "service_class"
# Of AsyncLLM.stats(): docs/design.md says what each is.
ENGINE_NUMBERS = (
    "walks", "lane_passes", "device_tokens", "num_lane_tokens", "walk_s", "pass_s", "host_busy_share",
    "num_dropped", "num_displaced", "num_swapped_in", "num_broken_promises", "host_deaths", "num_refused",
    "uptime_s",
)  # fmt: skip


class VllmSeries(Collector):
    """vLLM's series, made of those of latency-sensitive requests when asked: nothing is counted twice.

    A request waits until its first token and runs from then to its end.
    """

    def __init__(self, own: ServerMetrics, model_name: str) -> None:
        self._own = own
        self._labels = {"model_name": model_name, "engine": "0"}

    def collect(self) -> Iterator[Metric]:
        own = self._own
        started = _total(own.ttft, "_count")
        ended = _total(own.num_finished, "_total")
        waiting = _total(own.num_arrived, "_total") - _total(own.num_refused, "_total") - started
        yield self._gauge("num_requests_waiting", "Requests without a token yet.", waiting)
        yield self._gauge("num_requests_running", "Requests that have tokens.", started - ended)
        usage = "Share of device pages that these requests hold, 0 to 1."
        yield self._gauge("kv_cache_usage_perc", usage, own.kv_usage)
        yield self._renamed(own.prompt_tokens, "prompt_tokens")
        yield self._renamed(own.output_tokens, "generation_tokens")
        yield self._renamed(own.num_finished, "request_success", {"reason": "finished_reason"})
        yield self._renamed(own.ttft, "time_to_first_token_seconds")
        yield self._renamed(own.gap, "inter_token_latency_seconds")
        yield self._renamed(own.duration, "e2e_request_latency_seconds")

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        metric = Metric(f"vllm:{name}", text, "gauge")
        metric.add_sample(metric.name, self._labels, value)
        return metric

    def _renamed(
        self, source: Counter | Histogram, name: str, labels: Mapping[str, str] = MappingProxyType({})
    ) -> Metric:
        """`source` under vLLM's name. labels: other names for its labels."""
        (own,) = source.collect()
        metric = Metric(f"vllm:{name}", own.documentation, own.type)
        for sample in _of_chats(own):
            kept = {labels.get(k, k): v for k, v in sample.labels.items() if k != LABEL}
            suffix = sample.name.removeprefix(own.name)
            metric.add_sample(metric.name + suffix, self._labels | kept, sample.value)
        return metric


def _of_chats(metric: Metric) -> Iterator[Sample]:
    for sample in metric.samples:
        if sample.labels[LABEL] == LATENCY_SENSITIVE.name and not sample.name.endswith("_created"):
            yield sample


def _total(source: Counter | Histogram, suffix: str) -> float:
    """Of latency-sensitive requests, whatever other labels they have."""
    (own,) = source.collect()
    return sum(sample.value for sample in _of_chats(own) if sample.name.endswith(suffix))


class ServerMetrics:
    """Per service class; seconds. Every request arrives once, and is then refused, or has a first token and
    is finished.

    What the engine itself counts comes from AsyncLLM.stats(), by `engine_state`, when somebody asks.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.kv_usage = 0.0
        self._pages = Gauge(
            "omniserve:pages", "Pages of KV by side and owner.", ("owner",), registry=self.registry
        )
        self._engine = Gauge(
            "omniserve:engine", "Numbers of the engine's stats().", ("name",), registry=self.registry
        )
        counter = self._counter
        self.num_arrived = counter("requests_total", "Requests that arrived.")
        self.num_refused = counter(
            "refused_total", "Requests that were not run, by code of the answer.", "reason"
        )
        self.num_finished = counter("finished_total", "Requests that ended, by how they did.", "reason")
        self.prompt_tokens = counter("prompt_tokens_total", "Prompt tokens of requests that ended.")
        self.output_tokens = counter("output_tokens_total", "Tokens generated for requests that ended.")
        ttft, gap = "Arrival to the first token.", "Gap between two tokens of one text."
        self.ttft = self._histogram("time_to_first_token_seconds", ttft, TTFT_BUCKETS)
        self.gap = self._histogram("inter_token_latency_seconds", gap, TOKEN_BUCKETS)
        self.duration = self._histogram("request_seconds", "Arrival to the end.", TTFT_BUCKETS)
        tokens, times = (self.prompt_tokens, self.output_tokens), (self.ttft, self.gap, self.duration)
        for one in (self.num_arrived, *tokens, *times):
            one.labels(LATENCY_SENSITIVE.name)  # 0 until something happens, not absent
        self.registry.register(VllmSeries(self, model_name))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"omniserve:{name}", text, (LABEL, *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"omniserve:{name}", text, (LABEL,), registry=self.registry, buckets=buckets)

    def arrived(self, service_class: str) -> None:
        self.num_arrived.labels(service_class).inc()

    def refused(self, service_class: str, reason: str) -> None:
        """reason: the code of the answer."""
        self.num_refused.labels(service_class, reason).inc()

    def first_token(self, service_class: str, ttft_s: float) -> None:
        self.ttft.labels(service_class).observe(ttft_s)

    def token_gap(self, service_class: str, s: float) -> None:
        self.gap.labels(service_class).observe(s)

    def finished(
        self, service_class: str, reason: str, num_prompt: int, num_output: int, duration_s: float
    ) -> None:
        """reason: "stop", "length", the code of an error, or "disconnected"."""
        self.num_finished.labels(service_class, reason).inc()
        self.prompt_tokens.labels(service_class).inc(num_prompt)
        self.output_tokens.labels(service_class).inc(num_output)
        self.duration.labels(service_class).observe(duration_s)

    def engine_state(self, stats: Mapping[str, Any]) -> None:
        """What AsyncLLM.stats() says now."""
        pages = stats["pages"]
        for owner, count in pages.items():
            self._pages.labels(owner).set(count)
        self.kv_usage = pages["device_latency_sensitive"] / max(1, pages["device_total"])
        for name in ENGINE_NUMBERS:
            self._engine.labels(name).set(stats[name])

    def exposition(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self.registry)
