"""vLLM's series, by vLLM's names, types and labels: docs/metrics.md has every one.

They count latency-sensitive requests alone, so that dashboards, autoscalers and gateways made for vLLM are
not misled by batch work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from omniserve.server.engine_series import EngineSeries
from omniserve.server.served import Served
from omniserve.types import LATENCY_SENSITIVE, RequestMetrics

if TYPE_CHECKING:
    from omniserve.server.metrics import ServerMetrics

# Of this server's own series of requests.
LABEL = "service_class"
# vLLM's: intervals of a request, in seconds.
INTERVAL_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
)  # fmt: skip
# vLLM's 1, 2, 5, 10 ... end at the context length of the model, which is not known until an engine is there.
SIZE_BUCKETS = (*(float(digit * 10**zeros) for zeros in range(6) for digit in (1, 2, 5)), 1e6)
COUNT_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0)
SOURCES = COMPUTED, CACHED, TRANSFERRED = "local_compute", "local_cache_hit", "external_kv_transfer"
_LABELS = ("model_name", "engine")


class VllmRequests:
    """Series that are made of no other: times and sizes of latency-sensitive requests that ended."""

    def __init__(self, model_name: str, registry: CollectorRegistry) -> None:
        self._labels, self._registry = (model_name, "0"), registry
        interval, size = self._interval, self._size
        self._queue = interval("queue", "Handed to the engine until it began with the prompt.")
        self._prefill = interval("prefill", "From then to the first token.")
        self._decode = interval("decode", "First token to the last.")
        self._inference = interval("inference", "Engine began with the prompt until the last token.")
        self._prompt = size("request_prompt_tokens", "Prompt tokens of a request.")
        self._computed = size("request_prefill_kv_computed_tokens", "Prompt tokens that were not cached.")
        self._output = size("request_generation_tokens", "Tokens generated for a request.")
        self._longest = size("request_max_num_generation_tokens", "Tokens of the longest text of a request.")
        self._max_tokens = size("request_params_max_tokens", "max_tokens of requests that say it.")
        self._n = self._histogram("request_params_n", "n of a request.", COUNT_BUCKETS)
        cached = self._counter("prompt_tokens_cached", "Prompt tokens found in the prefix cache.")
        self._cached = cached.labels(*self._labels)
        by_source = self._counter(
            "prompt_tokens_by_source", "Prompt tokens by where their KV is from.", "source"
        )
        self._by_source = {source: by_source.labels(*self._labels, source) for source in SOURCES}

    def _interval(self, name: str, text: str) -> Histogram:
        return self._histogram(f"request_{name}_time_seconds", text, INTERVAL_BUCKETS)

    def _size(self, name: str, text: str) -> Histogram:
        return self._histogram(name, text, SIZE_BUCKETS)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"vllm:{name}", text, _LABELS, registry=self._registry, buckets=buckets)
        return histogram.labels(*self._labels)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"vllm:{name}", text, (*_LABELS, *labels), registry=self._registry)

    def finished(self, served: Served) -> None:
        """Of a latency-sensitive request."""
        num_computed = served.num_prompt - served.num_cached
        self._prompt.observe(served.num_prompt)
        self._computed.observe(num_computed)
        self._output.observe(served.num_output)
        self._longest.observe(served.num_longest)
        self._n.observe(served.num_texts)
        if served.max_tokens is not None:
            self._max_tokens.observe(served.max_tokens)
        self._cached.inc(served.num_cached)
        self._by_source[COMPUTED].inc(num_computed)
        self._by_source[CACHED].inc(served.num_cached)
        self._observe_times(served.metrics)

    def _observe_times(self, times: RequestMetrics) -> None:
        """Nothing of a request whose engine has not told when it began."""
        queued_s, started_s = times.queued_s, times.started_s
        first_s, last_s = times.ttft_s, times.last_token_s
        if queued_s is None or started_s is None or first_s is None or last_s is None:
            return
        self._queue.observe(started_s - queued_s)
        self._prefill.observe(first_s - started_s)
        self._decode.observe(last_s - first_s)
        self._inference.observe(last_s - started_s)


class VllmSeries(Collector):
    """vLLM's series, made of those of latency-sensitive requests when asked: nothing is counted twice.

    A request waits until its first token and runs from then to its end.
    """

    def __init__(self, own: ServerMetrics, model_name: str, page_size: int) -> None:
        self._own, self._page_size = own, page_size
        self._labels = {"model_name": model_name, "engine": "0"}

    def collect(self) -> Iterator[Metric]:
        own = self._own
        started = _total(own.ttft, "_count")
        ended = _total(own.num_finished, "_total")
        waiting = _total(own.num_arrived, "_total") - _total(own.num_refused, "_total") - started
        yield self._gauge("num_requests_waiting", "Requests without a token yet.", waiting)
        yield self._waiting_by_reason(waiting)
        yield self._gauge("num_requests_running", "Requests that have tokens.", started - ended)
        usage = "Share of device pages that these requests hold, 0 to 1."
        yield self._gauge("kv_cache_usage_perc", usage, own.engine.kv_usage)
        yield self._renamed(own.prompt_tokens, "prompt_tokens")
        yield self._renamed(own.output_tokens, "generation_tokens")
        yield self._renamed(own.num_finished, "request_success", {"reason": "finished_reason"})
        yield self._renamed(own.ttft, "time_to_first_token_seconds")
        yield self._renamed(own.gap, "inter_token_latency_seconds")
        yield self._renamed(own.tpot, "request_time_per_output_token_seconds")
        yield self._renamed(own.duration, "e2e_request_latency_seconds")
        yield from self._of_the_engine(own.engine)

    def _of_the_engine(self, engine: EngineSeries) -> Iterator[Metric]:
        chats = "device_latency_sensitive"
        for name, text, source in (
            ("num_preemptions", "Requests whose KV was given up.", ("broken_promises",)),
            ("prefix_cache_queries", "Tokens looked up.", ("prefix_cache_queried_tokens", chats)),
            ("prefix_cache_hits", "Tokens found.", ("prefix_cache_hit_tokens", chats)),
        ):
            metric = Metric(f"vllm:{name}", text, "counter")
            metric.add_sample(f"{metric.name}_total", self._labels, engine.total(*source))
            yield metric
        config = Metric("vllm:cache_config_info", "Tokens of a device page, and how many there are.", "gauge")
        if engine.num_device_pages is not None:
            sizes = {"block_size": str(self._page_size), "num_gpu_blocks": str(engine.num_device_pages)}
            config.add_sample(config.name, self._labels | sizes, 1.0)
        yield config

    def _waiting_by_reason(self, waiting: float) -> Metric:
        """Together num_requests_waiting. Nothing is deferred: there is no LoRA, and no KV comes from afar."""
        by_reason = Metric("vllm:num_requests_waiting_by_reason", "The same, by what they wait for.", "gauge")
        for reason, count in (("capacity", waiting), ("deferred", 0.0)):
            by_reason.add_sample(by_reason.name, self._labels | {"reason": reason}, count)
        return by_reason

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
