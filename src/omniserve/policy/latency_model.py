"""LatencyModel: seconds of a walk or pass before it runs. docs/latency-model.md derives each formula.

Pure: a fit (plain data, from engine/profiler.py or policy/hardware_profiles.py) and what was learned since.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from omniserve.policy.correction import Correction, ErrorWindow, accuracy
from omniserve.policy.latency import WalkLoad
from omniserve.policy.plan import Step
from omniserve.policy.staircase import Staircase

# Of the plain data: fits of another version are measured again.
SCHEMA = "omniserve-latency/1"
WINDOW = 256
# Of so many walks of its kind, a margin is of them alone; before, of the last walks of any kind.
ENOUGH_WALKS = 40
# A kind that has not come for so many walks is one of those that hardly come.
LONG_AGO_WALKS = 4 * WINDOW
# From this share on a walk counts as one beside a busy host.
BUSY_SHARE = 0.5
# How fast `host_share` follows the walks.
_SHARE_STEP = 0.2
WHAT = ("decode", "chunk", "lanes")


def kind_name(what: str, host_is_busy: bool) -> str:
    return f"{what}, host {'busy' if host_is_busy else 'idle'}"


KINDS = tuple(kind_name(what, busy) for what in WHAT for busy in (False, True))


def kind_of(load: WalkLoad, host_is_busy: float) -> str:
    """Kind of walk whose errors are kept together: one of KINDS."""
    what = "lanes" if load.lane_rows else "chunk" if load.num_chunks else "decode"
    return kind_name(what, host_is_busy >= BUSY_SHARE)


def load_of(step: Step, lane_rows: int = 0, lane_samples: int = 0) -> WalkLoad:
    """The load of a walk as the device carries it out. A chunk of one token attends as a decode row does.

    lane_rows: that entered, over all layers; lane_samples: of those, at the last layer.
    """
    copied = sum(copy.num_tokens for copy in step.copies_out)
    load = WalkLoad(lane_rows=lane_rows, num_samples=lane_samples, copied_tokens=copied)
    for rows in step.rows:
        if rows.num_tokens == 1:
            load.add_decode(rows.start + 1)
            load.num_samples += int(rows.samples) - 1
        else:
            load.add_chunk(rows.start, rows.num_tokens)
            load.num_samples += int(rows.samples)
    return load


@dataclass(frozen=True, slots=True)
class WalkCosts:
    """Seconds of the parts of one walk, over all layers, beside a host that is idle or that streams.

    dense              pre_attention and post_attention of n rows, all layers.
    head               logits and choice of tokens of s rows.
    decode_token_s, decode_request_s, decode_s
                       a_DA, h_DA, b_DA of decode attention: a c + h g + b.
    prefill_load_s, prefill_context_s, prefill_chunk_s
                       a_PA and b_PA of prefill attention, and the reading of earlier KV.
    lane_row_s, lane_walk_s
                       one lane row's way in and out at one layer; a walk that looks for lanes.
    overhead_s, row_overhead_s
                       engine: of a walk, of a request in it.
    copy_token_s       KV of one token into a staging frame, on its way to the host.
    """

    dense: Staircase
    head: Staircase
    decode_token_s: float
    decode_request_s: float
    decode_s: float
    prefill_load_s: float
    prefill_context_s: float
    prefill_chunk_s: float
    lane_row_s: float
    lane_walk_s: float
    overhead_s: float
    row_overhead_s: float
    copy_token_s: float


@dataclass(frozen=True, slots=True)
class LatencyFit:
    """A model's costs on one machine: plain data.

    key: what it holds for (model, device, dtype, threads, ...). idle, busy: beside an idle and a streaming
    host. pass_s: one lane pass beside its rows. host_bytes_per_s, host_row_s: host attention of one lane row;
    copy_bytes_per_s, copy_s: one copy of pages between device and host; rates of 0: there is no host.
    residuals: relative errors on measurements that the fit has not seen, by kind. accuracy, source: for the
    reader.
    """

    key: dict[str, str | int]
    num_layers: int
    idle: WalkCosts
    busy: WalkCosts
    pass_s: float
    host_bytes_per_s: float
    host_row_s: float
    copy_bytes_per_s: float
    copy_s: float
    residuals: dict[str, list[float]] = field(default_factory=dict)
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    schema: str = SCHEMA

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: object) -> LatencyFit:
        """Raises ValueError for another version or anything that is no such fit."""
        import msgspec

        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ValueError(f"no latency profile of schema {SCHEMA!r}")
        return msgspec.convert(data, cls)  # its ValidationError is a ValueError


class LatencyModel:
    """Answers from a fit, corrected by what walks took.

    `host_is_busy` is True, False, or the share of a walk in which the host reads memory. Times are
    monotone in every count of a load, so that a budget can be searched by halves.

    host_share: how busy the host has been in the last walks, the guess for the next one.
    """

    def __init__(self, fit: LatencyFit, quantile: float = 0.95) -> None:
        """quantile: share of walks that `bound_s` shall hold for."""
        assert fit.idle.dense.rows == fit.busy.dense.rows, "both host states share their points"
        assert fit.idle.head.rows == fit.busy.head.rows, "both host states share their points"
        self.fit = fit
        self.quantile = quantile
        self.host_share = 0.0
        self._correction = Correction()
        self._early = {kind: ErrorWindow(WINDOW, fit.residuals.get(kind, ())) for kind in KINDS}
        self._windows = {kind: ErrorWindow(WINDOW) for kind in KINDS}
        self._lately = ErrorWindow(WINDOW)
        self._num_walks = 0
        self._last_walk = dict.fromkeys(KINDS, 0)
        self._margins = self._largest_margins()
        self._dense = (fit.idle.dense.table(), fit.busy.dense.table())
        self._head = (fit.idle.head.table(), fit.busy.head.table())

    # ------------------------------------------------------------ predictions

    def walk_s(self, load: WalkLoad, host_is_busy: float) -> float:
        """Expected seconds of a whole walk, the engine's own work included."""
        return self._correction.apply(self._parts(load, host_is_busy), host_is_busy)

    def bound_s(self, load: WalkLoad, host_is_busy: float) -> float:
        """Seconds that a `quantile` of walks like this one stay below.

        The margin is the largest of all kinds that the walk contains, so that more work never has less.
        """
        margin = self._margins[kind_of(load, host_is_busy), load.num_chunks > 0]
        return self.walk_s(load, host_is_busy) * (1 + margin)

    def _largest_margins(self) -> dict[tuple[str, bool], float]:
        """By kind, and whether a walk with lanes has chunks too."""
        own = {kind: self._errors_of(kind).margin(self.quantile) for kind in KINDS}
        return {
            (kind_name(what, busy), chunks): max(
                own[kind_name(part, host)]
                for part in ("decode", *(("chunk",) if chunks else ()), what)
                for host in {False, busy}
            )
            for what in WHAT
            for busy in (False, True)
            for chunks in (False, True)
        }

    def _errors_of(self, kind: str) -> ErrorWindow:
        """Of this kind where there were enough, else of all the last walks, else of the fit and first walks.

        A kind that never comes alone (decodes without lanes beside a full host) would keep for good what was
        measured in the minute of the fit, and be part of every bound.
        """
        is_recent = self._num_walks - self._last_walk[kind] <= LONG_AGO_WALKS
        if is_recent and self._windows[kind].num_errors >= ENOUGH_WALKS:
            return self._windows[kind]
        return self._lately if self._lately.num_errors >= ENOUGH_WALKS else self._early[kind]

    def pass_s(self, num_rows: int, host_is_busy: float) -> float:
        """Expected seconds of one lane pass: post_attention(l), then pre_attention(l + 1)."""
        if num_rows <= 0:
            return 0.0
        fit, share = self.fit, float(host_is_busy)
        dense = _mixed(self._dense, (fit.idle.dense, fit.busy.dense), num_rows, share) / fit.num_layers
        lanes = fit.idle.lane_row_s + (fit.busy.lane_row_s - fit.idle.lane_row_s) * share
        return self._correction.apply((dense, 0.0, 0.0, fit.pass_s + num_rows * lanes), share)

    def host_attention_s(self, kv_bytes: int) -> float:
        """Expected seconds of host attention of one lane row over so many bytes of KV, all workers on it."""
        return _transfer_s(kv_bytes, self.fit.host_bytes_per_s, self.fit.host_row_s)

    def copy_s(self, num_bytes: int) -> float:
        """Expected seconds of one copy of pages between device and host."""
        return _transfer_s(num_bytes, self.fit.copy_bytes_per_s, self.fit.copy_s)

    def _parts(self, load: WalkLoad, share: float) -> tuple[float, float, float, float]:
        """Fitted seconds, in the order of correction.PARTS."""
        fit = self.fit
        idle, busy = fit.idle, fit.busy
        rows = load.num_tokens + load.lane_rows / fit.num_layers
        dense = _mixed(self._dense, (idle.dense, busy.dense), rows, share)
        head = _mixed(self._head, (idle.head, busy.head), load.num_samples, share)
        attention, other = _linear(idle, load)
        if share:
            busy_attention, busy_other = _linear(busy, load)
            attention += (busy_attention - attention) * share
            other += (busy_other - other) * share
        return dense, attention, head, other

    # ------------------------------------------------------------ learning

    def observe(
        self,
        load: WalkLoad,
        host_is_busy: float,
        seconds: float,
        planned: tuple[WalkLoad, float] | None = None,
    ) -> float:
        """Learn from a walk; returns what had been expected of it.

        planned: load and host_is_busy by which its time was bounded beforehand. The margin of that kind of
        walk has to cover what the plan got wrong too: more lane rows, a busier host.
        """
        parts = self._parts(load, host_is_busy)
        expected_s = self._correction.apply(parts, host_is_busy)
        kind, least_s = kind_of(load, host_is_busy), expected_s
        self._windows[kind].note(expected_s, seconds)
        if planned is not None:
            kind, least_s = kind_of(*planned), min(expected_s, self.walk_s(*planned))
        self._windows[kind].add_error(seconds / least_s - 1)
        if self._lately.num_errors < ENOUGH_WALKS:  # later nobody asks for it
            self._early[kind].add_error(seconds / least_s - 1)
        self._lately.add_error(seconds / expected_s - 1)  # of others' plans this kind need not know
        self._num_walks += 1
        self._last_walk[kind] = self._num_walks
        self._margins = self._largest_margins()
        self._correction.observe(parts, host_is_busy, seconds)
        self.host_share += _SHARE_STEP * (host_is_busy - self.host_share)
        return expected_s

    def accuracy(self) -> dict[str, dict[str, float]]:
        """Of the last walks of each kind seen: predictions made before learning from them."""
        pairs = {kind: window.pairs for kind, window in self._windows.items()}
        return {kind: accuracy(found) for kind, found in pairs.items() if found}

    # ------------------------------------------------------------ plain data

    def to_json(self) -> dict[str, Any]:
        """The fit. What was learned since belongs to the moment and is not kept."""
        return self.fit.to_json()

    @classmethod
    def from_json(cls, data: object, quantile: float = 0.95) -> LatencyModel:
        """Raises ValueError for data that is no fit of this version."""
        return cls(LatencyFit.from_json(data), quantile)


def _transfer_s(num_bytes: int, bytes_per_s: float, start_s: float) -> float:
    if not num_bytes:
        return 0.0
    return start_s + num_bytes / bytes_per_s if bytes_per_s else math.inf


def _mixed(
    tables: tuple[list[float], list[float]], stairs: tuple[Staircase, Staircase], n: float, share: float
) -> float:
    """Seconds of n rows beside a host that is busy for `share` of the time: stairs, from their tables."""
    low = int(n)
    if low + 1 >= len(tables[0]):
        idle, busy = stairs[0].at(n), stairs[1].at(n)
    else:
        part = n - low
        idle, busy = tables[0][low], tables[1][low]
        if part:
            idle += (tables[0][low + 1] - idle) * part
            busy += (tables[1][low + 1] - busy) * part
    return idle + (busy - idle) * share


def _linear(costs: WalkCosts, load: WalkLoad) -> tuple[float, float]:
    """Attention of device rows; lanes' ways in and out with the engine's own work."""
    attention = 0.0
    if load.num_decodes:
        attention = (
            costs.decode_s
            + costs.decode_request_s * load.num_decodes
            + costs.decode_token_s * load.decode_context
        )
    if load.num_chunks:
        attention += (
            costs.prefill_chunk_s * load.num_chunks
            + costs.prefill_load_s * load.prefill_load
            + costs.prefill_context_s * load.chunk_context
        )
    other = costs.overhead_s + costs.row_overhead_s * (load.num_decodes + load.num_chunks)
    other += costs.copy_token_s * load.copied_tokens
    if load.lane_rows:
        other += costs.lane_walk_s + costs.lane_row_s * load.lane_rows
    return attention, other
