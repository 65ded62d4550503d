"""Which LatencyModel an engine uses: the cached profile of this model on this machine, or a new one.

$OMNISERVE_CACHE/profiles/<model>-<digest of the key>.json
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

import omniserve
import omniserve._native as _native
from omniserve.config import DEVICE_ROWS_WITH_TARGETS, CpuSplit, EngineConfig
from omniserve.dtypes import dtype_name
from omniserve.engine.profiler import BUDGET_S, Progress, profile
from omniserve.model.cache import cache_root, locked, sha256_of
from omniserve.model.decoder import Decoder
from omniserve.policy.latency_model import SCHEMA, LatencyFit, LatencyModel

logger = logging.getLogger("omniserve.engine")


def ensure_profile(
    config: EngineConfig,
    decoder: Decoder,
    split: CpuSplit,
    max_model_len: int,
    *,
    refresh: bool = False,
    budget_s: float = BUDGET_S,
) -> LatencyModel:
    """The model of `decoder` here, measured (up to a minute, with a progress bar) when no cached one fits.

    Walks are measured of every size that an engine has by default, so that one with targets finds the profile
    of one without, given the same threads. A cached profile fits when its key is the same: model, device,
    dtype, threads, largest walk, CPU and software. One that cannot be read is measured again, with a warning.
    `refresh` measures in any case.
    """
    config = replace(config, max_num_batched_tokens=profiled_rows(config))
    key = profile_key(config, decoder, split, max_model_len)
    path = profile_path(key)
    cached = None if refresh else _read(path, key)
    if cached is not None:
        return LatencyModel(cached)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock")):
        cached = None if refresh else _read(path, key)  # somebody else may have made it meanwhile
        if cached is None:
            with _shown_progress(config.model) as progress:
                cached = profile(config, decoder, split, max_model_len, key, budget_s, progress)
            _write(path, cached)
    return LatencyModel(cached)


def profiled_rows(config: EngineConfig) -> int:
    """Device rows of the largest walk measured."""
    return config.max_num_batched_tokens or DEVICE_ROWS_WITH_TARGETS


def profile_key(
    config: EngineConfig, decoder: Decoder, split: CpuSplit, max_model_len: int
) -> dict[str, str | int]:
    """Everything that changes what work costs: plain data, part of the profile."""
    shape = decoder.config
    sizes = (shape.num_layers, shape.hidden_size, decoder.num_heads, decoder.num_kv_heads, decoder.head_dim)
    return {
        "schema": SCHEMA,
        "model": config.model,
        "shape": "x".join(map(str, (*sizes, shape.vocab_size))),
        "weight_bytes": decoder.weight_bytes,
        "device": "cpu",
        "cpu": _cpu_name(),
        "dtype": dtype_name(decoder.dtype),
        "quantization": decoder.quantization,
        "host_kv_dtype": config.host_kv_dtype,
        "device_threads": split.device_threads,
        "host_threads": split.host_threads,
        "is_pinned": int(bool(split.device_cpus)),
        "shared_cpus": len(set(split.device_cpus) & set(split.host_cpus)),
        "max_device_rows": profiled_rows(config),
        "max_lane_rows": config.max_lane_rows,
        "max_num_seqs": config.max_num_seqs,
        "max_model_len": max_model_len,
        "page_sizes": f"{config.page_size}, {config.host_page_size}",
        "software": ", ".join((omniserve.__version__, f"torch {torch.__version__}", _native_digest())),
    }


def profile_path(key: dict[str, str | int]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    name = "".join(c if c.isalnum() or c in "-._" else "-" for c in Path(str(key["model"])).name)
    return cache_root() / "profiles" / f"{name}-{digest}.json"


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _native_digest() -> str:
    assert _native.__file__ is not None
    return sha256_of(Path(_native.__file__))[:12]


def _read(path: Path, key: dict[str, str | int]) -> LatencyFit | None:
    """The profile in `path`; None when there is none, or with a warning when it is broken."""
    try:
        fit = LatencyFit.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("profile %s cannot be used and is measured again: %s", path, error)
        return None
    if fit.key != key:
        logger.warning("profile %s is another one's and is measured again", path)
        return None
    return fit


def _write(path: Path, fit: LatencyFit) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(fit.to_json(), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _shown_progress(model: str) -> Iterator[Progress]:
    """A bar on standard error where somebody looks, one line in the log elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        logger.info("measuring %s on this machine", model)
        yield lambda what, share: None
        return
    from rich.progress import Progress as Bars

    with Bars(console=console, transient=True) as bars:
        task = bars.add_task(f"measuring {model}", total=1.0)
        yield lambda what, share: bars.update(task, completed=share, description=f"measuring {model}: {what}")
