"""What the server counts and times, in a Prometheus registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.75, 1.0, 2.5, 10.0)
LABEL = "service_class"


class ServerMetrics:
    """Per service class; seconds. Every request arrives once, and is then refused or finished once.

    What the engine itself counts is not here: it comes from AsyncLLM.stats() when somebody asks.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
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

    def refused(self, service_class: str, reason: str) -> None:
        """reason: the code of the answer."""
        self._refused.labels(service_class, reason).inc()

    def first_token(self, service_class: str, ttft_s: float) -> None:
        self._ttft.labels(service_class).observe(ttft_s)

    def token_gap(self, service_class: str, s: float) -> None:
        self._gap.labels(service_class).observe(s)

    def finished(
        self, service_class: str, reason: str, num_prompt: int, num_output: int, duration_s: float
    ) -> None:
        """reason: "stop", "length", the code of an error, or "disconnected"."""
        self._finished.labels(service_class, reason).inc()
        self._prompt_tokens.labels(service_class).inc(num_prompt)
        self._output_tokens.labels(service_class).inc(num_output)
        self._duration.labels(service_class).observe(duration_s)

    def exposition(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self.registry)
