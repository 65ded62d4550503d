"""How much a file, a batch and an owner may hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from omniserve.errors import ConfigError, RequestError

HOUR_S = 3600
DAY_S = 24 * HOUR_S
SHORTEST_WINDOW_S, LONGEST_WINDOW_S = HOUR_S, 14 * DAY_S
SHORTEST_LIFE_S, LONGEST_LIFE_S = HOUR_S, 30 * DAY_S
# How long what nobody said otherwise of may be kept.
SHORTEST_RETENTION_S, LONGEST_RETENTION_S = HOUR_S, 100 * 365 * DAY_S
MAX_METADATA_PAIRS, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512
MAX_FILENAME = 255
ENDPOINTS = ("/v1/chat/completions", "/v1/completions")


@dataclass(frozen=True, slots=True)
class Limits:
    """Of every file and batch. Bytes and seconds.

    reserve_bytes: free space of the disk below which nothing new is stored and no line is started, so that
    results of lines under way still have room. retention_s: how long files and ended batches are kept when
    nobody says otherwise.
    """

    max_lines: int = 50_000
    max_file_bytes: int = 200 * 1024**2
    max_line_bytes: int = 16 * 1024**2
    max_errors: int = 100
    reserve_bytes: int = 256 * 1024**2
    retention_s: int = 30 * DAY_S


@dataclass(frozen=True, slots=True)
class Quota:
    """Of one owner: bytes and number of all its files, results included; batches that have not ended, and
    lines of them that have no result yet.

    retention_s: how long its files and ended batches are kept when it does not say otherwise; None: as
    everybody's.
    """

    max_bytes: int = 20 * 1024**3
    max_files: int = 10_000
    max_open_batches: int = 100
    max_open_lines: int = 5_000_000
    retention_s: int | None = None

    def __post_init__(self) -> None:
        for name in (one.name for one in fields(self) if one.name != "retention_s"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ConfigError(f"quota: {name} must be an integer of at least 0, got {value!r}")
        if self.retention_s is not None:
            check_retention("quota: retention_s", self.retention_s)


def check_retention(name: str, seconds: object) -> None:
    """ConfigError unless it is a whole number of seconds from an hour to a hundred years."""
    if type(seconds) is not int or not SHORTEST_RETENTION_S <= seconds <= LONGEST_RETENTION_S:
        must = f"must be whole seconds from {SHORTEST_RETENTION_S} to {LONGEST_RETENTION_S}"
        raise ConfigError(f"{name}: {must}, got {seconds!r}")


def window_seconds(text: object) -> int:
    """Seconds of a completion window: `24h`, or any whole hours or days from 1h to 14d."""
    match = re.fullmatch(r"([1-9][0-9]{0,3})([hd])", text) if isinstance(text, str) else None
    seconds = int(match[1]) * (HOUR_S if match[2] == "h" else DAY_S) if match else 0
    if not SHORTEST_WINDOW_S <= seconds <= LONGEST_WINDOW_S:
        raise RequestError(
            "completion_window", f"must be whole hours or days from 1h to 14d, such as 24h; got {text!r}"
        )
    return seconds


def check_metadata(metadata: object) -> dict[str, str] | None:
    """At most 16 pairs of text: keys of 64, values of 512 characters."""
    if metadata is None:
        return None
    if not isinstance(metadata, Mapping):
        raise RequestError("metadata", "must be an object whose values are text")
    if len(metadata) > MAX_METADATA_PAIRS:
        raise RequestError("metadata", f"holds {len(metadata)} pairs; at most {MAX_METADATA_PAIRS}")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise RequestError("metadata", f"keys and values must be text; that of {key!r} is not")
        if len(key) > MAX_METADATA_KEY:
            raise RequestError(
                "metadata", f"keys have at most {MAX_METADATA_KEY} characters; one has {len(key)}"
            )
        if len(value) > MAX_METADATA_VALUE:
            raise RequestError(
                "metadata", f"values have at most {MAX_METADATA_VALUE} characters; {key!r} has {len(value)}"
            )
    return dict(metadata)


def life_seconds(field: str, anchor: object, seconds: object) -> int:
    """How long a file lives, from `expires_after` and its like: from its creation, 1 hour to 30 days."""
    if anchor != "created_at":
        raise RequestError(f"{field}.anchor", f"must be 'created_at', got {anchor!r}")
    if type(seconds) is not int or not SHORTEST_LIFE_S <= seconds <= LONGEST_LIFE_S:
        raise RequestError(
            f"{field}.seconds",
            f"must be a whole number from {SHORTEST_LIFE_S} to {LONGEST_LIFE_S}, got {seconds!r}",
        )
    return seconds
