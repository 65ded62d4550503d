"""What the server adds to the Python API: `python -m omniserve.bench.server_cost [--out FILE]`.

The same chats go to `omniserve serve` over HTTP, as server-sent events, and to an AsyncLLM of this process;
either has an engine in a process of its own with the same settings. Places (64) with one request open at a
time, pauses of random length between them; the arms take turns, and who was second begins the next round.
Times are the caller's: from before a request is written (or its prompt tokenised) until a piece of text is
there. Medians over rounds with their range; a difference is taken within a round.

ttft       to the first text
token      (last text - first text) / (tokens - 1), of each request
gap        between two texts of one request
burst      of each text, how long it came after the first one of the same walk
walk       the engine's own clock: what it lost to others on its core (and nothing else) shows here
cpu        CPU time per token of the process that serves (engine left out), and of the HTTP client

The engine has one core. Server and client share the others with whatever else runs: on two cores the client's
CPU time is time that the server waits. `--model quick` is a shape with random weights whose walk with 64 rows
takes about 20 ms on one core, about as long as that of a large model on an accelerator.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from omniserve.bench.measure import Rounds, Spread, machine, write_json
from omniserve.bench.prompts import Pool, measured_pool
from omniserve.bench.server_cost_arms import Arm, Passage, PythonApi, serving, write_quick_model
from omniserve.bench.server_cost_load import Size, make_load, times
from omniserve.engine.async_llm import AsyncLLM
from omniserve.model import smollm2

QUICK = "quick"
# One core for the engine, and rows for prompts beside 64 requests that decode.
ENGINE = {
    "host_offload": "never",
    "device_threads": 1,
    "max_num_batched_tokens": 256,
    "device_memory_bytes": 512 * 1024**2,
}
# What is added must stay under.
LIMITS_S = {"ttft_p50_s": 5e-3, "tpot_p50_s": 1e-3}
SHOWN = {
    "ttft p50 ms": ("ttft_p50_s", 1e3),
    "ttft p99 ms": ("ttft_p99_s", 1e3),
    "token p50 ms": ("tpot_p50_s", 1e3),
    "token p99 ms": ("tpot_p99_s", 1e3),
    "gap p50 ms": ("gap_p50_s", 1e3),
    "gap p99 ms": ("gap_p99_s", 1e3),
    "burst mean ms": ("burst_mean_s", 1e3),
    "walk mean ms": ("walk_s", 1e3),
    "token p50 - walk ms": ("beyond_walk_s", 1e3),
    "cpu us/token": ("cpu_s", 1e6),
    "client cpu us/token": ("client_cpu_s", 1e6),
    "tokens/s": ("tokens_per_s", 1),
}


def figures(passage: Passage, num_tokens: int) -> dict[str, float]:
    found = times(passage.places, passage.walk_s)
    return found | {
        "beyond_walk_s": found["tpot_p50_s"] - passage.walk_s,
        "walk_s": passage.walk_s,
        "cpu_s": passage.cpu_s / num_tokens,
        "client_cpu_s": passage.client_cpu_s / num_tokens,
        "tokens_per_s": num_tokens / passage.seconds,
    }


async def measure(
    arms: Sequence[Arm], size: Size, pool: Pool, num_rounds: int, progress: Progress
) -> dict[str, Rounds]:
    """By figure, samples of each arm."""
    found: dict[str, Rounds] = {}
    bar = progress.add_task("rounds", total=(num_rounds + 1) * len(arms))
    for number in range(num_rounds + 1):
        for arm in arms if number % 2 else arms[::-1]:
            progress.update(bar, description=f"round {number}: {arm.name}")
            gc.collect()
            passage = await arm.carry(make_load(size, pool, f"round {number}"))
            if number:  # the first one warms up
                for name, value in figures(passage, size.num_tokens).items():
                    found.setdefault(name, Rounds()).add(arm.name, value)
            progress.advance(bar)
    return found


def added(rounds: Rounds, arms: Sequence[Arm]) -> Spread:
    """Of the first arm over the second, round by round."""
    over, under = (rounds.samples[arm.name] for arm in arms)
    return Spread([a - b for a, b in zip(over, under, strict=True)])


def table(found: dict[str, Rounds], arms: Sequence[Arm]) -> Table:
    shown = Table("", *(arm.name for arm in arms), "added")
    for title, (name, factor) in SHOWN.items():
        spreads = [Spread([v * factor for v in found[name].samples[arm.name]]) for arm in arms]
        difference = added(found[name], arms)
        scaled = Spread([v * factor for v in (difference.low, difference.median, difference.high)])
        shown.add_row(title, *map(str, spreads), str(scaled))
    return shown


def compare(options: argparse.Namespace, console: Console, folder: Path) -> dict[str, Any]:
    """The report: figures of both arms, and what is added."""
    source, engine = smollm2.ensure(), dict[str, Any](ENGINE)
    model = options.model
    if model == QUICK:
        write_quick_model(source, folder)
        model, engine = str(folder), engine | {"load_format": "dummy"}
    size = Size(
        options.streams, options.requests, options.prompt_tokens, options.output_tokens, options.pause_s
    )
    llm = AsyncLLM(model, **engine)
    try:
        with serving(model, engine, options.log) as http:
            arms: list[Arm] = [http, PythonApi(llm)]
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
            with Progress(*columns, console=console, refresh_per_second=1) as progress:
                pool = measured_pool(llm.tokenizer, 0)
                found = uvloop.run(measure(arms, size, pool, options.rounds, progress))
    finally:
        llm.close()
    console.print(table(found, arms))
    differences = {name: added(rounds, arms) for name, rounds in found.items()}
    return {
        "machine": machine(),
        "model": options.model,
        "engine": ENGINE,
        "rounds": options.rounds,
        "num_streams": size.num_streams,
        "num_requests": size.num_streams * size.num_each,
        "num_prompt": size.num_prompt,
        "num_output": size.num_output,
        "pause_s": size.pause_s,
        "arms": {name: rounds.as_dicts() for name, rounds in found.items()},
        "added": {name: spread.as_dict() for name, spread in differences.items()},
        "limits_s": LIMITS_S,
        "is_within_limits": {name: differences[name].median < limit for name, limit in LIMITS_S.items()},
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="omniserve.bench.server_cost", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/server_cost.json"))
    parser.add_argument(
        "--log", type=Path, default=Path("build/server_cost.log"), help="what the server says"
    )
    parser.add_argument("--model", default=QUICK, help="'quick', or any model; default: quick")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--requests", type=int, default=8, help="of each stream, one after the other")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=48, help="mean of a request")
    parser.add_argument("--pause-s", type=float, default=0.05, help="mean time between two requests")
    options = parser.parse_args(arguments)
    console = Console()
    with tempfile.TemporaryDirectory(prefix="omniserve-quick-") as name:
        report = compare(options, console, Path(name))
    write_json(options.out, report)
    console.print(f"within limits: {report['is_within_limits']}; written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
