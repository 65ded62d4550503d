"""Host attention, the lanes between device and host, and the dense work of the CPU device.

Conventions of the whole module:

- Addresses (``*_addr``, ``address``) are integers as ``torch.Tensor.data_ptr()`` or
  ``numpy.ndarray.ctypes.data`` give them; the caller keeps the memory alive and vouches for shape and
  dtype. Strides are in elements, between rows.
- dtypes are "float32", "bfloat16" or "float16". *act dtype* is that of the model's rows, *KV dtype* that
  of pages; KV on the host alone may also be "int8", which is lossy.
- Seconds and bytes; log-sum-exp is the natural logarithm.
- A value out of range raises ValueError naming field and limit; a call in the wrong state RuntimeError.
"""

from typing import TypedDict

import numpy as np
import numpy.typing as npt

class WorkerStatsDict(TypedDict):
    """Counters of one host worker since the segment was laid out."""

    busy_s: float  # serving tasks, pieces and copies
    tasks: int  # rows answered with a result
    pieces: int  # parts of split tasks
    shared_rows: int  # rows served together with others that begin with the same pages
    stale_tasks: int  # rows of an old epoch: acknowledged, not computed
    out_of_order_tasks: int  # rows served after one that was submitted later
    kv_bytes_read: int
    copies: int
    copied_bytes: int

class LaneStatsDict(TypedDict):
    """What LanePort counted, and what the host left in the segment."""

    submitted_rows: int
    lane_entries: int  # rows taken
    same_iteration_entries: int  # rows taken in the walk that submitted them
    cancelled_rows: int  # in flight when cancelled
    landed_pages: int
    fetched_pages: int
    waiting_lanes: int
    draining_lanes: int
    free_frames: int
    current_layer: int  # -1: no walk
    attention_gap_s: float  # moving average of exit(l) -> take(l) within walks
    host_ready: bool  # a host has attached
    host_pid: int
    arena_bytes: int  # KV memory of the host: its size, and what was resident when the host last looked
    arena_resident_bytes: int
    arena_huge_bytes: int  # of those, in huge pages
    workers: list[WorkerStatsDict]

class KvGeometry:
    """Shape of one side's KV. head_dim is a multiple of 8 from 64 to 256, page_size any number of tokens.

    A page is one contiguous blob
    ``[layer][K: [kv_head][head_dim][page_size] | V: [kv_head][page_size][head_dim]]``. With dtype "int8" each
    layer goes on ``[K scales: [kv_head][page_size] | V scales: [kv_head][page_size]]`` in float32, padded to
    64 bytes: an element is worth its integer times the scale of its token and KV head.
    """

    def __init__(
        self, *, num_layers: int, num_kv_heads: int, head_dim: int, page_size: int, dtype: str
    ) -> None: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def page_bytes(self) -> int: ...

class PagedKv:
    """``num_pages`` pages in memory of the caller's, from ``address`` on (num_pages * page_bytes bytes)."""

    def __init__(self, geometry: KvGeometry, address: int, num_pages: int) -> None: ...
    @property
    def geometry(self) -> KvGeometry: ...
    @property
    def num_pages(self) -> int: ...
    def page_address(self, id: int) -> int: ...
    def write(
        self,
        layer: int,
        n: int,
        k_addr: int,
        k_stride: int,
        v_addr: int,
        v_stride: int,
        act_dtype: str,
        page_ids_addr: int,
        offsets_addr: int,
    ) -> None:
        """Writes row i of k and v to token offsets[i] of page page_ids[i], converted to the KV dtype.

        int8: scale = largest magnitude / 127 for each KV head, elements rounded to nearest even.
        Rows are [num_kv_heads * head_dim] in act_dtype; page_ids and offsets are int32 [n]. Nothing is
        written when one of them is out of range.
        """
    def gather(
        self,
        layer: int,
        table_addr: int,
        num_tokens: int,
        k_out_addr: int,
        v_out_addr: int,
        first_token: int = 0,
    ) -> None:
        """Copies tokens [first_token, num_tokens) of one layer, through the int32 page table ``table``.

        k_out and v_out are [num_kv_heads][num_tokens - first_token][head_dim] in the KV dtype. ValueError for
        int8.
        """

class ThreadTeam:
    """``num_threads`` threads, the caller included, that share each `paged_attention`,
    `prompt_attention` and `dense`.

    Member i > 0 is pinned to cpus[i % len(cpus)], or inherits the creator's affinity.
    """

    def __init__(self, num_threads: int, cpus: list[int] = ...) -> None: ...
    @property
    def num_threads(self) -> int: ...

def paged_attention(
    team: ThreadTeam,
    kv: PagedKv,
    layer: int,
    n: int,
    q_addr: int,
    tables_addr: int,
    table_stride: int,
    context_lens_addr: int,
    out_addr: int,
    num_heads: int,
    scale: float,
    window: int = 0,
) -> None:
    """Decode attention of one query token for each of n sequences.

    q and out are float32 [n][num_heads * head_dim]; tables int32 [n][table_stride]; context_lens int32 [n],
    the query's own token included (0 gives zeros). With a window a query attends to the last `window` of them
    alone. Query head h uses KV head
    h // (num_heads // num_kv_heads).
    """

def prompt_attention(
    team: ThreadTeam,
    kv: PagedKv,
    layer: int,
    chunks: npt.NDArray[np.int64],
    tables_addr: int,
    table_stride: int,
    dtype: str,
    q_addr: int,
    q_stride: int,
    out_addr: int,
    out_stride: int,
    num_heads: int,
    scale: float,
    window: int = 0,
) -> None:
    """Causal attention of prefill chunks over their pages, which hold their own tokens already.

    chunks[i] = (first_row, num_rows, start): rows of q and out, each [num_heads * head_dim] in `dtype`, that
    are tokens start, start + 1, ... of one prompt, whose page table is row i of `tables`, int32
    [len(chunks)][table_stride]. With a window a token attends to the last `window` ones alone, itself
    included.
    """

class DenseWeight:
    """A weight [num_out][num_in] of type from_dtype, rows ``stride`` elements apart, packed into own memory.

    dtype: "float32", "bfloat16", "float16", or "int8" with a scale an output (its largest magnitude / 127).
    """

    def __init__(
        self, address: int, from_dtype: str, stride: int, num_out: int, num_in: int, dtype: str
    ) -> None: ...
    @property
    def num_out(self) -> int: ...
    @property
    def num_in(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def bytes(self) -> int: ...

def dense(
    team: ThreadTeam,
    weight: DenseWeight,
    n: int,
    x_addr: int,
    x_stride: int,
    y_addr: int,
    y_stride: int,
    dtype: str,
    bias_addr: int = 0,
    gate: DenseWeight | None = None,
    gate_bias_addr: int = 0,
) -> None:
    """y [n][num_out] = x [n][num_in] W^T + bias; x and y of ``dtype`` (no int8), bias float32, 0: none.

    With a gate (same shape and type), y = silu(x gate^T + gate bias) * (x W^T + bias).

    Sums are float32, in one order for any n and any number of threads: a row's result depends on that row
    alone. With bfloat16 rows and weights, on a CPU with AVX-512 BF16, they are sums of pairs of inputs, given
    rows at even strides in memory aligned to 4 bytes.
    """

def rms_norm(
    n: int,
    groups: int,
    size: int,
    x_addr: int,
    x_stride: int,
    weight_addr: int,
    eps: float,
    y_addr: int,
    y_stride: int,
    dtype: str,
) -> None:
    """Of each row the ``groups`` parts of ``size`` elements: x / sqrt(mean(x^2) + eps), times weight.

    weight is [groups][size], everything of ``dtype``; arithmetic is float32, rounded before the weight is
    applied and after it, as transformers does. y may be x.
    """

def rotate_heads(
    n: int,
    heads: int,
    head_dim: int,
    x_addr: int,
    x_stride: int,
    cos_addr: int,
    sin_addr: int,
    positions_addr: int,
    dtype: str,
) -> None:
    """Rotary embedding of the first ``heads`` heads of each row, in place.

    cos and sin are [positions][head_dim] of ``dtype``, positions int64 [n]: x * cos + (x with its halves
    swapped) * sin, where sin is negative in its first half.
    """

def attention_pieces(
    kv: PagedKv,
    layer: int,
    q: npt.NDArray[np.float32],
    table: npt.NDArray[np.int32],
    bounds: list[int],
    scale: float,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Attention of q [num_heads, head_dim] over tokens [bounds[0], bounds[-1]), piecewise; for tests.

    Returns (out [num_heads, head_dim], lse [num_heads]) after merging the pieces. Equal bounds make an empty
    piece; no tokens at all give zeros and -inf.
    """

def exp_nonpositive(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The kernel's exp of x <= 0: relative error at most 1e-7, exactly 0 below -87."""

def set_simd(name: str) -> None:
    """Chooses scalar, avx2, avx512, avx512_vnni, avx512_bf16, neon or auto (the best), for the process.

    ValueError when the name is unknown or this CPU lacks the instructions.
    """

def simd() -> str:
    """The instruction set in use."""

def stream_read_gbps(address: int, bytes: int, team: ThreadTeam | None = None) -> float:
    """Reads the memory once with plain loads, on the calling thread or on a team; 1e9 bytes per second."""

class LaneGeometry:
    """Everything the two ends of a segment must agree on. scale 0 means 1 / sqrt(head_dim).

    num_partitions (at most 32, and num_host_pages) divides the host pages into contiguous runs: one per NUMA
    node.
    kv_dtype is the device's. host_kv_dtype is "auto" (the same), its name, or "int8", from which no page
    returns.
    In layers `window_layers` (numbers below 1024) a row attends to the last `window` tokens of its lane, its
    own included; 0 is no window.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        hidden_size: int,
        act_dtype: str,
        kv_dtype: str,
        max_lanes: int,
        host_page_size: int,
        max_pages_per_lane: int,
        num_host_pages: int,
        device_page_size: int,
        num_frames: int = 0,
        scale: float = 0.0,
        num_partitions: int = 1,
        host_kv_dtype: str = "auto",
        window: int = 0,
        window_layers: list[int] = ...,
    ) -> None: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def act_dtype(self) -> str: ...
    @property
    def kv_dtype(self) -> str: ...
    @property
    def host_kv_dtype(self) -> str: ...
    @property
    def max_lanes(self) -> int: ...
    @property
    def host_page_size(self) -> int: ...
    @property
    def max_pages_per_lane(self) -> int: ...
    @property
    def num_host_pages(self) -> int: ...
    @property
    def device_page_size(self) -> int: ...
    @property
    def num_frames(self) -> int: ...
    @property
    def scale(self) -> float: ...
    @property
    def num_partitions(self) -> int: ...
    @property
    def window(self) -> int: ...
    def first_token(self, layer: int, tokens: int) -> int:
        """First token that a row attends to in this layer, when its own is the last of `tokens`."""
    def partition_of_page(self, page: int) -> int:
        """Partition that owns a host page: page * num_partitions // num_host_pages."""
    @property
    def host_page_bytes(self) -> int: ...
    @property
    def device_page_bytes(self) -> int: ...

def segment_bytes(geometry: LaneGeometry) -> int:
    """Bytes of shared memory that LanePort lays out."""

def segment_geometry(address: int) -> LaneGeometry:
    """The geometry of the segment at ``address``; ValueError when there is none of this version."""

class LanePort:
    """The device process's end of the segment. One thread uses it.

    A slot's life: ``reset``, ``set_pages``, then for each token ``start_token`` and for each layer ``exit``
    and ``take``.
    """

    def __init__(self, geometry: LaneGeometry, address: int) -> None:
        """Lays out a fresh segment at ``address`` (64-byte aligned, segment_bytes(geometry) bytes)."""
    def begin_walk(self) -> None: ...
    def end_walk(self) -> None: ...
    def exit(
        self,
        layer: int,
        n: int,
        slots_addr: int,
        q_addr: int,
        q_stride: int,
        k_addr: int,
        k_stride: int,
        v_addr: int,
        v_stride: int,
        x_addr: int,
        x_stride: int,
    ) -> None:
        """n rows leave the batch: q, k, v and residual x (act dtype) of slots[i] (int32) are submitted.

        Call it with n = 0 as well, to tell the host where the device is. RuntimeError when a slot already has
        a row in flight or owns no host page for its token; nothing is submitted then.
        """
    def take(
        self,
        layer: int,
        cap: int,
        same_iteration: bool,
        slots_out_addr: int,
        attn_addr: int,
        attn_stride: int,
        x_addr: int,
        x_stride: int,
    ) -> int:
        """Slots waiting at ``layer`` whose result is there now, oldest first, at most ``cap``; how many.

        slots_out is int32 [cap]; row i of attn [num_heads * head_dim] and x [hidden_size] (act dtype) are
        filled. With same_iteration false only rows submitted before this walk began count; outside walks
        every row does.
        """
    def wait_all(self, layer: int, timeout_s: float) -> bool:
        """Waits until every slot waiting at ``layer`` has its result; false after timeout_s."""
    def wait_any(self, timeout_s: float) -> bool:
        """Waits until any waiting slot has its result; false after timeout_s."""
    def scan(self, ready_addr: int, waiting_addr: int, oldest_addr: int) -> None:
        """Per layer: int32 slots ready, int32 slots waiting (those included), uint64 oldest.

        ``oldest`` is the submission number of the oldest ready row, 2**64 - 1 when there is none.
        """
    def set_pages(self, slot: int, start: int, ids: list[int]) -> None:
        """Host pages of the lane from index ``start`` on; with a row in flight only those after its own."""
    def start_token(self, slot: int, position: int) -> None:
        """Position of the token whose rows are submitted next; it attends to position + 1 tokens."""
    def reset(self, slot: int) -> None:
        """New owner: new epoch, no pages. RuntimeError while something is in flight."""
    def cancel(self, slot: int) -> bool:
        """Forgets the row in flight. True: slot and pages are free now; false: once `drained` names it."""
    def drained(self) -> list[int]:
        """Slots cancelled in flight that the host has acknowledged since the last call."""
    def free_frames(self) -> int:
        """Copies that can be submitted now; RuntimeError beyond that."""
    def land(
        self,
        id: int,
        device_page_addr: int,
        token_offset: int,
        num_tokens: int,
        host_offset: int,
        host_pages: list[int],
    ) -> None:
        """Device page -> host: num_tokens tokens of it, from token_offset on.

        They go to consecutive tokens of ``host_pages`` (exactly the pages touched), from token host_offset of
        the first one on. The device page may be reused as soon as this returns.
        """
    def fetch(
        self,
        id: int,
        token_offset: int,
        num_tokens: int,
        host_offset: int,
        host_pages: list[int],
        device_page_addr: int,
    ) -> None:
        """Host -> device page; `collect_copies` writes the token range into the device page.

        RuntimeError when host_kv_dtype is int8.
        """
    def cancel_fetch(self, id: int) -> None:
        """The device page is not wanted any more and is not written; the id is still reported when done."""
    def collect_copies(self) -> list[int]:
        """Ids of copies completed since the last call; their frames are free again."""
    def arm(self) -> bool:
        """Asks the host to write its eventfd at the next completion (of a row, an acknowledgement or a copy).

        True: something is complete already; do not sleep. The eventfd may still be written once after
        `disarm`: drain it.
        """
    def disarm(self) -> None: ...
    def stats(self) -> LaneStatsDict: ...

class HostWorkers:
    """The host process's end of the segment at ``address``: the KV arena, and workers that serve it.

    Worker i is pinned to cpus[i % len(cpus)] when given, and belongs to partitions[i % len(partitions)], or i
    modulo the geometry's number of them; ``nice`` (0 .. 19) lowers their priority; ``arena_bytes`` above 0 is
    a limit on KV memory (ValueError when the segment asks for more). Call `stop` before unmapping the
    segment.

    ``nodes`` places each partition's pages on a NUMA node, ``lock`` keeps touched pages from being swapped
    out. What the kernel refuses, huge pages as well, is in ``warnings``; everything works without.
    """

    def __init__(
        self,
        address: int,
        eventfd: int = -1,
        cpus: list[int] = ...,
        nice: int = 0,
        arena_bytes: int = 0,
        partitions: list[int] = ...,
        nodes: list[int] = ...,
        lock: bool = False,
    ) -> None: ...
    def start(self, num_threads: int) -> None: ...
    def stop(self) -> None: ...
    @property
    def num_workers(self) -> int: ...
    @property
    def geometry(self) -> LaneGeometry: ...
    @property
    def arena_bytes(self) -> int: ...
    @property
    def warnings(self) -> list[str]:
        """What the kernel refused the arena: one sentence each, with the reason and the way out."""
    def publish_memory(self) -> None:
        """Looks how much of the arena is resident (milliseconds and more), for `LanePort.stats`."""
    @property
    def kv(self) -> PagedKv: ...
    def pending(self) -> list[tuple[int, int]]:
        """(layer, slot) of every row to serve by hand, oldest first. Only without threads, as below."""
    def serve(self, slot: int) -> bool:
        """Serves that slot's row (one of an old epoch is acknowledged only); false when there is none."""
    def pending_copies(self) -> list[int]: ...
    def serve_copy(self, id: int) -> bool: ...
    def stats(self) -> list[WorkerStatsDict]: ...
