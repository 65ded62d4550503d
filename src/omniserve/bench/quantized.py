"""Dense work of one walk with rounded weights, beside unrounded ones: `python -m omniserve.bench.quantized`.

All of the model but attention, on one thread, real weights: every matrix comes from memory, as in serving.
The sides take turns; what is compared is CPU time round by round, which other work disturbs least.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table

from omniserve.bench.measure import Rounds, machine
from omniserve.config import Quantization
from omniserve.model.decoder import Decoder
from omniserve.model.loading import load_decoder
from omniserve.model.sources import ensure_model

MODEL = "smollm2-135m"
ROWS = (1, 2, 4, 8, 16, 32, 64, 256)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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


@torch.inference_mode()
def measure(dtype: torch.dtype, repeats: int) -> dict[int, Rounds]:
    """By number of rows, seconds of each quantisation."""
    path = ensure_model(MODEL)
    decoders = {name: load_decoder(path, dtype, quantization=name) for name in get_args(Quantization)}
    result = {num_rows: Rounds() for num_rows in ROWS}
    for repeat in range(repeats + 1):
        for num_rows, rounds in result.items():
            for name, decoder in decoders.items():
                seconds = dense_walk_s(decoder, num_rows)
                if repeat:  # the first round warms up
                    rounds.add(name, seconds)
    return result


def report(console: Console, name: str, measured: dict[int, Rounds]) -> dict[str, Any]:
    """Prints and returns seconds unrounded, and the others as shares of them."""
    others = [quantization for quantization in get_args(Quantization) if quantization != "none"]
    table = Table("rows", "none, ms", *others, title=f"{name}, one thread: time over that of 'none'")
    found: dict[str, Any] = {}
    for num_rows, rounds in measured.items():
        ratios = {other: rounds.ratio(other, "none") for other in others}
        unrounded = rounds.spreads()["none"]
        shown = [f"{r.median:.2f} ({r.low:.2f} to {r.high:.2f})" for r in ratios.values()]
        table.add_row(str(num_rows), f"{unrounded.median * 1e3:.3g}", *shown)
        found[str(num_rows)] = {"none_s": unrounded.as_dict()} | {o: r.as_dict() for o, r in ratios.items()}
    console.print(table)
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="omniserve.bench.quantized", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/quantized.json"))
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = Console()
    found: dict[str, Any] = {"machine": machine(), "repeats": options.repeats}
    for name, dtype in DTYPES.items():
        found[name] = report(console, name, measure(dtype, options.repeats))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    console.print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
