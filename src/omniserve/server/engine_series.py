"""What the engine counts, as Prometheus series: a table of them, and totals that outlive each engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import Metric
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

Stats = Mapping[str, Any]
Labels = tuple[str, ...]
Samples = Iterable[tuple[Labels, float]]


@dataclass(frozen=True, slots=True)
class Series:
    """One series and where its values are in AsyncLLM.stats(). name: of a counter without `_total`."""

    name: str
    kind: Literal["counter", "gauge"]
    text: str
    read: Callable[[Stats], Samples]
    labels: Labels = ()

    def family(self) -> GaugeMetricFamily | CounterMetricFamily:
        family = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        return family(f"omniserve:{self.name}", self.text, labels=self.labels)


def _one(key: str) -> Callable[[Stats], Samples]:
    """A number, or None where there is nothing to tell."""
    return lambda stats: [] if stats[key] is None else [((), stats[key])]


def _each(**keys: str) -> Callable[[Stats], Samples]:
    """Numbers by the value of a label."""
    return lambda stats: [((label,), stats[key]) for label, key in keys.items()]


def _in(key: str) -> Callable[[Stats], Samples]:
    """A mapping of label values to numbers."""
    return lambda stats: [((label,), value) for label, value in stats[key].items()]


def _lanes(stats: Stats) -> Samples:
    return [((), stats["requests"]["lane"])]


def _host_up(stats: Stats) -> Samples:
    """Nothing where no host is asked for."""
    return [] if stats["host_state"] == "none" else [((), stats["host_state"] == "ready")]


def _prefix_cache(field: str) -> Callable[[Stats], Samples]:
    caches = ("device_latency_sensitive", "device_best_effort", "host")
    return lambda stats: [((cache,), stats["prefix_cache"][cache][field]) for cache in caches]


def _prediction_errors(stats: Stats) -> Samples:
    """accuracy is 1 - |error|; its P90 is what 90 % of walks reach, so that 90 % of errors stay below."""
    for kind, accuracy in stats["prediction"].items():
        for statistic in ("mean", "p90"):
            yield (*_walk_and_host(kind), statistic), 1.0 - accuracy[statistic]


def _predicted_walks(stats: Stats) -> Samples:
    return [(_walk_and_host(kind), found["count"]) for kind, found in stats["prediction"].items()]


def _walk_and_host(kind: str) -> Labels:
    """policy/latency_model.py, kind_name: "decode, host busy"."""
    walk, host = kind.split(", host ")
    return walk, host


ENGINE_SERIES = (
    Series("walks", "counter", "Walks: iterations of the device over all layers.", _one("walks")),
    Series("walk_seconds", "counter", "Seconds in walks.", _one("walk_s")),
    Series("lane_passes", "counter", "Passes of lanes alone over one layer.", _one("lane_passes")),
    Series("lane_pass_seconds", "counter", "Seconds in passes.", _one("pass_s")),
    Series(
        "starved_seconds", "counter", "Seconds asleep while no row of a lane was ready.", _one("starved_s")
    ),
    Series("device_tokens", "counter", "Tokens decoded on the device, any class.", _one("device_tokens")),
    Series("computed_prompt_tokens", "counter", "Prompt tokens that were not cached.", _one("prompt_tokens")),
    Series(
        "harvested_tokens",
        "counter",
        "Best-effort tokens, by where their attention was computed.",
        _each(lane="harvested_lane_tokens", device="harvested_device_tokens"),
        ("path",),
    ),
    Series(
        "latency_sensitive_paid_seconds",
        "counter",
        "Seconds that walks of latency-sensitive requests took longer, by the model, for best-effort work.",
        _one("latency_sensitive_paid_s"),
    ),
    Series(
        "swap_bytes",
        "counter",
        "KV copied from the device to the host (out) and back (in).",
        _each(out="swap_out_bytes", **{"in": "swap_in_bytes"}),
        ("direction",),
    ),
    Series("dropped_requests", "counter", "Requests whose KV was given up.", _one("num_dropped")),
    Series("displaced_requests", "counter", "Requests that left for the host.", _one("num_displaced")),
    Series("returned_lanes", "counter", "Lanes that came back to the device.", _one("num_swapped_in")),
    Series(
        "broken_promises", "counter", "Latency-sensitive ones of those dropped.", _one("num_broken_promises")
    ),
    Series("host_deaths", "counter", "Host processes that ended unasked.", _one("host_deaths")),
    Series("host_busy_seconds", "counter", "Seconds of all host workers at work.", _one("host_busy_s")),
    Series("host_read_bytes", "counter", "KV that host attention has read.", _one("host_kv_bytes_read")),
    Series(
        "prefix_cache_queried_tokens",
        "counter",
        "Tokens looked up in the prefix cache.",
        _prefix_cache("queried_tokens"),
        ("cache",),
    ),
    Series(
        "prefix_cache_hit_tokens",
        "counter",
        "Tokens found in the prefix cache.",
        _prefix_cache("hit_tokens"),
        ("cache",),
    ),
    Series("pages", "gauge", "Pages of KV by side and owner.", _in("pages"), ("owner",)),
    Series("engine_requests", "gauge", "Texts by where their KV is.", _in("requests"), ("residence",)),
    Series("lanes_in_flight", "gauge", "Best-effort texts that decode with host attention.", _lanes),
    Series(
        "oldest_lane_seconds",
        "gauge",
        "Seconds since the last token of the lane that has waited longest for its next one.",
        _one("oldest_lane_s"),
    ),
    Series("host_up", "gauge", "1 while the host process is ready.", _host_up),
    Series(
        "slack_seconds",
        "gauge",
        "What chats left of their slack beside their own rows in the newest plan that had any.",
        _one("slack_s"),
    ),
    Series(
        "prediction_error_ratio",
        "gauge",
        "Error of predicted walks, as a share of the measured time: mean, and what 90 % stay below.",
        _prediction_errors,
        ("walk", "host", "statistic"),
    ),
    Series(
        "predicted_walks",
        "gauge",
        "Newest walks that prediction_error_ratio is taken over.",
        _predicted_walks,
        ("walk", "host"),
    ),
    Series("promises_slo", "gauge", "1 while targets are held by predictions.", _one("promises_slo")),
    Series("engine_uptime_seconds", "gauge", "Seconds since the engine started.", _one("uptime_s")),
)
HOST_BUSY = Series(
    "host_busy_ratio",
    "gauge",
    "Share of the host workers' time at work since the scrape before.",
    lambda stats: [],
)


class Totals:
    """Counters over all engines so far: a new one counts from 0, and what those before it counted stays."""

    def __init__(self) -> None:
        self._past: dict[tuple[str, Labels], float] = {}
        self._now: dict[tuple[str, Labels], float] = {}
        self._engine = -1

    def note(self, engine: int, values: Mapping[tuple[str, Labels], float]) -> None:
        """engine: its number; what an older one said comes too late. Nothing falls."""
        if engine < self._engine:
            return
        if engine > self._engine:
            self._past, self._now, self._engine = self.all(), {}, engine
        for key, value in values.items():
            self._now[key] = max(value, self._now.get(key, 0.0))

    def all(self) -> dict[tuple[str, Labels], float]:
        keys = self._past.keys() | self._now.keys()
        return {key: self._past.get(key, 0.0) + self._now.get(key, 0.0) for key in keys}


class EngineSeries(Collector):
    """ENGINE_SERIES as of the last `note`. Without an engine only counters have values."""

    def __init__(self) -> None:
        self._totals = Totals()
        self._stats: Stats | None = None
        self._engine = -1
        self._busy_ratio: float | None = None

    def note(self, engine: int, stats: Stats) -> None:
        """What AsyncLLM.stats() says now. engine: its number, higher for every new one."""
        if engine < self._engine:
            return
        before = self._stats if engine == self._engine else None
        self._busy_ratio = _busy_ratio(before, stats, self._busy_ratio)
        self._engine, self._stats = engine, stats
        counters = (series for series in ENGINE_SERIES if series.kind == "counter")
        self._totals.note(engine, {(s.name, labels): v for s in counters for labels, v in s.read(stats)})

    def gone(self) -> None:
        """No engine runs: its gauges say nothing anymore."""
        self._stats = None

    @property
    def kv_usage(self) -> float:
        """Share of device pages that latency-sensitive requests hold."""
        if self._stats is None:
            return 0.0
        pages = self._stats["pages"]
        return float(pages["device_latency_sensitive"] / max(1, pages["device_total"]))

    @property
    def num_device_pages(self) -> int | None:
        """None without an engine."""
        return None if self._stats is None else int(self._stats["pages"]["device_total"])

    def total(self, name: str, *labels: str) -> float:
        """A counter of ENGINE_SERIES over all engines so far."""
        return self._totals.all().get((name, labels), 0.0)

    def collect(self) -> Iterator[Metric]:
        totals = self._totals.all()
        for series in ENGINE_SERIES:
            family = series.family()
            if series.kind == "counter":
                samples: Samples = sorted((key[1], v) for key, v in totals.items() if key[0] == series.name)
            else:
                samples = [] if self._stats is None else series.read(self._stats)
            for labels, value in samples:
                family.add_metric(labels, value)
            yield family
        busy = HOST_BUSY.family()
        if self._stats is not None and self._busy_ratio is not None:
            busy.add_metric((), self._busy_ratio)
        yield busy


def _busy_ratio(before: Stats | None, now: Stats, last: float | None) -> float | None:
    """Of the time between two answers of one engine, or since its start; None without a host.

    host_busy_share is over the engine's life, so that times of both give what lies between.
    """
    if now["host_state"] == "none":
        return None
    began_s, busy_s = (0.0, 0.0) if before is None else (before["uptime_s"], _busy_s(before))
    elapsed_s = now["uptime_s"] - began_s
    return last if elapsed_s <= 0 else min(1.0, max(0.0, (_busy_s(now) - busy_s) / elapsed_s))


def _busy_s(stats: Stats) -> float:
    """Of one worker on average."""
    return float(stats["host_busy_share"] * stats["uptime_s"])
