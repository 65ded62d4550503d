"""Who competes: policies with their threads and tunables, and how each is told to the engine."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from omniserve.config import (
    DEVICE_ROWS,
    DEVICE_ROWS_WITH_TARGETS,
    CpuSplit,
    EngineConfig,
    HostOffload,
    split_cpus,
)
from omniserve.errors import ConfigError
from omniserve.types import BEST_EFFORT, LATENCY_SENSITIVE, SLO

OURS, REFERENCE = "omniserve", "ls_only"
BASELINES = ("paper", "sarathi", "vllm_priority", "llumnix")
POLICIES = (OURS, REFERENCE, *BASELINES)
# Those that budget against the targets: they run once for each; the others run once and are judged by all.
SLO_AWARE = frozenset({OURS, "paper"})
# Those that decode batch work with host attention: they need the host's cores. The others may take them.
WITH_HOST = frozenset({OURS, "paper"})
# What an operator would tune, by what the baselines' own docstrings name. The best of short runs is used.
# Token budgets up to the rows that a walk of ours may have.
_TOKENS = {"max_num_batched_tokens": (DEVICE_ROWS, 2 * DEVICE_ROWS, DEVICE_ROWS_WITH_TARGETS)}
TUNABLES: dict[str, dict[str, tuple[Any, ...]]] = {
    "sarathi": _TOKENS,
    "vllm_priority": {**_TOKENS, "max_num_seqs": (16, 64)},
    "llumnix": {**_TOKENS, "watermark": (0.1, 0.3)},
}
# Not tunable: the paper lets a result enter in the next iteration.
FIXED: dict[str, tuple[tuple[str, Any], ...]] = {"paper": (("reentry", "next_iteration"),)}


@dataclass(frozen=True, slots=True)
class Variant:
    """A policy as it runs. host_threads: where it uses the host. extra: further engine settings, each
    (name, value)."""

    policy: str
    device_threads: int
    host_offload: HostOffload
    extra: tuple[tuple[str, Any], ...] = ()
    admits_all: bool = False
    host_threads: int | None = None

    @property
    def name(self) -> str:
        """Tells it from the others of one table."""
        offload = "" if self.host_offload == "auto" else f", offload {self.host_offload}"
        admission = ", no admission" if self.admits_all else ""
        threads = f"{self.device_threads} thread{'s' * (self.device_threads > 1)}"
        shown = self.policy + (offload if self.policy in WITH_HOST else "") + admission
        return f"{shown}, {threads}"

    @property
    def is_baseline(self) -> bool:
        return self.policy in BASELINES

    def tuned(self, values: Sequence[tuple[str, Any]]) -> Variant:
        """The same with these settings in place of those of the same name."""
        names = {name for name, _ in values}
        return replace(self, extra=(*(e for e in self.extra if e[0] not in names), *values))


def engine_settings(variant: Variant, device_memory_bytes: int | None, slo: SLO | None) -> dict[str, Any]:
    """Settings of the engine for one run; the targets are told only to policies that heed them."""
    settings = {
        "policy": variant.policy,
        "host_offload": variant.host_offload,
        "device_threads": variant.device_threads,
        "host_threads": None if variant.host_offload == "never" else variant.host_threads,
        "device_memory_bytes": device_memory_bytes,
        "admission": "on" if variant.policy in SLO_AWARE and slo and not variant.admits_all else "off",
        **dict(variant.extra),
    }
    if slo is not None and variant.policy in SLO_AWARE:
        settings["classes"] = (replace(LATENCY_SENSITIVE, slo=slo), BEST_EFFORT)
    return settings


def check_policies(policies: Collection[str]) -> list[str]:
    """These policies, ours and the reference, in the order of POLICIES; ConfigError for any other name."""
    unknown = sorted(set(policies) - set(POLICIES))
    if unknown:
        raise ConfigError(f"policies: unknown {', '.join(unknown)}; known policies: {', '.join(POLICIES)}")
    return [p for p in POLICIES if p in {*policies, OURS, REFERENCE}]


def split_with_targets(model: str) -> CpuSplit:
    """Threads that an engine which is told targets takes where it is told no numbers."""
    some = replace(LATENCY_SENSITIVE, slo=SLO(1.0, 1.0))
    return split_cpus(EngineConfig(model=model, classes=(some, BEST_EFFORT)))


def variants(policies: Sequence[str], split: CpuSplit, all_threads: int) -> list[Variant]:
    """What competes: baselines without host attention run with our device threads and with all cores."""
    result = []
    for policy in policies:
        offload: HostOffload = "auto" if policy in WITH_HOST else "never"
        host_threads = split.host_threads if policy in WITH_HOST else None
        extra = (*FIXED.get(policy, ()), *untuned(policy))
        first = Variant(policy, split.device_threads, offload, extra, host_threads=host_threads)
        result.append(first)
        if policy not in WITH_HOST and policy != REFERENCE and all_threads != split.device_threads:
            result.append(replace(first, device_threads=all_threads))
    return result


def untuned(policy: str) -> tuple[tuple[str, Any], ...]:
    """Its tunables as the engine has them where nobody sets them, said aloud: (name, value)."""
    config = EngineConfig()
    defaults = {name: getattr(config, name) for name in TUNABLES.get(policy, {})}
    if "max_num_batched_tokens" in defaults:
        defaults["max_num_batched_tokens"] = DEVICE_ROWS
    return tuple(defaults.items())


def device_rows(settings: dict[str, Any]) -> int:
    """Most device rows of one walk under these settings of the engine, also where they leave it to choose."""
    return EngineConfig(**settings).max_device_rows


def tunings(variant: Variant) -> list[Variant]:
    """The variant with each combination of its tunables; itself alone when it has none."""
    tunables = TUNABLES.get(variant.policy, {})
    return [
        variant.tuned(tuple(zip(tunables, values, strict=True))) for values in product(*tunables.values())
    ]
