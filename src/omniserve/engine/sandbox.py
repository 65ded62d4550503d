"""A device without clients: runs any walk the profiler asks for and says how long it took.

The executor, the decoder and the memory layouts are the engine's own; pages and requests are made up, and
lanes are served by a scripted host, off the clock.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omniserve.attention.cpu import kv_geometry
from omniserve.config import CpuSplit, EngineConfig
from omniserve.dtypes import dtype_name
from omniserve.engine.build import make_engine
from omniserve.engine.cpu_executor import PASS_SPIN_S, CpuExecutor
from omniserve.engine.records import Record
from omniserve.host.load import FILLING
from omniserve.host.scripted import ScriptedHost
from omniserve.model.decoder import Decoder
from omniserve.model.sampling import Chooser, sample
from omniserve.policy.latency import WalkLoad
from omniserve.policy.latency_model import load_of
from omniserve.policy.plan import DeviceRows, LaneStart, PageCopy, Step, StepResult
from omniserve.types import DEFAULT_CLASSES, SamplingParams

# KV memory of the device side, whatever the engine has: larger than caches, small beside the machine. A
# profile does not depend on the memory that an engine may use.
KV_BYTES = 512 << 20
# Lanes hold one token here; copies go to pages of their own.
LANE_PAGE_SIZE = 4
COPY_PAGES = 1024
_NEVER_ENDS = 1 << 40


@dataclass(frozen=True, slots=True)
class Mix:
    """What a walk shall hold: contexts of decodes, (start, count, samples) of chunks, lanes that start."""

    decodes: tuple[int, ...] = ()
    chunks: tuple[tuple[int, int, bool], ...] = ()
    lane_starts: int = 0
    copied_pages: int = 0


class Sandbox:
    """Owns an engine that nobody talks to. Rows per walk as in `config`."""

    def __init__(self, config: EngineConfig, decoder: Decoder, split: CpuSplit, max_model_len: int) -> None:
        lanes = config.max_lane_rows * (decoder.num_layers + 2)
        sides = (decoder.num_layers, decoder.num_kv_heads, decoder.head_dim, LANE_PAGE_SIZE)
        lane_page = kv_geometry(*sides, dtype_name(decoder.dtype)).page_bytes
        config = replace(
            config,
            policy="omniserve",
            classes=DEFAULT_CLASSES,
            host_offload="always",
            reentry="next_iteration",
            enable_prefix_caching=False,
            max_num_batched_tokens=config.max_device_rows,
            device_memory_bytes=KV_BYTES,
            host_memory_bytes=(lanes + COPY_PAGES) * lane_page,
            host_page_size=LANE_PAGE_SIZE,
            host_kv_dtype="auto",
            max_lanes=lanes,
        )
        self.decoder = decoder
        self.max_model_len = max_model_len
        self.max_lane_rows = config.max_lane_rows
        self.engine = make_engine(
            config, decoder, max_model_len, split,
            host=lambda geometry, *_: ScriptedHost(geometry), host_partitions=1,
        )  # fmt: skip
        assert isinstance(self.engine.host, ScriptedHost)
        assert isinstance(self.engine.executor, CpuExecutor)
        self.host, self.executor = self.engine.host, self.engine.executor
        self.page_size = config.page_size
        self.executor.attention.store.memory.fill_(FILLING)
        self.num_pages = self.engine.state.limits.num_device_pages
        self._next_page = 0
        self._free_slots = list(range(lanes))
        self._texts: dict[int, Record] = {}
        self._copies = 0
        self._noise = torch.Generator().manual_seed(0)

    @property
    def kv_tokens(self) -> int:
        """Tokens that the device rows of one walk can look at together."""
        return self.num_pages * self.page_size

    # ------------------------------------------------------------ whole walks

    def walk(self, mix: Mix) -> tuple[WalkLoad, float]:
        """Carry out a walk; its load as it came about, and seconds from order to answer."""
        step = self._step(mix)
        began = time.perf_counter()
        result = self.executor.collect(self.executor.launch(step))
        seconds = time.perf_counter() - began
        lanes = [token.request_id for token in result.tokens if token.by_lane]
        self._free_slots += [-1 - request_id for request_id in lanes]
        load = load_of(step, result.lane_rows, len(lanes))
        if self.executor.segment is not None:
            self.host.serve_all()
        return load, seconds

    def _step(self, mix: Mix) -> Step:
        lengths = [(context - 1, 1, True) for context in mix.decodes] + list(mix.chunks)
        rows = [
            DeviceRows(i, start, count, samples, count > 1, self._pages(start + count))
            for i, (start, count, samples) in enumerate(lengths)
        ]
        for row in rows:
            self._know(row.request_id, self.max_model_len)
        starts = [self._free_slots.pop(0) for _ in range(min(mix.lane_starts, len(self._free_slots)))]
        for slot in starts:
            self._know(-1 - slot, 1)
        return Step(
            "walk",
            rows=tuple(rows),
            lane_starts=tuple(LaneStart(-1 - slot, slot, 0, 0, (slot,)) for slot in starts),
            lane_cap=(self.max_lane_rows,) * self.decoder.num_layers,
            copies_out=tuple(self._copy() for _ in range(mix.copied_pages)),
        )

    def _pages(self, num_tokens: int) -> tuple[int, ...]:
        """Pages that lie furthest in the past: never those of a row of the same walk."""
        count = -(-num_tokens // self.page_size)
        first, self._next_page = self._next_page, (self._next_page + count) % self.num_pages
        return tuple((first + i) % self.num_pages for i in range(count))

    def _know(self, request_id: int, num_tokens: int) -> None:
        if request_id not in self._texts:
            tokens = [(7 * i) % self.decoder.config.vocab_size for i in range(num_tokens)]
            record = Record(request_id, tokens, 1, _NEVER_ENDS, Chooser(), frozenset())
            self._texts[request_id] = record
            self.executor.add(record)

    def _copy(self) -> PageCopy:
        """A page to host pages beyond those of the lanes."""
        self._copies += 1
        limits = self.engine.state.limits
        count = -(-self.page_size // LANE_PAGE_SIZE)
        first = limits.max_lanes + (self._copies * count) % (limits.num_host_pages - limits.max_lanes - count)
        pages = tuple(range(first, first + count))
        return PageCopy(self._copies, self._pages(1)[0], 0, self.page_size, 0, pages)

    def use_lanes(self, are_used: bool) -> None:
        """Whether walks look for lanes. Those under way wait meanwhile."""
        if are_used:
            self.executor.attach(self.host.segment)
        else:
            self.executor.segment = None

    # ------------------------------------------------------------ parts of walks

    @torch.inference_mode()
    def dense_s(self, num_rows: int) -> float:
        """Seconds of the dense modules of all layers over so many rows: a walk without attention."""
        decoder = self.decoder
        x = self._rows(num_rows, decoder.config.hidden_size)
        attn = self._rows(num_rows, decoder.num_heads * decoder.head_dim)
        positions = torch.arange(num_rows) % self.max_model_len
        began = time.perf_counter()
        for layer in range(decoder.num_layers):
            decoder.pre_attention(layer, x, positions)
            decoder.post_attention(layer, attn, x)
        return time.perf_counter() - began

    @torch.inference_mode()
    def head_s(self, num_rows: int) -> float:
        """Seconds of logits and choice of so many rows."""
        x = self._rows(num_rows, self.decoder.config.hidden_size)
        choosers = [Chooser()] * num_rows
        began = time.perf_counter()
        sample(self.decoder.logits(x), choosers, [1] * num_rows)
        return time.perf_counter() - began

    def _rows(self, num_rows: int, width: int) -> Tensor:
        """Rows that differ: experts are chosen by them."""
        return torch.randn(num_rows, width, generator=self._noise).to(self.decoder.dtype)

    def pass_s(self) -> list[tuple[int, float]]:
        """(rows, seconds) of one pass at every layer but the last, all rows of one step ready together."""
        found: list[tuple[int, float]] = []
        starts = replace(self._step(Mix(lane_starts=self.max_lane_rows)), kind="passes", budget_s=1.0)
        self.executor.launch(starts)
        go_on = Step("passes", budget_s=1.0)
        for _ in range(self.decoder.num_layers - 1):
            self.host.serve_all()
            began = time.perf_counter()
            self.executor.launch(go_on)
            found.append((len(starts.lane_starts), time.perf_counter() - began - PASS_SPIN_S))
        self.host.serve_all()
        tokens = self.executor.launch(go_on).tokens
        self._free_slots += [-1 - token.request_id for token in tokens]
        return found

    def engine_s(self, num_requests: int, num_steps: int) -> list[float]:
        """Seconds that the engine's loop adds to each of some steps of so many decodes."""
        lasting = SamplingParams(temperature=0.0, max_tokens=num_steps + 2, ignore_eos=True)
        ids = [self.engine.add([1 + i], lasting, "latency_sensitive") for i in range(num_requests)]
        launch, inside = self.executor.launch, 0.0

        def timed(step: Step) -> StepResult:
            nonlocal inside
            began = time.perf_counter()
            result = launch(step)
            inside = time.perf_counter() - began
            return result

        self.executor.launch = timed  # type: ignore[method-assign]
        found = []
        try:
            for _ in range(num_steps):
                began = time.perf_counter()
                self.engine.step()
                found.append(time.perf_counter() - began - inside)
        finally:
            del self.executor.launch
        for request_id in ids:
            self.engine.abort(request_id)
        return found[1:]  # the first one was the prefill

    def close(self) -> None:
        self.engine.close()
