"""What the server knows without its engine, as Prometheus series: attainment, readiness, batches, disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import Metric
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from omniserve.batch.jobs import RunnerStatus
from omniserve.server.attainment import LiveAttainment


class AttainmentSeries(Collector):
    """The window as of a scrape; of classes with targets."""

    def __init__(self, window: LiveAttainment, clock: Callable[[], float]) -> None:
        self._window, self._clock = window, clock

    def collect(self) -> Iterator[Metric]:
        attainment = _gauge(
            "attainment_ratio",
            "Share of offered requests of the last 5 minutes that kept their targets; no value of none.",
            "service_class",
        )
        goodput = _gauge(
            "goodput_requests_per_second",
            "Requests per second, over the last 5 minutes, that kept their targets.",
            "service_class",
        )
        offered = _gauge(
            "offered_requests",
            "Requests with targets that ended in the last 5 minutes, refused and failed ones too.",
            "service_class",
        )
        for name, found in self._window.snapshot(self._clock()).items():
            if found.goodput_per_s is None:
                continue
            goodput.add_metric((name,), found.goodput_per_s)
            offered.add_metric((name,), found.num_offered)
            if found.attainment is not None:
                attainment.add_metric((name,), found.attainment)
        yield from (attainment, goodput, offered)


@dataclass(frozen=True, slots=True)
class BatchFacts:
    """Of a server with a state directory. free_bytes: None when the disk does not say.

    reserve_bytes: below so many nothing new is stored and no line is started.
    """

    status: RunnerStatus
    free_bytes: int | None
    reserve_bytes: int

    @property
    def is_held_by_disk(self) -> bool:
        """Whether lines wait because the disk takes no more."""
        is_full = self.free_bytes is not None and self.free_bytes < self.reserve_bytes
        return is_full or self.status.trouble is not None


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """The server at one moment. in_flight: requests inside by class, lines of batches left out.

    engine_silent_s: since the engine's last sign of life; None without an engine.
    """

    is_ready: bool = False
    num_restarts: int = 0
    engine_silent_s: float | None = None
    uptime_s: float = 0.0
    in_flight: Mapping[str, int] = field(default_factory=dict)
    is_paused: bool = False
    batches: BatchFacts | None = None


class ServerSeries(Collector):
    """ServerFacts as of the last scrape."""

    def __init__(self) -> None:
        self.facts = ServerFacts()

    def collect(self) -> Iterator[Metric]:
        facts = self.facts
        yield _value("ready", "1 while requests are served, as /ready says.", facts.is_ready)
        yield _value("uptime_seconds", "Seconds since the server started.", facts.uptime_s)
        restarts = CounterMetricFamily("omniserve:engine_restarts", "Engines started after one that ended.")
        restarts.add_metric((), facts.num_restarts)
        yield restarts
        text = "Seconds since the engine's last sign of life, of which there is one every second or two."
        yield _value("engine_silent_seconds", text, facts.engine_silent_s)
        text = "Requests in the server, lines of batches left out."
        in_flight = _gauge("requests_in_flight", text, "service_class")
        for name, count in facts.in_flight.items():
            in_flight.add_metric((name,), count)
        yield in_flight
        text = "1 while no best-effort work is started, by whom: the operator, or a full or failing disk."
        paused = _gauge("best_effort_paused", text, "reason")
        paused.add_metric(("operator",), facts.is_paused)
        paused.add_metric(("disk",), facts.batches is not None and facts.batches.is_held_by_disk)
        yield paused
        if facts.batches is not None:
            yield from _batch_series(facts.batches)


def _batch_series(batches: BatchFacts) -> Iterator[Metric]:
    status = batches.status
    yield _value("open_batches", "Batches that have not ended.", status.num_batches)
    text = "Open batches that will not end in their window at the pace of late, or are past it."
    yield _value("overdue_batches", text, status.num_overdue)
    yield _value("batch_lines_left", "Lines of open batches without a result.", status.num_lines_left)
    yield _value("batch_lines_in_flight", "Lines of batches that run now.", status.num_running)
    given_up = CounterMetricFamily(
        "omniserve:batch_lines_given_up", "Lines of batches that were given up, for engines died of them."
    )
    given_up.add_metric((), status.num_given_up)
    yield given_up
    text = "Lines finished per second over the last 5 minutes in which lines ran."
    yield _value("batch_lines_per_second", text, status.lines_per_s)
    text = "Seconds until all lines of open batches have run, at the pace of late."
    yield _value("batch_eta_seconds", text, status.longest_eta_s)
    yield _value("state_free_bytes", "What the disk of the state directory has left.", batches.free_bytes)
    text = "Free bytes below which nothing new is stored and no line of a batch is started."
    yield _value("state_reserve_bytes", text, batches.reserve_bytes)


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"omniserve:{name}", text, labels=labels)


def _value(name: str, text: str, value: float | None) -> Metric:
    """A gauge; without a value when there is nothing to tell."""
    gauge = _gauge(name, text)
    if value is not None:
        gauge.add_metric((), value)
    return gauge
