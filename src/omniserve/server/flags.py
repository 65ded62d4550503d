"""Settings from the command line, over OMNISERVE_* variables, over a YAML file of the flags' long names."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from omniserve.batch.limits import Quota
from omniserve.config import EngineConfig
from omniserve.errors import ConfigError
from omniserve.server.settings import ApiKey, ServerConfig
from omniserve.server.tiers import Clamp
from omniserve.types import BEST_EFFORT, LATENCY_SENSITIVE, SLO

logger = logging.getLogger("omniserve.server")

ENV_PREFIX = "OMNISERVE_"
LOG_LEVELS = ("debug", "info", "warning", "error")
_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting. name: the flag's without dashes before it; kind: of its value (of each one in a list).

    is_secret: its value is not shown. Each of its flags has one value, for the next word may be the model.
    """

    name: str
    kind: type[str] | type[int] | type[float] | type[bool]
    help: str = ""
    choices: tuple[Any, ...] = ()
    is_list: bool = False
    is_secret: bool = False

    @property
    def dest(self) -> str:
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.dest.upper()

    def read(self, value: object, where: str) -> Any:
        """A value from a variable or the file; ConfigError naming where it is wrong."""
        if self.is_list:
            values = value if isinstance(value, list) else [value]
            return tuple(self._one(v, where) for v in values)
        return self._one(value, where)

    def _one(self, value: object, where: str) -> Any:
        found: object = None
        if self.is_secret and not (isinstance(value, str) and value):
            raise ConfigError(f"{where}: must be text that is not empty; quote what looks like a number")
        if isinstance(value, str):
            found = self._parsed(value)
        elif type(value) is self.kind or (self.kind is float and type(value) is int):
            found = float(value) if self.kind is float else value
        if found is None or (self.choices and found not in self.choices):
            must = (
                f"one of {', '.join(map(str, self.choices))}"
                if self.choices
                else f"of type {self.kind.__name__}"
            )
            raise ConfigError(f"{where}: must be {must}, got {value!r}")
        return found

    def _parsed(self, text: str) -> object:
        if self.kind is bool:
            return True if text.lower() in _YES else False if text.lower() in _NO else None
        try:
            return self.kind(text)
        except ValueError:
            return None


_SERVER = (
    Setting("host", str, "address to listen on; default: 127.0.0.1"),
    Setting("port", int, "default: 8000; 0: any free one"),
    Setting("served-model-name", str, "names that clients may use, the first one in answers", is_list=True),
    Setting("api-key", str, "key that clients must send; may be given several times", (), True, True),
    Setting("admin-key", str, "key of /admin and /dashboard", is_secret=True),
    Setting("state-dir", str, "where files and batches are kept; none: no batches"),
    Setting("queue-timeout", float, "seconds a chat may wait for its first token; default: 0, no limit"),
    Setting("best-effort-queue-timeout", float, "the same of best-effort requests; default: 600"),
    Setting("max-requests", int, "latency-sensitive requests at once; default: 1024"),
    Setting("max-best-effort-requests", int, "best-effort requests at once, batches aside; default: 256"),
    Setting("batch-concurrency", int, "lines of batches in flight; default: 64"),
    Setting("retention", int, "seconds that files and ended batches are kept; default: 30 days"),
    Setting("disk-reserve", int, "bytes of the state directory's disk kept for results; default: 256 MiB"),
    Setting("max-body-bytes", int, "of a request, uploads aside; default: 16 MiB"),
    Setting("grace", float, "seconds that chats may take to end after SIGTERM; default: 30"),
    Setting("engine-hang-timeout", float, "seconds of silence of an engine that is killed; default: 60"),
)
_TARGETS = tuple(
    Setting(f"slo-{bound}{which}-s", float, f"{what} {unit} that a request may ask for by header")
    for bound, what in (("tightest-", "least"), ("loosest-", "greatest"))
    for which, unit in (("ttft", "seconds to the first token"), ("tpot", "seconds to each later token"))
)
_OWN = (*_SERVER, *_TARGETS, Setting("log-level", str, "default: info", LOG_LEVELS))
_SLO = tuple(Setting(f"slo-{which}-s", float) for which in ("ttft", "tpot"))
# Of the file alone: keys with owners and clamps.
API_KEYS = "api-keys"
# Fields of ServerConfig whose flags have no unit in their names.
_UNITS = {
    "queue_timeout": "queue_timeout_s",
    "best_effort_queue_timeout": "best_effort_queue_timeout_s",
    "retention": "retention_s",
    "disk_reserve": "disk_reserve_bytes",
    "grace": "grace_s",
    "engine_hang_timeout": "engine_hang_timeout_s",
}


@dataclass(frozen=True, slots=True)
class Settings:
    server: ServerConfig
    engine: EngineConfig
    log_level: str


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The server's own flags; those of the engine are EngineConfig's."""
    parser.add_argument("model_argument", nargs="?", metavar="MODEL", help="default: smollm2-135m")
    parser.add_argument("--config", metavar="FILE", help="YAML: the flags' long names, without dashes before")
    group = parser.add_argument_group("server settings")
    for setting in _OWN:
        options: dict[str, Any] = {"choices": setting.choices} if setting.choices else {"metavar": "VALUE"}
        if setting.is_list:
            options |= {"action": "append"} if setting.is_secret else {"nargs": "+", "action": "extend"}
        flag = "--" + setting.name
        group.add_argument(flag, type=setting.kind, help=setting.help, default=argparse.SUPPRESS, **options)


def read_settings(options: argparse.Namespace, variables: Mapping[str, str] | None = None) -> Settings:
    """All settings, from all places; ConfigError names the first that is wrong, and where it is."""
    known = {setting.dest: setting for setting in all_settings()}
    file = _read_file(options.config) if options.config else {}
    keys = file.pop(API_KEYS.replace("-", "_"), None) or []
    if not isinstance(keys, list):
        raise ConfigError(f"{options.config}: {API_KEYS}: must be a list of entries")
    values: dict[str, Any] = {}
    for name, value in file.items():
        if name not in known:
            raise ConfigError(f"{options.config}: unknown setting {name.replace('_', '-')!r}")
        values[name] = known[name].read(value, f"{options.config}: {known[name].name}")
    values |= _from_variables(known, os.environ if variables is None else variables)
    given = {name: value for name, value in vars(options).items() if name in known and value is not None}
    values |= {name: tuple(v) if known[name].is_list else v for name, v in given.items()}
    if options.model_argument is not None:
        values["model"] = options.model_argument
    return _settings(values, tuple(_api_key(entry) for entry in keys))


def all_settings() -> list[Setting]:
    """Of the server, and one for each field of EngineConfig that a single value can hold."""
    hints = get_type_hints(EngineConfig)
    engine = [_of_engine(f.name, hints[f.name]) for f in fields(EngineConfig) if f.name != "classes"]
    return [*_OWN, *_SLO, *engine]


def _of_engine(name: str, hint: Any) -> Setting:
    """Of a field of type T, T | None or Literal[...]."""
    flag = name.replace("_", "-")
    if get_origin(hint) is Literal:
        return Setting(flag, str, choices=get_args(hint))
    (kind,) = [k for k in get_args(hint) if k is not type(None)] or [hint]
    return Setting(flag, kind)


def _read_file(path: str) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"config: {path} cannot be read: {error}") from error
    if not isinstance(found, dict | None):
        raise ConfigError(f"config: {path} must map names of settings to values")
    return {str(name).replace("-", "_"): value for name, value in (found or {}).items()}


def _from_variables(known: Mapping[str, Setting], variables: Mapping[str, str]) -> dict[str, Any]:
    values = {}
    for dest, setting in known.items():
        text = variables.get(setting.variable)
        if text is None:
            continue
        if dest == "port" and text.startswith("tcp://"):
            continue  # Kubernetes sets this for a service that is called omniserve
        found = text.split() if setting.is_list else text
        if setting.is_secret and not found:
            # A secret that was forgotten must not open the server.
            raise ConfigError(f"{setting.variable}: is empty; give a key, or leave the variable out")
        values[dest] = setting.read(found, setting.variable)
    return values


def _api_key(entry: object) -> ApiKey:
    """An entry of `api-keys`: key; owner, tiers, bounds of targets and priority, and quota if wanted."""
    names = {"key", "owner", "tiers", "tightest-slo", "loosest-slo", "lowest-priority", "quota"}
    if not isinstance(entry, dict) or "key" not in entry or set(entry) - names:
        raise ConfigError(
            f"{API_KEYS}: each entry has a key, and of {', '.join(sorted(names))} what it needs"
        )
    tightest, loosest = (_bounds(name, entry.get(name)) for name in ("tightest-slo", "loosest-slo"))
    priority = entry.get("lowest-priority")
    if priority is not None and type(priority) is not int:
        raise ConfigError(f"{API_KEYS}: lowest-priority must be an integer, got {priority!r}")
    tiers = entry.get("tiers")
    if tiers is not None and not isinstance(tiers, list):
        raise ConfigError(f"{API_KEYS}: tiers must be a list, got {tiers!r}")
    return ApiKey(
        entry["key"],
        entry.get("owner"),
        None if tiers is None else tuple(tiers),
        Clamp(*tightest, *loosest, priority),
        None if entry.get("quota") is None else _quota(entry["quota"]),
    )


def _quota(entry: object) -> Quota:
    names = {f.name.replace("_", "-"): f.name for f in fields(Quota)}
    if not isinstance(entry, dict) or set(entry) - set(names):
        raise ConfigError(f"{API_KEYS}: quota maps some of {', '.join(names)} to integers")
    return Quota(**{names[name]: value for name, value in entry.items()})


def _bounds(name: str, entry: object) -> tuple[float | None, float | None]:
    if entry is None:
        return None, None
    if not isinstance(entry, dict) or set(entry) - {"ttft-s", "tpot-s"}:
        raise ConfigError(f"{API_KEYS}: {name} maps ttft-s and tpot-s to seconds")
    slo = SLO(entry.get("ttft-s", 1.0), entry.get("tpot-s", 1.0))  # which checks what is there
    return (slo.ttft_s if "ttft-s" in entry else None), (slo.tpot_s if "tpot-s" in entry else None)


def _settings(values: dict[str, Any], keys: tuple[ApiKey, ...]) -> Settings:
    of_engine = {f.name: values[f.name] for f in fields(EngineConfig) if f.name in values}
    of_server = {_UNITS.get(s.dest, s.dest): values[s.dest] for s in _SERVER if s.dest in values}
    of_server["api_keys"] = (*(ApiKey(key) for key in of_server.pop("api_key", ())), *keys)
    if "state_dir" in of_server:
        of_server["state_dir"] = Path(of_server["state_dir"])
    classes = _classes(values.get)
    if classes is not None:
        of_engine["classes"] = classes
    return Settings(ServerConfig(**of_server), EngineConfig(**of_engine), values.get("log_level", "info"))


def _classes(value: Callable[[str], Any]) -> Any:
    """The two classes, with targets; None: without."""
    slo = _pair(value, "")
    tightest, loosest = _pair(value, "tightest_"), _pair(value, "loosest_")
    if slo is None:
        if tightest or loosest:
            raise ConfigError("slo-tightest, slo-loosest: only with slo-ttft-s and slo-tpot-s")
        return None
    return replace(LATENCY_SENSITIVE, slo=slo, tightest=tightest, loosest=loosest), BEST_EFFORT


def _pair(value: Callable[[str], Any], bound: str) -> SLO | None:
    ttft_s, tpot_s = value(f"slo_{bound}ttft_s"), value(f"slo_{bound}tpot_s")
    if (ttft_s is None) != (tpot_s is None):
        shown = bound.replace("_", "-")
        raise ConfigError(f"slo-{shown}ttft-s and slo-{shown}tpot-s: give both or none")
    return None if ttft_s is None else SLO(ttft_s, tpot_s)
