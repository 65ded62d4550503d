"""OmniServe: chat and batch on one accelerator, the chat's latency targets held.

Importing this package is quick and imports no torch; the names below load their module on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omniserve.engine.async_llm import AsyncLLM
    from omniserve.engine.llm import LLM
    from omniserve.errors import (
        ConfigError,
        EngineDeadError,
        ModelError,
        OmniServeError,
        RequestError,
        SloUnattainableError,
    )
    from omniserve.types import (
        SLO,
        CompletionOutput,
        Logprob,
        RequestMetrics,
        RequestOutput,
        SamplingParams,
        ServiceClass,
    )

__version__ = "0.1.0"

_HOMES = {
    "LLM": "omniserve.engine.llm",
    "AsyncLLM": "omniserve.engine.async_llm",
    "SamplingParams": "omniserve.types",
    "RequestOutput": "omniserve.types",
    "CompletionOutput": "omniserve.types",
    "Logprob": "omniserve.types",
    "RequestMetrics": "omniserve.types",
    "SLO": "omniserve.types",
    "ServiceClass": "omniserve.types",
    "SloUnattainableError": "omniserve.errors",
    "OmniServeError": "omniserve.errors",
    "ConfigError": "omniserve.errors",
    "ModelError": "omniserve.errors",
    "RequestError": "omniserve.errors",
    "EngineDeadError": "omniserve.errors",
}

__all__ = [
    "LLM",
    "SLO",
    "AsyncLLM",
    "CompletionOutput",
    "ConfigError",
    "EngineDeadError",
    "Logprob",
    "ModelError",
    "OmniServeError",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "ServiceClass",
    "SloUnattainableError",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'omniserve' has no attribute {name!r}")
    return getattr(import_module(home), name)
