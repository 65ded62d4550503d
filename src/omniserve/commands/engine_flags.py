"""EngineConfig's fields as flags: shared by all commands that start an engine."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, Field, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from omniserve.config import EngineConfig
from omniserve.errors import ConfigError
from omniserve.types import BEST_EFFORT, LATENCY_SENSITIVE, SLO

# Settings that one flag cannot hold.
NO_FLAG = ("classes",)


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per field of EngineConfig, named like it, and the targets of the default class."""
    group = parser.add_argument_group("engine settings")
    hints = get_type_hints(EngineConfig)
    for setting in fields(EngineConfig):
        if setting.name in NO_FLAG:
            continue
        flag = "--" + setting.name.replace("_", "-")
        group.add_argument(flag, default=argparse.SUPPRESS, **_flag_options(hints[setting.name], setting))
    for name, what in (("ttft", "first token"), ("tpot", "each later token")):
        help_text = f"target of latency-sensitive requests: seconds to the {what} (both or none)"
        group.add_argument(f"--slo-{name}-s", type=float, metavar="SECONDS", help=help_text)


def _flag_options(hint: Any, setting: Field[Any]) -> dict[str, Any]:
    """What argparse is told about a field of type T, T | None or Literal[...]."""
    kind = hint
    if get_origin(hint) is not Literal and get_args(hint):
        (kind,) = (k for k in get_args(hint) if k is not type(None))
    shown = "automatic" if setting.default in (None, MISSING) else setting.default
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind), "help": f"default: {shown}"}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction, "help": f"default: {shown}"}
    return {"type": kind, "metavar": kind.__name__.upper(), "help": f"default: {shown}"}


def engine_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What was given of them, by the names of EngineConfig; ConfigError for half a pair of targets."""
    settings = {f.name: getattr(options, f.name) for f in fields(EngineConfig) if hasattr(options, f.name)}
    ttft_s, tpot_s = options.slo_ttft_s, options.slo_tpot_s
    if (ttft_s is None) != (tpot_s is None):
        raise ConfigError("slo_ttft_s and slo_tpot_s: give both or none")
    if ttft_s is not None:
        settings["classes"] = (replace(LATENCY_SENSITIVE, slo=SLO(ttft_s, tpot_s)), BEST_EFFORT)
    return settings
