"""Engine settings: frozen, checked where they are made, complete before anything is built."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from omniserve.errors import ConfigError

HostOffload = Literal["auto", "always", "never"]
Reentry = Literal["same_iteration", "next_iteration", "wait"]
DTypeName = Literal["auto", "float32", "bfloat16"]

# Shares of the memory limit used when the caller sets none. The weights, the Python processes and the
# page cache need the rest.
DEVICE_MEMORY_SHARE = 0.15
HOST_MEMORY_SHARE = 0.30


def available_cpus() -> list[int]:
    """CPU ids this process may use: the affinity mask, cut to the cgroup's CPU quota (rounded down, >= 1)."""
    cpus = sorted(os.sched_getaffinity(0))
    quota = _cgroup_cpu_quota()
    return cpus if quota is None else cpus[: max(1, int(quota))]


def memory_limit_bytes() -> int:
    """The smaller of physical memory and every cgroup limit that applies, in bytes."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        for folder in _cgroup_folders():
            text = _read(folder / name)
            if text and text != "max":
                limits.append(int(text))
    return min(limits)


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _cgroup_folders() -> list[Path]:
    """The mount point and this process's own cgroup with all its ancestors."""
    root = Path("/sys/fs/cgroup")
    folders = [root]
    for line in (_read(Path("/proc/self/cgroup")) or "").splitlines():
        own = root / line.split(":", 2)[-1].lstrip("/")
        folders += [p for p in (own, *own.parents) if p.is_relative_to(root) and p != root]
    return folders


def _cgroup_cpu_quota() -> float | None:
    quotas = []
    for folder in _cgroup_folders():
        parts = (_read(folder / "cpu.max") or "max").split()
        if len(parts) == 2 and parts[0] != "max":
            quotas.append(int(parts[0]) / int(parts[1]))
    return min(quotas, default=None)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything the engine needs to know besides the weights.

    device            "cpu" or "auto" (CUDA is not there yet: "cuda" is refused).
    device_threads    threads of dense modules, prefill and LS attention; None: half of the cores, all
                      of them when host_offload is "never".
    host_threads      threads of host attention, on cores of their own; None: the remaining cores.
    device_memory_bytes, host_memory_bytes
                      KV memory of each side; None: shares of the cgroup's memory limit.
    host_offload      "auto": BE decodes on the device while free pages exceed the watermark, else becomes
                      a lane; "always": after its prefill; "never": no host process.
    reentry           when a lane's attention result may enter: "same_iteration", "next_iteration" (the
                      paper's rule) or "wait" (the device waits for it; for comparison).
    max_num_batched_tokens
                      device rows of one walk: LS and BE prefill chunks and decodes. Lane rows not counted.
    max_num_seqs      requests with device rows in one walk.
    max_lanes, max_lane_rows
                      slots, and lane rows that may enter at one layer.
    page_size         tokens per device page; host_page_size: tokens per host page.
    watermark         share of device pages that BE leaves free or clean for LS.
    max_copies_per_step
                      pages that start to move between device and host in one step.
    pass_budget_s     seconds of lane passes before the engine looks up again.
    seed              seed of requests that bring none, plus their number.
    """

    model: str = "smollm2-135m"
    dtype: DTypeName = "auto"
    device: Literal["auto", "cpu"] = "auto"
    device_threads: int | None = None
    host_threads: int | None = None
    device_memory_bytes: int | None = None
    host_memory_bytes: int | None = None
    host_offload: HostOffload = "auto"
    reentry: Reentry = "same_iteration"
    max_model_len: int | None = None
    max_num_batched_tokens: int = 64
    max_num_seqs: int = 64
    max_lanes: int = 64
    max_lane_rows: int = 16
    page_size: int = 16
    host_page_size: int = 64
    watermark: float = 0.1
    max_copies_per_step: int = 8
    pass_budget_s: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_choice("dtype", DTypeName)
        self._check_choice("host_offload", HostOffload)
        self._check_choice("reentry", Reentry)
        if self.device not in ("auto", "cpu"):
            raise ConfigError(f"device: {self.device!r} is not supported yet; use 'cpu' or 'auto'")
        for name in ("max_num_batched_tokens", "max_num_seqs", "max_lanes", "max_lane_rows",
                     "page_size", "host_page_size", "max_copies_per_step"):  # fmt: skip
            self._check_positive(name)
        for name in ("device_threads", "host_threads", "device_memory_bytes", "host_memory_bytes",
                     "max_model_len"):  # fmt: skip
            if getattr(self, name) is not None:
                self._check_positive(name)
        if not 0.0 <= self.watermark < 1.0:
            raise ConfigError(f"watermark: must lie in [0, 1), got {self.watermark!r}")
        if not self.pass_budget_s > 0:
            raise ConfigError(f"pass_budget_s: must be above 0 seconds, got {self.pass_budget_s!r}")

    def _check_choice(self, name: str, choices: object) -> None:
        value = getattr(self, name)
        if value not in get_args(choices):
            raise ConfigError(f"{name}: {value!r} is none of {', '.join(get_args(choices))}")

    def _check_positive(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name}: must be an integer of at least 1, got {value!r}")


@dataclass(frozen=True, slots=True)
class CpuSplit:
    """Which CPUs each side runs on. The sets do not overlap unless the machine has a single CPU."""

    device_cpus: tuple[int, ...]
    host_cpus: tuple[int, ...]


def split_cpus(config: EngineConfig, cpus: list[int] | None = None) -> CpuSplit:
    """Divide the usable CPUs between device and host.

    Raises ConfigError when more threads are asked for than there are CPUs. On a single CPU both sides
    share it: correct, but the host then takes device time.
    """
    cpus = available_cpus() if cpus is None else cpus
    total = len(cpus)
    if config.host_offload == "never":
        wanted = config.device_threads or total
        if wanted > total:
            raise ConfigError(f"device_threads: {wanted} asked for, {total} CPUs are available")
        return CpuSplit(tuple(cpus[:wanted]), ())
    if total == 1 and (config.device_threads or 1) == (config.host_threads or 1) == 1:
        return CpuSplit(tuple(cpus), tuple(cpus))
    host = config.host_threads
    device = config.device_threads or (max(1, total // 2) if host is None else max(1, total - host))
    host = host or max(1, total - device)
    if device + host > total:
        raise ConfigError(
            f"device_threads + host_threads: {device} + {host} asked for, {total} CPUs are available; "
            "lower one of them, or set host_offload='never'"
        )
    return CpuSplit(tuple(cpus[:device]), tuple(cpus[device : device + host]))
