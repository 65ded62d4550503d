"""What the server counts and times, in a Prometheus registry of its own: docs/metrics.md has every series.

`omniserve:*` has a label for the service class. `vllm:*` has vLLM's names and labels and counts
latency-sensitive requests alone (vllm_series.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from omniserve.server.attainment import MISSED, Ended, LiveAttainment
from omniserve.server.engine_series import EngineSeries
from omniserve.server.served import Served
from omniserve.server.server_series import AttainmentSeries, ServerSeries
from omniserve.server.vllm_series import LABEL, VllmRequests, VllmSeries
from omniserve.types import DEFAULT_CLASSES, LATENCY_SENSITIVE, ServiceClass

TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.75, 1.0, 2.5, 10.0)


class ServerMetrics:
    """Per service class; seconds. Every request arrives once, and is then refused, or has a first token and
    is finished.

    page_size: tokens of a device page. attainment: the window of live figures. engine, server: what a scrape
    finds out and hands in.
    """

    def __init__(
        self,
        model_name: str,
        classes: Sequence[ServiceClass] = DEFAULT_CLASSES,
        page_size: int = 16,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.registry = CollectorRegistry()
        self._clock = clock
        self.attainment = LiveAttainment(classes, clock())
        self.engine, self.server = EngineSeries(), ServerSeries()
        counter = self._counter
        self.num_arrived = counter("requests_total", "Requests that arrived.")
        self.num_refused = counter(
            "refused_total", "Requests that were not run, by code of the answer.", "reason"
        )
        self.num_finished = counter("finished_total", "Requests that ended, by how they did.", "reason")
        self.num_unserved = Counter(
            "omniserve:unserved_total",
            "Requests answered 503 before their body was read, so that nobody knows their class.",
            ("reason",),
            registry=self.registry,
        )
        self.num_met = counter("slo_met_total", "Requests that kept their targets.")
        self.num_missed = counter("slo_missed_total", "Requests that missed their targets, by what.", "what")
        self.prompt_tokens = counter("prompt_tokens_total", "Prompt tokens of requests that ended.")
        self.output_tokens = counter("output_tokens_total", "Tokens generated for requests that ended.")
        ttft, gap = "Arrival to the first token.", "Gap between two tokens of one text."
        tpot = "Mean time of a token after the first of a request that ended, the slowest of its texts."
        self.ttft = self._histogram("time_to_first_token_seconds", ttft, TTFT_BUCKETS)
        self.gap = self._histogram("inter_token_latency_seconds", gap, TOKEN_BUCKETS)
        self.tpot = self._histogram("time_per_output_token_seconds", tpot, TOKEN_BUCKETS)
        self.duration = self._histogram("request_seconds", "Arrival to the end.", TTFT_BUCKETS)
        tokens = self.prompt_tokens, self.output_tokens
        times = self.ttft, self.gap, self.tpot, self.duration
        for one in (self.num_arrived, *tokens, *times):
            one.labels(LATENCY_SENSITIVE.name)  # 0 until something happens, not absent
        self._gaps: dict[str, Histogram] = {}
        for kind in classes:
            if kind.slo is not None:
                self.num_met.labels(kind.name)
                for what in MISSED:
                    self.num_missed.labels(kind.name, what)
        self._vllm = VllmRequests(model_name, self.registry)
        live = AttainmentSeries(self.attainment, clock)
        for collector in (VllmSeries(self, model_name, page_size), live, self.engine, self.server):
            self.registry.register(collector)

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
        gaps = self._gaps.get(service_class)
        if gaps is None:  # to look for it takes as long as to note what is observed, each token
            gaps = self._gaps[service_class] = self.gap.labels(service_class)
        gaps.observe(s)

    def finished(self, service_class: str, reason: str, duration_s: float, served: Served) -> None:
        """reason: "stop", "length", the code of an error, or "disconnected". duration_s: from its arrival."""
        self.num_finished.labels(service_class, reason).inc()
        self.prompt_tokens.labels(service_class).inc(served.num_prompt)
        self.output_tokens.labels(service_class).inc(served.num_output)
        self.duration.labels(service_class).observe(duration_s)
        if served.metrics.tpot_s is not None:
            self.tpot.labels(service_class).observe(served.metrics.tpot_s)
        if service_class == LATENCY_SENSITIVE.name:
            self._vllm.finished(served)

    def unserved(self, reason: str) -> None:
        """Answered 503 before anybody knew what it was. reason: the code of the answer."""
        self.num_unserved.labels(reason).inc()

    def judged(self, ended: Ended) -> None:
        """A request whose end is the server's affair; not one that was invalid."""
        missed = self.attainment.note(ended, self._clock())
        if missed is not None:
            self.num_missed.labels(ended.service_class, missed).inc()
        elif ended.slo is not None and ended.outcome != "left":
            self.num_met.labels(ended.service_class).inc()

    def exposition(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self.registry)
