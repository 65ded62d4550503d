"""Carries out steps on the CPU device: walks with lane rows riding along, and passes for lanes alone.

x[:n] device rows, x[n:] lane rows           one preallocated buffer
for each layer l:
    q, k, v = pre_attention(l, x)            one GEMM for all rows
    exit    lane rows leave with q, k, v     nobody waits
    attend  device rows                      meanwhile the host attends
    enter   lanes whose result is there NOW  oldest first, up to the cap
    x = post_attention(l, ...)               device rows and the lanes that entered
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from omniserve.attention.cpu import CpuAttention, DeviceBatch
from omniserve.config import Reentry
from omniserve.engine.records import Counters, LaneArrays, LayerTrace, Record
from omniserve.host.segment import LaneSegment
from omniserve.model.decoder import Decoder
from omniserve.model.sampling import logprobs_of, sample
from omniserve.policy.lanes import carried_cap, next_pass
from omniserve.policy.plan import LaneStart, NewToken, Step, StepResult
from omniserve.types import TokenLogprobs

# How long the device looks for a lane's result before it lets the engine sleep.
PASS_SPIN_S = 50e-6
# In reentry="wait" the device looks up this often to see whether the host still lives.
WAIT_SLICE_S = 0.05
# Prompt rows whose logits exist at once when log probabilities of a prompt are asked for.
SCORED_ROWS = 32


class CpuExecutor:
    """The device is this process's own threads, so a launched step is a finished one."""

    def __init__(
        self,
        decoder: Decoder,
        attention: CpuAttention,
        *,
        max_rows: int,
        max_lane_rows: int,
        max_lanes: int,
        reentry: Reentry,
        arrivals: Callable[[], bool] = lambda: False,
        host_is_gone: Callable[[], bool] = lambda: False,
        on_layer: Callable[[], None] = lambda: None,
    ) -> None:
        """max_rows: device rows of one walk. arrivals: whether work waits outside, asked after every pass.

        on_layer: called after every layer of a walk.
        """
        self.decoder = decoder
        self.attention = attention
        self.reentry = reentry
        self.arrivals = arrivals
        self.host_is_gone = host_is_gone
        self.on_layer = on_layer
        self.max_lane_rows = max_lane_rows
        self.records: dict[int, Record] = {}
        self.lanes = LaneArrays(max_lanes)
        self.counters = Counters()
        self.segment: LaneSegment | None = None
        self.trace: list[LayerTrace] | None = None
        self._past_lane_stats: dict[str, float] = {}
        rows = max_rows + max_lane_rows
        config = decoder.config
        self._x = torch.empty(rows, config.hidden_size, dtype=decoder.dtype)
        self._attn = torch.empty(rows, decoder.num_heads * decoder.head_dim, dtype=decoder.dtype)
        self._ids = torch.empty(rows, dtype=torch.int64)
        self._positions = torch.empty(rows, dtype=torch.int64)
        self._slots = np.empty(max_lane_rows, dtype=np.int32)
        self._freed_slots: list[int] = []  # cancelled with nothing under way: acknowledged next time

    # ------------------------------------------------------------ the seam

    def add(self, record: Record) -> None:
        self.records[record.request_id] = record

    def remove(self, request_id: int) -> Record | None:
        return self.records.pop(request_id, None)

    def attach(self, segment: LaneSegment) -> None:
        self.segment = segment

    def detach(self) -> None:
        self._past_lane_stats = self.lane_stats()
        self.segment = None
        self._freed_slots.clear()

    def cancel(self, slots: tuple[int, ...], fetches: tuple[int, ...]) -> None:
        if self.segment is None:
            return
        for copy_id in fetches:
            self.segment.port.cancel_fetch(copy_id)
        self._freed_slots += [slot for slot in slots if self.segment.port.cancel(slot)]

    @torch.inference_mode()
    def launch(self, step: Step) -> StepResult:
        self.cancel(step.cancel_slots, step.cancel_fetches)
        self._start_copies(step)
        if step.kind == "walk":
            tokens, unserved, lane_rows = self._walk(step)
        else:
            tokens, unserved, lane_rows = self._passes(step), 0, 0
        done = self.acknowledgements()
        return StepResult(
            tokens=tuple(tokens),
            staged=tuple(copy.copy_id for copy in step.copies_out),
            arrived=done.arrived,
            drained=done.drained,
            lanes_unserved=unserved,
            lane_rows=lane_rows,
            lanes_waiting=() if self.segment is None else tuple(self.segment.scan()[1]),
        )

    def collect(self, handle: StepResult) -> StepResult:
        return handle

    def acknowledgements(self) -> StepResult:
        if self.segment is None:
            return StepResult()
        port = self.segment.port
        drained = (*self._freed_slots, *port.drained())
        self._freed_slots.clear()
        return StepResult(arrived=tuple(port.collect_copies()), drained=drained)

    def has_ready_lanes(self) -> bool:
        return self.segment is not None and any(self.segment.scan()[0])

    def arm(self) -> bool:
        return self.segment is not None and self.segment.port.arm()

    def disarm(self) -> None:
        if self.segment is not None:
            self.segment.port.disarm()
            self.segment.clear_event()

    def lane_stats(self) -> dict[str, float]:
        now = {} if self.segment is None else self.segment.counts()
        names = self._past_lane_stats.keys() | now.keys()
        return {name: self._past_lane_stats.get(name, 0) + now.get(name, 0) for name in names}

    # ------------------------------------------------------------ copies

    def _start_copies(self, step: Step) -> None:
        """Full frames leave for the host; requests for pages go out. Both end in acknowledgements()."""
        if not (step.copies_out or step.copies_in):
            return
        assert self.segment is not None, "copies are planned only while a host is attached"
        store, counters = self.attention.store, self.counters
        address, port = store.kv.page_address, self.segment.port
        counters.swap_out_bytes += store.token_bytes * sum(copy.num_tokens for copy in step.copies_out)
        counters.swap_in_bytes += store.token_bytes * sum(copy.num_tokens for copy in step.copies_in)
        for copy in step.copies_out:
            port.land(
                copy.copy_id,
                address(copy.device_page),
                copy.device_offset,
                copy.num_tokens,
                copy.host_offset,
                list(copy.host_pages),
            )
        for copy in step.copies_in:
            port.fetch(
                copy.copy_id,
                copy.device_offset,
                copy.num_tokens,
                copy.host_offset,
                list(copy.host_pages),
                address(copy.device_page),
            )

    # ------------------------------------------------------------ walk

    def _walk(self, step: Step) -> tuple[list[NewToken], int, int]:
        """One iteration over all layers: its tokens, lanes left out though ready, lane rows that entered."""
        began = time.perf_counter()
        batch = DeviceBatch(step.rows, self.attention.store.page_size)
        n = batch.num_rows
        self._fill_device_rows(batch)
        num_lanes = self._fill_lane_rows(step.lane_starts, first=n)
        num_lanes, unserved, lane_rows = self._walk_layers(batch, n, num_lanes, step.lane_cap)
        tokens = self._sample_walk(batch, n, num_lanes)
        self.counters.walks += 1
        self.counters.walk_s += time.perf_counter() - began
        return tokens, unserved, lane_rows

    def _fill_device_rows(self, batch: DeviceBatch) -> None:
        ids: list[int] = []
        for rows in batch.rows:
            ids += self.records[rows.request_id].tokens[rows.start : rows.start + rows.num_tokens]
            self.counters.prompt_tokens += rows.num_tokens if rows.is_prefill else 0
        self._ids[: batch.num_rows] = torch.tensor(ids, dtype=torch.int64)
        self._positions[: batch.num_rows] = torch.from_numpy(batch.positions)

    def _fill_lane_rows(self, starts: tuple[LaneStart, ...], first: int) -> int:
        """Lanes that begin a token join the rows from `first` on; returns how many."""
        for i, start in enumerate(starts):
            assert self.segment is not None, "lanes start only while a host is attached"
            port = self.segment.port
            if start.first_page == 0:
                port.reset(start.slot)
            if start.new_pages:
                port.set_pages(start.slot, start.first_page, list(start.new_pages))
            port.start_token(start.slot, start.position)
            self.lanes.start(start, self.records[start.request_id].tokens[-1])
            self._slots[i] = start.slot
        count = len(starts)
        if count:
            slots = torch.from_numpy(self._slots[:count].astype(np.int64))
            self._ids[first : first + count] = self.lanes.last_tokens[slots]
            self._positions[first : first + count] = self.lanes.positions[slots]
        return count

    def _walk_layers(
        self, batch: DeviceBatch, n: int, num_lanes: int, caps: tuple[int, ...]
    ) -> tuple[int, int, int]:
        """All layers: lanes that went through the last one, lanes a cap left out, rows that entered."""
        decoder, segment = self.decoder, self._segment_with_lanes(num_lanes)
        self._embed(n + num_lanes)
        carried = unserved = lane_rows = 0
        if segment is not None:
            segment.port.begin_walk()
        for layer in range(decoder.num_layers):
            rows = n + num_lanes
            q, k, v = decoder.pre_attention(layer, self._x[:rows], self._positions[:rows])
            if segment is not None:  # with no row too: it tells the host where the device is
                segment.exit(layer, self._slots[:num_lanes], q[n:], k[n:], v[n:], self._x[n:rows])
            self.attention.run(layer, batch, q[:n], k[:n], v[:n], self._attn[:n])
            if segment is not None:
                if self.reentry == "wait":
                    self._wait_for_lanes(segment, layer)
                cap = carried_cap(caps[layer], carried, self.max_lane_rows)
                num_lanes = self._enter(segment, layer, cap, self.reentry != "next_iteration", first=n)
                carried = max(0, caps[layer] + carried - num_lanes)
                lane_rows += num_lanes
                if num_lanes == cap:
                    unserved += segment.scan()[0][layer]
            if self.trace is not None:
                self._record(layer, batch, num_lanes)
            rows = n + num_lanes
            x = decoder.post_attention(layer, self._attn[:rows], self._x[:rows])
            self._x[:rows].copy_(x)
            self.on_layer()
        if segment is None:
            return 0, 0, 0
        segment.port.end_walk()
        return num_lanes, unserved, lane_rows

    def _segment_with_lanes(self, num_starting: int) -> LaneSegment | None:
        """The segment when any lane may exit or enter in this walk."""
        if self.segment is not None and (num_starting or any(self.segment.scan()[1])):
            return self.segment
        return None

    def _embed(self, rows: int) -> None:
        self._x[:rows].copy_(self.decoder.embed(self._ids[:rows]))

    def _enter(self, segment: LaneSegment, layer: int, cap: int, same_iteration: bool, first: int) -> int:
        """Lanes whose result is there take the rows from `first` on, residual and all."""
        count = segment.take(layer, cap, same_iteration, self._slots, self._attn[first:], self._x[first:])
        if count:
            slots = torch.from_numpy(self._slots[:count].astype(np.int64))
            self._positions[first : first + count] = self.lanes.positions[slots]
        return count

    def _wait_for_lanes(self, segment: LaneSegment, layer: int) -> None:
        """The synchronous rule, for comparison: every lane waiting here enters, the device waits for it."""
        began = time.perf_counter()
        while not segment.port.wait_all(layer, WAIT_SLICE_S) and not self.host_is_gone():
            pass
        self.counters.device_wait_s += time.perf_counter() - began

    def _record(self, layer: int, batch: DeviceBatch, num_lanes: int) -> None:
        assert self.trace is not None
        self.trace.append(
            LayerTrace(
                walk=self.counters.walks,
                layer=layer,
                device_requests=tuple(r.request_id for r in batch.rows),
                lane_requests=tuple(int(i) for i in self.lanes.request_ids[self._slots[:num_lanes]]),
            )
        )

    def _sample_walk(self, batch: DeviceBatch, n: int, num_lanes: int) -> list[NewToken]:
        """Tokens of device rows that end a prompt or decode, and of lanes past the last layer."""
        self._score_prompts(batch)
        sampling = [
            (rows.request_id, int(row))
            for rows, row in zip(batch.rows, batch.last_row, strict=True)
            if rows.samples
        ]
        request_ids = [request_id for request_id, _ in sampling]
        index = [row for _, row in sampling] + list(range(n, n + num_lanes))
        tokens = self._choose(request_ids, num_lanes, self._x[torch.tensor(index, dtype=torch.int64)])
        self.counters.device_tokens += len(request_ids)
        return tokens

    def _score_prompts(self, batch: DeviceBatch) -> None:
        """Log probabilities of prompt tokens in this walk, for requests that asked; keeps no logits."""
        for rows, last_row in zip(batch.rows, batch.last_row, strict=True):
            record = self.records[rows.request_id]
            targets = record.prompt_targets(rows)
            first = int(last_row) - rows.num_tokens + 1
            for at in range(0, len(targets), SCORED_ROWS):
                part = targets[at : at + SCORED_ROWS]
                logits = self.decoder.logits(self._x[first + at : first + at + len(part)])
                counts = [record.num_prompt_logprobs or 0] * len(part)
                record.note_prompt(rows.start + at, logprobs_of(logits, part, counts))

    def _choose(self, request_ids: list[int], num_lanes: int, x: Tensor) -> list[NewToken]:
        """Next tokens of rows x [m, H]: those of `request_ids`, then of the lanes in the first slots."""
        if x.shape[0] == 0:
            return []
        lane_ids = [int(i) for i in self.lanes.request_ids[self._slots[:num_lanes]]]
        records = [self.records[i] for i in request_ids + lane_ids]
        logits = self.decoder.logits(x)
        ids = sample(logits, [r.chooser for r in records], [len(r.tokens) for r in records])
        logprobs = self._logprobs(logits, records, ids)
        self.counters.lane_tokens += num_lanes
        first_lane = len(request_ids)
        chosen = enumerate(zip(records, ids, strict=True))
        return [r.append(t, i >= first_lane, logprobs.get(i)) for i, (r, t) in chosen]

    def _logprobs(self, logits: Tensor, records: list[Record], ids: list[int]) -> dict[int, TokenLogprobs]:
        """By row: log probabilities of the chosen tokens, for requests that asked."""
        asked = {i: n for i, r in enumerate(records) if (n := r.chooser.num_logprobs) is not None}
        if not asked:
            return {}
        rows = list(asked)
        found = logprobs_of(logits[torch.tensor(rows)], [ids[i] for i in rows], list(asked.values()))
        return dict(zip(rows, found, strict=True))

    # ------------------------------------------------------------ passes

    def _passes(self, step: Step) -> list[NewToken]:
        """Lanes alone: pass -1 for those that start, then the fullest pass, until time or rows run out."""
        if self.segment is None:
            return []
        began = time.perf_counter()
        count = self._fill_lane_rows(step.lane_starts, first=0)
        if count:
            self._embed(count)
            self._leave(self.segment, 0, count)
        tokens: list[NewToken] = []
        while not tokens and time.perf_counter() - began < step.budget_s and not self.arrivals():
            ready, _, oldest = self.segment.scan()
            layer = next_pass(ready, oldest)
            if layer is not None:
                tokens = self._pass(self.segment, layer)
            elif not self.segment.port.wait_any(PASS_SPIN_S):
                break
        self.counters.pass_s += time.perf_counter() - began
        return tokens

    def _pass(self, segment: LaneSegment, layer: int) -> list[NewToken]:
        """post_attention(layer), then pre_attention(layer + 1) or the choice of tokens."""
        self.counters.lane_passes += 1
        count = self._enter(segment, layer, self.max_lane_rows, True, first=0)
        x = self.decoder.post_attention(layer, self._attn[:count], self._x[:count])
        if layer + 1 == self.decoder.num_layers:
            return self._choose([], count, x)
        self._x[:count].copy_(x)
        self._leave(segment, layer + 1, count)
        return []

    def _leave(self, segment: LaneSegment, layer: int, count: int) -> None:
        q, k, v = self.decoder.pre_attention(layer, self._x[:count], self._positions[:count])
        segment.exit(layer, self._slots[:count], q, k, v, self._x[:count])
