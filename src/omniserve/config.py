"""Engine settings: frozen, checked where they are made, complete before anything is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeGuard, get_args

from omniserve.errors import ConfigError
from omniserve.machine import CpuBudget, available_cpus
from omniserve.policy.baselines import PREDICTING, REFUSED, RULES
from omniserve.policy.terms import walk_bound_s
from omniserve.types import DEFAULT_CLASSES, ServiceClass

HostOffload = Literal["auto", "always", "never"]
Reentry = Literal["same_iteration", "next_iteration", "wait"]
DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
LoadFormat = Literal["auto", "dummy"]
HostKvDTypeName = Literal["auto", "int8"]
Quantization = Literal["none", "bfloat16", "int8", "int4"]
Calibrate = Literal["auto", "always", "never"]
AdmissionMode = Literal["on", "off"]

# Shares of the memory limit used when the caller sets none. The weights, the Python processes and the
# page cache need the rest.
DEVICE_MEMORY_SHARE = 0.15
HOST_MEMORY_SHARE = 0.30
# Device rows of a walk unless set. On a CPU core 64 rows of a prompt take a third of the time of 256, at
# seven eighths of the rate.
DEVICE_ROWS, DEVICE_ROWS_WITH_TARGETS = 64, 256
# Limits of the native part.
MAX_HOST_THREADS = 1024
MAX_LANES = 1 << 20


def is_number(value: object) -> TypeGuard[int | float]:
    """True and False are none."""
    return type(value) in (int, float)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything the engine needs to know besides the weights.

    model             a folder with config.json and safetensors, a GGUF file, a Hugging Face name
                      ("org/name"), or "smollm2-135m" (docs/models.md).
    revision          branch, tag or commit of a Hugging Face name; None: its main branch.
    load_format       "auto", or "dummy": random weights of the model's shape; needs no weight files.
    dtype             of weights, activations and KV. "auto" is float32 on the CPU device, whatever the
                      checkpoint holds.
    quantization      of the weights of matrix products, rounded while they are loaded: "none", "bfloat16",
                      "int8" or "int4" (docs/models.md, "Quantisation"). LOSSY: every text is then outside the
                      exactness promise and marked (`metrics.is_exact` is False). Activations and KV stay in
                      `dtype`.
    device            "cpu" or "auto" (CUDA is not there yet: "cuda" is refused).
    device_threads    threads of dense modules, prefill and LS attention; None: all of the cores when
                      host_offload is "never" or predictions hold targets (both sides share them then), else
                      half of them, or those that host_threads leaves.
    host_threads      threads of host attention; None: all of the cores where the sides share them, else the
                      remaining ones.
    pin_cpus          keep each side's threads on CPUs of their own, the first ones of the affinity mask.
                      False for several engines that share one mask: all would choose the same.
    device_memory_bytes, host_memory_bytes
                      KV memory of each side; None: shares of the cgroup's memory limit.
    host_mlock        keep the host's KV from being swapped out; refused: a warning, and on without.
    host_kv_dtype     storage of KV on the host: "auto", that of the model, or "int8" with a scale per token
                      and head: two to four times as many tokens in host memory, but LOSSY. Texts of lanes
                      are then outside the exactness promise and marked (`metrics.is_exact` is False), and
                      lanes never return to the device.
    host_offload      "auto": BE decodes on the device while free pages exceed the watermark, else becomes
                      a lane; "always": after its prefill; "never": no host process.
    reentry           when a lane's attention result may enter: "same_iteration", "next_iteration" (the
                      paper's rule) or "wait" (the device waits for it; for comparison).
    max_num_batched_tokens
                      device rows of one walk: LS and BE prefill chunks and decodes. Lane rows not counted.
                      None: 64, which bounds a walk; 256 where predictions bound it, which takes targets, a
                      policy that holds them and a latency model.
    max_num_seqs      requests with device rows in one walk.
    max_lanes, max_lane_rows
                      slots, and lane rows that may enter at one layer.
    page_size         tokens per device page; host_page_size: tokens per host page.
    watermark         share of device pages that BE leaves free or clean for LS.
    enable_prefix_caching
                      keep full pages of finished requests, on either side, while nothing else needs them, and
                      compute no token again whose page is still there.
    prefix_cache_reserve
                      share of device pages with cached LS prefixes that BE work does not evict.
    max_copies_per_step
                      pages that start to move between device and host in one step.
    pass_budget_s     seconds of lane passes before the engine looks up again.
    calibrate         whether the engine has a latency model, measured at its first start (up to a minute) and
                      cached: "always", "never", or "auto", which is only when a target needs one. Without it
                      no target is promised, and stats() says "uncalibrated".
    seed              requests that bring none get a seed made of this one and their number.
    max_logprobs      most likely tokens that a request may ask for at each position; -1: any number.
    classes           service classes with their ranks and targets (docs/policy.md); every best-effort class
                      ranks behind all others.
    policy            "omniserve", or what it is compared with: "paper", "ls_only", "sarathi",
                      "vllm_priority", "llumnix" (policy/baselines). The last four keep everything on the
                      device.
    admission         "on": a latency-sensitive request is refused at its arrival when its targets, or those
                      of others beside it, cannot be held; "off": it waits, whatever comes of it.
    best_effort_share
                      share of device time that best-effort work has even when that breaks targets; 0: none.
    """

    model: str = "smollm2-135m"
    revision: str | None = None
    load_format: LoadFormat = "auto"
    dtype: DTypeName = "auto"
    quantization: Quantization = "none"
    device: Literal["auto", "cpu"] = "auto"
    device_threads: int | None = None
    host_threads: int | None = None
    pin_cpus: bool = True
    device_memory_bytes: int | None = None
    host_memory_bytes: int | None = None
    host_mlock: bool = False
    host_kv_dtype: HostKvDTypeName = "auto"
    host_offload: HostOffload = "auto"
    reentry: Reentry = "same_iteration"
    max_model_len: int | None = None
    max_num_batched_tokens: int | None = None
    max_num_seqs: int = 64
    max_lanes: int = 64
    max_lane_rows: int = 16
    page_size: int = 16
    host_page_size: int = 64
    watermark: float = 0.1
    enable_prefix_caching: bool = True
    prefix_cache_reserve: float = 0.25
    max_copies_per_step: int = 8
    pass_budget_s: float = 0.05
    calibrate: Calibrate = "auto"
    seed: int = 0
    max_logprobs: int = 20
    classes: tuple[ServiceClass, ...] = DEFAULT_CLASSES
    policy: str = "omniserve"
    admission: AdmissionMode = "on"
    best_effort_share: float = 0.0

    def __post_init__(self) -> None:
        self._check_choice("dtype", DTypeName)
        self._check_choice("quantization", Quantization)
        self._check_choice("load_format", LoadFormat)
        self._check_choice("host_kv_dtype", HostKvDTypeName)
        self._check_choice("host_offload", HostOffload)
        self._check_choice("reentry", Reentry)
        self._check_choice("calibrate", Calibrate)
        self._check_choice("admission", AdmissionMode)
        self._check_policy()
        check_classes(self.classes)
        if self.revision is not None and not (isinstance(self.revision, str) and self.revision):
            raise ConfigError(f"revision: must be a branch, tag or commit, got {self.revision!r}")
        for name in ("pin_cpus", "host_mlock", "enable_prefix_caching"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"{name}: must be True or False, got {getattr(self, name)!r}")
        if self.device not in ("auto", "cpu"):
            raise ConfigError(f"device: {self.device!r} is not supported yet; use 'cpu' or 'auto'")
        for name in ("max_num_seqs", "max_lanes", "max_lane_rows",
                     "page_size", "host_page_size", "max_copies_per_step"):  # fmt: skip
            self._check_positive(name)
        for name in ("device_threads", "host_threads", "device_memory_bytes", "host_memory_bytes",
                     "max_model_len", "max_num_batched_tokens"):  # fmt: skip
            if getattr(self, name) is not None:
                self._check_positive(name)
        for name in ("watermark", "prefix_cache_reserve", "best_effort_share"):
            share = getattr(self, name)
            if not is_number(share) or not 0.0 <= share < 1.0:
                raise ConfigError(f"{name}: must be a number in [0, 1), got {share!r}")
        if not is_number(self.pass_budget_s) or not self.pass_budget_s > 0:
            raise ConfigError(f"pass_budget_s: must be a number above 0, got {self.pass_budget_s!r}")
        if type(self.seed) is not int or not 0 <= self.seed < 2**62:
            raise ConfigError(f"seed: must be an integer in [0, 2**62), got {self.seed!r}")
        if type(self.max_logprobs) is not int or self.max_logprobs < -1:
            raise ConfigError(f"max_logprobs: must be an integer of at least -1, got {self.max_logprobs!r}")
        if (self.host_threads or 0) > MAX_HOST_THREADS:
            raise ConfigError(f"host_threads: at most {MAX_HOST_THREADS}, got {self.host_threads}")
        if self.max_lanes > MAX_LANES:
            raise ConfigError(f"max_lanes: at most {MAX_LANES}, got {self.max_lanes}")

    @property
    def max_device_rows(self) -> int:
        """`max_num_batched_tokens`, or what stands for None."""
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return DEVICE_ROWS_WITH_TARGETS if self.has_predicted_budget else DEVICE_ROWS

    @property
    def has_predicted_budget(self) -> bool:
        """Whether walks are bounded by predictions: there are targets, and the policy keeps to them."""
        can_predict = self.policy in PREDICTING and self.calibrate != "never"
        return can_predict and walk_bound_s(self.classes) is not None

    def _check_choice(self, name: str, choices: object) -> None:
        value = getattr(self, name)
        if value not in get_args(choices):
            raise ConfigError(f"{name}: {value!r} is none of {', '.join(get_args(choices))}")

    def _check_positive(self, name: str) -> None:
        value = getattr(self, name)
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name}: must be an integer of at least 1, got {value!r}")

    def _check_policy(self) -> None:
        if self.policy in REFUSED:
            raise ConfigError(f"policy: {self.policy!r} is not run by this engine: {REFUSED[self.policy]}")
        if self.policy not in RULES:
            raise ConfigError(f"policy: {self.policy!r} is none of {', '.join(RULES)}")
        if not RULES[self.policy].uses_host and self.host_offload != "never":
            raise ConfigError(
                f"policy: {self.policy!r} keeps everything on the device; set host_offload='never' with it"
            )


def check_classes(classes: object) -> None:
    """Raise ConfigError unless these are service classes that the policy can tell apart and rank."""
    if not isinstance(classes, tuple) or not classes or not all(isinstance(c, ServiceClass) for c in classes):
        raise ConfigError(f"classes: must be a tuple of at least one ServiceClass, got {classes!r}")
    names = [c.name for c in classes]
    if len(set(names)) < len(names):
        raise ConfigError(f"classes: each needs a name of its own, got {', '.join(names)}")
    best_effort = [c for c in classes if c.best_effort]
    for kind in best_effort:
        if kind.slo or kind.tightest or kind.loosest:
            raise ConfigError(f"classes: {kind.name!r} is best-effort and can have no targets; leave slo out")
    others = [c for c in classes if not c.best_effort]
    if max((c.rank for c in others), default=-1) >= min((c.rank for c in best_effort), default=1 << 62):
        raise ConfigError("classes: every best-effort class needs a higher rank than all others")
    for kind in others:
        if kind.slo is not None and not kind.slo.is_within(kind.tightest, kind.loosest):
            raise ConfigError(f"classes: slo of {kind.name!r} is outside its own clamp, tightest to loosest")
        if kind.tightest and kind.loosest and not kind.tightest.is_within(None, kind.loosest):
            raise ConfigError(f"classes: the clamp of {kind.name!r} is empty: tightest exceeds loosest")


@dataclass(frozen=True, slots=True)
class CpuSplit:
    """Threads of each side and the CPUs they are pinned to; empty: not pinned.

    Where the sides overlap, the host's threads have the lower priority. Under a CPU quota smaller than the
    affinity mask nothing is pinned: every container of the machine would choose the same CPUs. Nor is it with
    `pin_cpus=False`.
    """

    device_threads: int
    host_threads: int
    device_cpus: tuple[int, ...]
    host_cpus: tuple[int, ...]


def split_cpus(config: EngineConfig, budget: CpuBudget | None = None) -> CpuSplit:
    """Divide the usable CPUs between device and host, or let them share.

    Each side has its own CPUs, half of them where neither number is given. Where budgets are predicted both
    have all: the host runs in what the device leaves, below its priority, and what it takes from the device
    is part of the prediction. Two numbers that together exceed the CPUs share too, and so does one CPU.

    Raises ConfigError when a side is to have more threads than there are CPUs.
    """
    budget = available_cpus() if budget is None else budget
    device, host = _threads(config, budget.count)
    if budget.count < len(budget.cpus) or not config.pin_cpus:
        return CpuSplit(device, host, (), ())
    return CpuSplit(device, host, budget.cpus[:device], budget.cpus[budget.count - host :])


def _threads(config: EngineConfig, total: int) -> tuple[int, int]:
    """Threads of device and host on `total` CPUs."""
    device, host = config.device_threads, config.host_threads
    for name, wanted in (("device_threads", device), ("host_threads", host)):
        if wanted is not None and wanted > total:
            raise ConfigError(f"{name}: {wanted} asked for, {total} CPUs are available; lower it")
    if config.host_offload == "never":
        return device or total, 0
    if device is None and host is None and config.has_predicted_budget:
        return total, total
    if device is None:
        device = max(1, total // 2 if host is None else total - host)
    return device, host or max(1, total - device)
