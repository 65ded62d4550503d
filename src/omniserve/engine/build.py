"""From settings and a checkpoint to an Engine: sizes first, then memory, then processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch

import omniserve._native as _native
from omniserve.attention.cpu import CpuAttention, CpuKvStore, kv_geometry
from omniserve.config import (
    DEVICE_MEMORY_SHARE,
    HOST_MEMORY_SHARE,
    CpuSplit,
    EngineConfig,
    split_cpus,
)
from omniserve.dtypes import DTYPES, dtype_name
from omniserve.engine.acceptance import Acceptance
from omniserve.engine.cpu_executor import CpuExecutor
from omniserve.engine.loop import Engine
from omniserve.errors import ConfigError, ModelError
from omniserve.host.supervisor import Host, HostSupervisor
from omniserve.host.topology import num_partitions
from omniserve.machine import memory_limit_bytes
from omniserve.model.decoder import Decoder
from omniserve.model.families import ModelConfig, read_model_config
from omniserve.model.loading import load_decoder
from omniserve.policy.baselines import PREDICTING, make_policy
from omniserve.policy.budget import FixedBudget, Policy
from omniserve.policy.latency import LearningPrediction, Prediction
from omniserve.policy.request import Limits
from omniserve.policy.terms import Terms, walk_bound_s

logger = logging.getLogger("omniserve.engine")

MAX_DEFAULT_MODEL_LEN = 8192
# Staging frames between device and host: pages in flight at once.
NUM_FRAMES = 32
# What the attention kernel takes.
MIN_HEAD_DIM, MAX_HEAD_DIM = 64, 256


def choose_dtype(config: EngineConfig, model: ModelConfig) -> torch.dtype:
    """ "auto" is float32 on the CPU device, whatever the checkpoint holds: its tokens are the exactness
    reference, and 16-bit weights widen to it without loss."""
    return torch.float32 if config.dtype == "auto" else DTYPES[config.dtype]


def host_kv_dtype(config: EngineConfig, dtype: torch.dtype) -> str:
    """Storage of KV on the host: "auto" is the model's own dtype."""
    return dtype_name(dtype) if config.host_kv_dtype == "auto" else config.host_kv_dtype


def model_len(config: EngineConfig, model: ModelConfig) -> int:
    limit = model.max_position_embeddings
    if config.max_model_len is None:
        return min(limit, MAX_DEFAULT_MODEL_LEN)
    if config.max_model_len > limit:
        raise ConfigError(f"max_model_len: {config.max_model_len} exceeds the model's {limit} positions")
    return config.max_model_len


def _num_pages(config: EngineConfig, side: str, page_bytes: int, page_size: int, max_model_len: int) -> int:
    """Pages that fit the side's memory, not more than every possible request could fill."""
    given: int | None = getattr(config, f"{side}_memory_bytes")
    share = DEVICE_MEMORY_SHARE if side == "device" else HOST_MEMORY_SHARE
    memory = given if given is not None else int(memory_limit_bytes() * share)
    requests = config.max_num_seqs + config.max_lanes
    pages = min(memory // page_bytes, requests * -(-max_model_len // page_size))
    if pages < 2:
        raise ConfigError(
            f"{side}_memory_bytes: {memory} bytes hold {pages} pages of {page_size} tokens; "
            f"at least 2 pages ({2 * page_bytes} bytes) are needed"
        )
    return int(pages)


def _check_head_dim(model: ModelConfig) -> None:
    if model.head_dim % 8 or not MIN_HEAD_DIM <= model.head_dim <= MAX_HEAD_DIM:
        raise ModelError(
            f"head_dim {model.head_dim}: must be a multiple of 8 from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
        )


def make_limits(
    config: EngineConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    max_model_len: int,
    host_partitions: int = 1,
) -> Limits:
    _check_head_dim(model)

    def page_bytes(page_size: int, kv_dtype: str) -> int:
        kv_heads, head_dim = model.num_kv_heads, model.head_dim
        return kv_geometry(model.num_layers, kv_heads, head_dim, page_size, kv_dtype).page_bytes

    size = config.page_size
    device_pages = _num_pages(config, "device", page_bytes(size, dtype_name(dtype)), size, max_model_len)
    host_pages = 0
    if config.host_offload != "never":
        size = config.host_page_size
        host_bytes = page_bytes(size, host_kv_dtype(config, dtype))
        host_pages = _num_pages(config, "host", host_bytes, size, max_model_len)
    return Limits(
        num_layers=model.num_layers,
        num_device_pages=device_pages,
        num_host_pages=host_pages,
        page_size=config.page_size,
        host_page_size=config.host_page_size,
        watermark_pages=max(1, round(config.watermark * device_pages)),
        max_num_seqs=config.max_num_seqs,
        max_lanes=config.max_lanes,
        max_lane_rows=config.max_lane_rows,
        num_frames=NUM_FRAMES,
        max_copies_per_step=config.max_copies_per_step,
        host_offload=config.host_offload,
        num_host_partitions=max(1, min(host_partitions, host_pages)),
        host_kv_is_lossy=config.host_kv_dtype == "int8",
        prefix_reserve_pages=round(config.prefix_cache_reserve * device_pages),
    )


def make_acceptance(
    limits: Limits, model: ModelConfig, max_model_len: int, max_logprobs: int = 20
) -> Acceptance:
    """The longest request that one side alone can hold: nothing accepted can wait for ever."""
    total, limited_by = limits.num_device_pages * limits.page_size, "device_memory_bytes"
    host_total = limits.num_host_pages * limits.host_page_size
    if limits.host_offload == "always" and host_total < total:
        total, limited_by = host_total, "host_memory_bytes"
    return Acceptance(max_model_len, model.vocab_size, model.eos_token_ids, total, limited_by, max_logprobs)


def make_engine(
    config: EngineConfig,
    decoder: Decoder,
    max_model_len: int,
    split: CpuSplit,
    arrivals: Callable[[], bool] = lambda: False,
    on_layer: Callable[[], None] = lambda: None,
    host: Callable[..., Host] = HostSupervisor,
    host_partitions: int | None = None,
    latency: LearningPrediction | None = None,
) -> Engine:
    """Build an engine around loaded weights. `host(geometry, cpus, threads, lock_memory)` makes the host.

    latency: predicts what walks take; None: not calibrated, so that no target is promised.
    host_partitions: of the host's pages; None: one for each NUMA node that the host's CPUs span.
    """
    if host_partitions is None:
        host_partitions = num_partitions(split.host_cpus)
    limits = make_limits(config, decoder.config, decoder.dtype, max_model_len, host_partitions)
    executor = CpuExecutor(
        decoder,
        _device_attention(config, decoder, limits),
        max_rows=config.max_device_rows,
        max_lane_rows=config.max_lane_rows,
        max_lanes=config.max_lanes,
        reentry=config.reentry,
        arrivals=arrivals,
        on_layer=on_layer,
    )
    the_host: Host | None = None
    kv_dtype_there: str | None = None
    if config.host_offload != "never":
        geometry = lane_geometry(config, decoder, limits, max_model_len)
        the_host = host(geometry, split.host_cpus, split.host_threads, config.host_mlock)
        kv_dtype_there = geometry.host_kv_dtype
    acceptance = make_acceptance(limits, decoder.config, max_model_len, config.max_logprobs)
    return Engine(
        executor,
        the_host,
        limits,
        engine_policy(config, decoder, latency),
        acceptance,
        config,
        split.host_threads,
        kv_dtype_there,
        quantization=decoder.quantization,
        latency=latency,
    )


def engine_policy(config: EngineConfig, decoder: Decoder, latency: Prediction | None) -> Policy:
    """The policy of the settings; with targets and a calibrated model, one that holds them.

    Targets that nothing holds are worth a warning.
    """
    fixed = FixedBudget(config.max_device_rows, config.max_lane_rows, config.pass_budget_s)
    bound_s = walk_bound_s(config.classes)
    if bound_s is None:  # nobody has targets
        return make_policy(config.policy, fixed, None, None)
    kv_dtype = host_kv_dtype(config, decoder.dtype)
    kv_heads, head_dim, size = decoder.num_kv_heads, decoder.head_dim, config.host_page_size
    page_bytes = kv_geometry(1, kv_heads, head_dim, size, kv_dtype).page_bytes
    terms = Terms(
        max_num_batched_tokens=config.max_device_rows,
        max_lane_rows=config.max_lane_rows,
        pass_budget_s=config.pass_budget_s,
        walk_bound_s=bound_s,
        kv_token_bytes=page_bytes // size,
        best_effort_share=config.best_effort_share,
    )
    policy = make_policy(config.policy, fixed, latency, terms)
    if not policy.promises_slo:
        logger.warning(
            "the targets of the service classes are not promised: that takes a latency model (calibrate: %r) "
            "and one of the policies %s (policy: %r)",
            config.calibrate,
            ", ".join(PREDICTING),
            config.policy,
        )
    return policy


def _device_attention(config: EngineConfig, decoder: Decoder, limits: Limits) -> CpuAttention:
    layers, heads, kv_heads = decoder.num_layers, decoder.num_heads, decoder.num_kv_heads
    kv_dtype = dtype_name(decoder.dtype)
    geometry = kv_geometry(layers, kv_heads, decoder.head_dim, config.page_size, kv_dtype)
    store = CpuKvStore(geometry, limits.num_device_pages)
    return CpuAttention(
        store,
        heads,
        decoder.head_dim,
        decoder.team,
        decoder.config.window,
        decoder.config.window_layers,
    )


def lane_geometry(
    config: EngineConfig, decoder: Decoder, limits: Limits, max_model_len: int
) -> _native.LaneGeometry:
    """Sizes of the lanes' segment. KV is in the model's dtype on both sides, or int8 on the host."""
    name = dtype_name(decoder.dtype)
    return _native.LaneGeometry(
        num_layers=decoder.num_layers,
        num_heads=decoder.num_heads,
        num_kv_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        hidden_size=decoder.config.hidden_size,
        act_dtype=name,
        kv_dtype=name,
        host_kv_dtype=config.host_kv_dtype,
        max_lanes=config.max_lanes,
        host_page_size=config.host_page_size,
        max_pages_per_lane=-(-max_model_len // config.host_page_size),
        num_host_pages=limits.num_host_pages,
        device_page_size=config.page_size,
        num_frames=limits.num_frames,
        num_partitions=limits.num_host_partitions,
        window=decoder.config.window,
        window_layers=list(decoder.config.window_layers),
    )


def device_decoder(config: EngineConfig, split: CpuSplit, path: Path) -> Decoder:
    """The checkpoint in `path` as an engine with these settings runs it, and this process as the device.

    The process is pinned to the device's CPUs, and its threads are those of the decoder's team. Whoever
    measures walks loads weights by this too.
    """
    model = read_model_config(path)
    if split.device_cpus:
        os.sched_setaffinity(0, split.device_cpus)
    torch.set_num_threads(1)  # the cores are the team's; small operations end before another thread is awake
    return load_decoder(
        path,
        choose_dtype(config, model),
        max_model_len=model_len(config, model),
        load_format=config.load_format,
        show_progress=True,
        quantization=config.quantization,
        team=_native.ThreadTeam(split.device_threads, list(split.device_cpus)),
    )


def load_engine(
    config: EngineConfig,
    path: Path,
    arrivals: Callable[[], bool] = lambda: False,
    on_layer: Callable[[], None] = lambda: None,
) -> Engine:
    """Load the checkpoint in `path` and build an engine, this process pinned to the device's CPUs.

    arrivals, on_layer: as for CpuExecutor.
    """
    model = read_model_config(path)
    max_model_len = model_len(config, model)
    dtype = choose_dtype(config, model)
    make_limits(config, model, dtype, max_model_len)  # refuse impossible sizes before the weights are read
    split = split_cpus(config)
    decoder = device_decoder(config, split, path)
    latency = None
    if config.calibrate == "always" or config.has_predicted_budget:
        from omniserve.engine.calibration import ensure_profile  # it builds an engine itself

        latency = ensure_profile(config, decoder, split, max_model_len)
    return make_engine(config, decoder, max_model_len, split, arrivals, on_layer, latency=latency)
