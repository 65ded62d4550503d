"""Settings of the server beside those of its engine."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from omniserve.batch.limits import Limits, Quota, check_retention
from omniserve.config import is_number
from omniserve.errors import ConfigError
from omniserve.server.tiers import TIERS, Clamp

MIB = 1024**2
_LIMITS = Limits()
LONGEST_TIMEOUT_S = 30 * 86400.0


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key: whose files and batches it sees, which tiers it may use, and bounds of its own targets.

    owner: keys of one owner see the same files and batches; None: the key is an owner of its own.
    tiers: None: all of them. quota: of its owner; None: that of everybody.
    """

    key: str = field(repr=False)
    owner: str | None = None
    tiers: tuple[str, ...] | None = None
    clamp: Clamp = field(default_factory=Clamp)
    quota: Quota | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.key, str) or not self.key or not self.key.isascii():
            must = "must be ASCII text that is not empty; quote what looks like a number"
            raise ConfigError(f"api_key: each key {must}")
        if self.owner is not None and not (isinstance(self.owner, str) and self.owner):
            raise ConfigError(f"api_keys: owner must be text that is not empty, got {self.owner!r}")
        for tier in self.tiers or ():
            if tier not in TIERS:
                raise ConfigError(f"api_keys: tier {tier!r} is none of {', '.join(TIERS)}")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Everything the server needs to know besides its engine.

    host, port         where it listens; port 0: any free one, which the log tells.
    served_model_name  names clients may use; none: the model's own.
    api_keys           keys of clients; none: everybody who can connect is served.
    admin_key          key of /admin; None: /admin is open on a loopback address of a server without API
                       keys, and not there on others.
    state_dir          where files and batches are kept; None: there are none.
    queue_timeout_s, best_effort_queue_timeout_s
                       seconds that a latency-sensitive (best-effort) request may wait for its first token;
                       None or 0: for ever.
    max_requests, max_best_effort_requests
                       latency-sensitive (best-effort) requests in the server at once; more are refused with
                       429. Lines of batches do not count: their number has a bound of its own.
    batch_concurrency  lines of batches in flight.
    retention_s        how long files and ended batches are kept when neither their owner nor its quota says
                       otherwise.
    disk_reserve_bytes free space of the disk of `state_dir` below which nothing new is stored.
    max_body_bytes     of a request, uploads of files excepted.
    grace_s            seconds that chats may take to end after SIGTERM.
    engine_hang_timeout_s
                       an engine that gives no sign of life for so many seconds is killed and started again;
                       0: never. At least 5, for an idle engine gives a sign only every two seconds.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: tuple[str, ...] = ()
    api_keys: tuple[ApiKey, ...] = ()
    admin_key: str | None = field(default=None, repr=False)
    state_dir: Path | None = None
    queue_timeout_s: float | None = None
    best_effort_queue_timeout_s: float | None = 600.0
    max_requests: int = 1024
    max_best_effort_requests: int = 256
    batch_concurrency: int = 64
    retention_s: int = _LIMITS.retention_s
    disk_reserve_bytes: int = _LIMITS.reserve_bytes
    max_body_bytes: int = 16 * MIB
    grace_s: float = 30.0
    engine_hang_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if type(self.port) is not int or not 0 <= self.port < 65536:
            raise ConfigError(f"port: must be an integer in [0, 65535], got {self.port!r}")
        for name in ("max_requests", "max_best_effort_requests", "batch_concurrency", "max_body_bytes"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name}: must be an integer of at least 1, got {value!r}")
        check_retention("retention_s", self.retention_s)
        if type(self.disk_reserve_bytes) is not int or self.disk_reserve_bytes < 0:
            must = "must be an integer of at least 0"
            raise ConfigError(f"disk_reserve_bytes: {must}, got {self.disk_reserve_bytes!r}")
        for name in ("queue_timeout_s", "best_effort_queue_timeout_s"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and 0 <= value <= LONGEST_TIMEOUT_S):
                must = f"must be 0 (no limit) or a number of seconds up to {LONGEST_TIMEOUT_S:g}"
                raise ConfigError(f"{name}: {must}, got {value!r}")
        if not is_number(self.grace_s) or not 0 <= self.grace_s < 86400:
            raise ConfigError(f"grace_s: must be a number of seconds in [0, 86400), got {self.grace_s!r}")
        hang_s = self.engine_hang_timeout_s
        if not is_number(hang_s) or not (hang_s == 0 or 5 <= hang_s < 86400):
            must = "must be 0 (never) or a number of seconds in [5, 86400)"
            raise ConfigError(f"engine_hang_timeout_s: {must}, got {hang_s!r}")
        if self.admin_key is not None and not (self.admin_key and self.admin_key.isascii()):
            raise ConfigError("admin_key: must be ASCII text that is not empty")
        keys = [key.key for key in self.api_keys]
        if len(set(keys)) < len(keys) or self.admin_key in keys:
            raise ConfigError("api_keys, admin_key: each key may be given once")
        for owner in {key.owner for key in self.api_keys} - {None}:
            quotas = {key.quota for key in self.api_keys if key.owner == owner} - {None}
            if len(quotas) > 1:
                way_out = "give the quota with one of them"
                raise ConfigError(f"api_keys: keys of owner {owner!r} have different quotas; {way_out}")
        for name in self.served_model_name:
            if not isinstance(name, str) or not name:
                raise ConfigError("served_model_name: each must be text that is not empty")

    @property
    def is_loopback(self) -> bool:
        """Whether only processes of this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
