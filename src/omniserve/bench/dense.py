"""Dense work of one walk by number of rows and type of weights: `python -m omniserve.bench.dense`.

All of the model but attention, on one thread, real weights: every matrix comes from memory, as in serving.
The sides take turns; what is compared is CPU time round by round, which other work disturbs least. The limit
at one row is reading the weights once: as many bytes are read by plain loads in each round.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import omniserve._native as _native
from omniserve.bench.host_memory import Arena
from omniserve.bench.measure import Rounds, Spread, machine, seconds_of, write_json
from omniserve.config import Quantization
from omniserve.model.decoder import Decoder
from omniserve.model.loading import load_decoder
from omniserve.model.sources import ensure_model

MODEL = "smollm2-135m"
ROWS = (1, 2, 4, 8, 16, 32, 64, 256)
READING = "reading float32 weights once"


@dataclass(frozen=True, slots=True)
class Side:
    """Weights and rows as `name` says."""

    name: str
    dtype: torch.dtype
    quantization: Quantization


SIDES = (
    Side("float32", torch.float32, "none"),
    Side("bfloat16 weights", torch.float32, "bfloat16"),
    Side("bfloat16 weights and rows", torch.bfloat16, "none"),
    Side("int8 weights", torch.float32, "int8"),
    Side("int4 weights", torch.float32, "int4"),
)


def dense_walk_s(decoder: Decoder, num_rows: int) -> float:
    """CPU seconds of all layers and logits for `num_rows` rows; queries stand in for attention's results."""
    ids = torch.arange(num_rows) * 97 % decoder.config.vocab_size
    positions = torch.arange(num_rows)
    began = time.process_time()
    x = decoder.embed(ids)
    for layer in range(decoder.num_layers):
        q, _, _ = decoder.pre_attention(layer, x, positions)
        x = decoder.post_attention(layer, q, x)
    decoder.logits(x)
    return time.process_time() - began


def reading_s(memory: Arena) -> float:
    return seconds_of(lambda: _native.stream_read_gbps(memory.address, memory.num_bytes), time.process_time)


@torch.inference_mode()
def measure(repeats: int) -> dict[int, Rounds]:
    """By number of rows, seconds of each side and of the reading."""
    path = ensure_model(MODEL)
    decoders = {side.name: load_decoder(path, side.dtype, quantization=side.quantization) for side in SIDES}
    plain = decoders[SIDES[0].name]
    embedding_bytes = (
        plain.config.vocab_size * plain.config.hidden_size * 4
    )  # its rows are looked up, not read
    memory = Arena(plain.weight_bytes - embedding_bytes)
    memory.bytes.fill_(1)
    result = {num_rows: Rounds() for num_rows in ROWS}
    for repeat in range(repeats + 1):
        for num_rows, rounds in result.items():
            seconds = {READING: reading_s(memory)}
            seconds |= {name: dense_walk_s(decoder, num_rows) for name, decoder in decoders.items()}
            for name, value in seconds.items():
                if repeat:  # the first round warms up
                    rounds.add(name, value)
    return result


def report(console: Console, measured: dict[int, Rounds]) -> dict[str, Any]:
    """Prints milliseconds and how many times those of one row they are; returns seconds."""
    names = [side.name for side in SIDES]
    table = Table(
        "rows", READING, *names, title="one thread: ms, and median of the rounds' times those of one row"
    )
    found: dict[str, Any] = {}
    for num_rows, rounds in measured.items():
        spreads = rounds.spreads()
        over_one = {name: _over_one_row(measured, num_rows, name) for name in names}
        shown = [f"{spreads[name].median * 1e3:.1f} ({over_one[name].median:.2f}x)" for name in names]
        table.add_row(str(num_rows), f"{spreads[READING].median * 1e3:.1f}", *shown)
        found[str(num_rows)] = {
            "seconds": rounds.as_dicts(),
            "over_one_row": {name: spread.as_dict() for name, spread in over_one.items()},
            "over_float32": {name: rounds.ratio(name, names[0]).as_dict() for name in names[1:]},
        }
    reading = measured[ROWS[0]].ratio(names[0], READING)
    found["one_float32_row_over_reading"] = reading.as_dict()
    console.print(table)
    console.print(f"one row in float32 over {READING}: {reading}")
    return found


def _over_one_row(measured: dict[int, Rounds], num_rows: int, name: str) -> Spread:
    pairs = zip(measured[num_rows].samples[name], measured[ROWS[0]].samples[name], strict=True)
    return Spread([rows / one for rows, one in pairs])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="omniserve.bench.dense", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/dense.json"))
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = Console()
    found = {"machine": machine(), "simd": _native.simd(), "repeats": options.repeats}
    found["rows"] = report(console, measure(options.repeats))
    write_json(options.out, found)
    console.print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
