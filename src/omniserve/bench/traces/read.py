"""Readers of published request traces. One function for all; the file itself says which format it has."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from omniserve.bench.workloads import Arrival
from omniserve.errors import ConfigError

# By name, so that a command line needs no path. README.md beside them has source and licence.
SHIPPED = {name: Path(__file__).parent / f"{name}.csv.gz" for name in ("splitwise_conv", "splitwise_code")}


@dataclass(frozen=True, slots=True)
class Format:
    """Columns of one publisher: arrival time (as seconds), prompt tokens, output tokens."""

    name: str
    time: str
    prompt: str
    output: str
    seconds: Callable[[Any], float]


def _datetime_s(text: str) -> float:
    """Seconds of a date and time, UTC where it says nothing; as exact as microseconds."""
    when = datetime.fromisoformat(text)
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def _milliseconds_s(value: Any) -> float:
    return float(value) / 1e3


CSV_FORMATS = (
    Format("Splitwise (vidur)", "arrived_at", "num_prefill_tokens", "num_decode_tokens", float),
    Format("Azure LLM inference", "TIMESTAMP", "ContextTokens", "GeneratedTokens", _datetime_s),
    Format("BurstGPT", "Timestamp", "Request tokens", "Response tokens", float),
)
MOONCAKE = Format("Mooncake", "timestamp", "input_length", "output_length", _milliseconds_s)


def read_trace(source: str | Path) -> list[Arrival]:
    """The requests of a trace in order of arrival, times counted from the first one.

    source: a name in SHIPPED or a file: Splitwise or Azure CSV, BurstGPT CSV, Mooncake JSON lines; ".gz" too.
    Requests without a prompt or without output (failed ones) are left out. ConfigError names file, line and
    field of what can not be read.
    """
    path = SHIPPED.get(str(source), Path(source))
    try:
        with _open(path) as file:
            rows = list(_rows(path, file))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        known = ", ".join(SHIPPED)
        raise ConfigError(f"trace {path}: can not be read ({error}); known by name: {known}") from None
    arrivals = sorted((a for a in rows if a.num_prompt and a.num_output), key=lambda a: a.at_s)
    if not arrivals:
        raise ConfigError(f"trace {path}: holds no request with a prompt and an output")
    began_s = arrivals[0].at_s
    return [replace(a, at_s=a.at_s - began_s) for a in arrivals]


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _rows(path: Path, file: IO[str]) -> Iterator[Arrival]:
    first = file.readline()
    file.seek(0)
    if first.lstrip().startswith("{"):
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _arrival(f"trace {path}, line {number}", _object(path, number, line), MOONCAKE)
        return
    reader = csv.DictReader(file)
    kind = _csv_format(path, reader.fieldnames or ())
    for row in reader:
        yield _arrival(f"trace {path}, line {reader.line_num}", row, kind)


def _csv_format(path: Path, columns: object) -> Format:
    names = set(columns) if isinstance(columns, (list, tuple)) else set()
    for kind in CSV_FORMATS:
        if {kind.time, kind.prompt, kind.output} <= names:
            return kind
    wanted = "; ".join(f"{k.name}: {k.time}, {k.prompt}, {k.output}" for k in CSV_FORMATS)
    raise ConfigError(
        f"trace {path}, line 1: columns of no known format; wanted {wanted}; "
        f"or JSON lines with {MOONCAKE.time}, {MOONCAKE.prompt}, {MOONCAKE.output} (Mooncake)"
    )


def _object(path: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"trace {path}, line {number}: no JSON object ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"trace {path}, line {number}: no JSON object, got {line.strip()[:40]!r}")
    return value


def _arrival(where: str, row: Mapping[str, Any], kind: Format) -> Arrival:
    return Arrival(
        _value(where, row, kind.time, kind.seconds),
        int(_value(where, row, kind.prompt, _count)),
        int(_value(where, row, kind.output, _count)),
    )


def _count(value: Any) -> int:
    number = float(value)
    if number < 0 or number != int(number):
        raise ValueError
    return int(number)


def _value(where: str, row: Mapping[str, Any], field: str, convert: Callable[[Any], float]) -> float:
    value = row.get(field)
    must = "a whole number of at least 0" if convert is _count else "a time"
    try:
        number = convert(value)
        if type(value) is bool or not math.isfinite(number):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{where}, {field}: must be {must}, got {value!r}") from None
    return number
