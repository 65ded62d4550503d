"""Our engine beside its peers: `python -m omniserve.bench.peers [--quick] [--out FILE]`.

The same prompts (token ids drawn at random, new ones each time) go to every engine in one run, at equal
threads on the same CPUs. Greedy, exactly as many tokens as asked for, whatever they are. A rate is tokens
over wall time measured inside the peer's process: output tokens of short prompts that arrive at once, or
prompt tokens of one long prompt with a single output token.

Each round starts every peer in a process of its own, warms it up, takes the cases one after the other with
the peers in turns, one computing at a time, and ends them all. Who was second begins the next round.
Start-up lasts until a first token has come back; the files may be in the page cache or not. What else kept
the CPUs busy while a peer computed is reported: near zero when nothing disturbs the run.

omniserve      host_offload="never", no prefix cache, chunks of 512 tokens; its other settings are defaults.
               omniserve-bf16 (`--bf16`): the same with bfloat16 weights, activations and KV
transformers   batched generate() of the release that the project uses, on torch's default CPU kernels; all
               prompts are equally long, so nothing is padded
vllm           the CPU build, its threads bound to the same CPUs, no core reserved, prefix cache off, Intel's
               OpenMP preloaded; compilation, chunk size and processes are the defaults of its LLM class
llama-f32      llama.cpp as llama-cpp-python compiles it here (for this CPU, with OpenMP), the same weights as
               a float32 GGUF file, float32 KV; sequences share batches of up to 2048 tokens, 512 at once
llama-q4       the same on the 4-bit file that the model was made from (Q4_1, embedding Q8_0), float16 KV:
               what a llama.cpp user runs, and NOT the same precision; activations are rounded to 8 bits

Our own requests and vLLM's also turn tokens into text as they come, as a server does; the other peers give
token ids. First tokens are compared with ours: that shows whether a peer runs the same model.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from omniserve.bench import peer_setup
from omniserve.bench.measure import cpus_to_pin, machine, write_json
from omniserve.bench.peer_process import PeerError
from omniserve.bench.peer_rounds import OURS, Case, Comparison, Contender
from omniserve.bench.peer_tables import checks, failures, table
from omniserve.errors import ModelError
from omniserve.machine import available_cpus
from omniserve.model import smollm2

SHORT_PROMPT_TOKENS = 10
OUTPUT_TOKENS = 64
CONCURRENCY = (1, 8, 32, 64)
LONG_PROMPTS = (1024, 4096)
QUICK_CONCURRENCY = (1, 8)
QUICK_LONG_PROMPTS = (1024,)
QUICK_OUTPUT_TOKENS = 16
ROUNDS = 3
MIN_WIDTH = 170  # of the table where the terminal does not say


@dataclass(frozen=True, slots=True)
class Peer:
    """How to run one engine. `python` and `model` make ready what is missing; PeerError or ModelError."""

    engine: str
    dtype: str
    python: Callable[[], Path]
    model: Callable[[], Path]


def own_python() -> Path:
    return Path(sys.executable)


OURS_BF16 = "omniserve-bf16"
PEERS: dict[str, Peer] = {
    OURS: Peer("omniserve", "float32", own_python, peer_setup.safetensors_model),
    OURS_BF16: Peer("omniserve", "bfloat16", own_python, peer_setup.safetensors_model),
    "transformers": Peer("transformers", "float32", own_python, peer_setup.safetensors_model),
    "vllm": Peer("vllm", "float32", peer_setup.VLLM.python, peer_setup.safetensors_model),
    "llama-f32": Peer("llama.cpp", "float32", peer_setup.LLAMA_CPP.python, peer_setup.float32_gguf),
    "llama-q4": Peer("llama.cpp", "q4_1", peer_setup.LLAMA_CPP.python, peer_setup.quantised_gguf),
}
OTHERS = tuple(name for name in PEERS if name not in (OURS, OURS_BF16))


def cases_of(concurrency: Sequence[int], output_tokens: int, long_prompts: Sequence[int]) -> list[Case]:
    return [
        *(Case(count, SHORT_PROMPT_TOKENS, output_tokens) for count in concurrency),
        *(Case(1, length, 1) for length in long_prompts),
    ]


def contender(name: str, cases: Sequence[Case], threads: int) -> Contender:
    """The peer, installed if it has to be; PeerError or ModelError when that cannot be done."""
    peer = PEERS[name]
    # One sequence of a token and the next: what ends the start-up.
    shapes = [(1, 2), *((c.prompts, c.prompt_tokens + c.output_tokens) for c in cases)]
    settings = {
        "engine": peer.engine,
        "model": str(peer.model()),
        "dtype": peer.dtype,
        "threads": threads,
        "cpus": cpus_to_pin()[:threads],
        "shapes": shapes,
    }
    return Contender(name, peer.python(), settings)


def compare(
    names: Sequence[str], cases: Sequence[Case], threads: int, rounds: int, console: Console
) -> dict[str, Any]:
    """Installs, measures, and returns the report. Peers that fail are reported, not raised."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(names) * (1 + rounds * (1 + len(cases))))

        def step(text: str) -> None:
            progress.update(bar, description=text)
            progress.advance(bar)

        contenders, missing = [], {}
        for name in names:
            step(f"{name}: installing where it is missing")
            try:
                contenders.append(contender(name, cases, threads))
            except (PeerError, ModelError) as error:
                missing[name] = str(error)
        comparison = Comparison(contenders, cases, vocabulary_size(), peer_setup.PEERS_FOLDER, step)
        comparison.measured.failures |= missing
        for number in range(rounds):
            comparison.take_round(number)
    return {
        "machine": machine(),
        "model": smollm2.NAME,
        "threads": threads,
        "rounds": rounds,
        **comparison.measured.as_dict(names),
    }


def vocabulary_size() -> int:
    config = json.loads((peer_setup.safetensors_model() / "config.json").read_text())
    return int(config["vocab_size"])


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 1 when a peer could not be measured to the end."""
    options = _parser().parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):  # peers are stopped: they must be ended, not left
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, MIN_WIDTH))
    concurrency = options.concurrency or (QUICK_CONCURRENCY if options.quick else CONCURRENCY)
    if options.quick:
        cases = cases_of(concurrency, QUICK_OUTPUT_TOKENS, QUICK_LONG_PROMPTS)
    else:
        cases = cases_of(concurrency, OUTPUT_TOKENS, LONG_PROMPTS)
    names = [OURS, *([OURS_BF16] if options.bf16 else []), *dict.fromkeys(options.peers)]
    rounds = options.rounds or (1 if options.quick else ROUNDS)
    report = compare(names, cases, options.threads or available_cpus().count, rounds, console)

    console.print(table(report))
    for line in (*checks(report), *failures(report)):
        console.print(line, markup=False, highlight=False)
    write_json(options.out, report)
    console.print(f"written to {options.out}")
    return 1 if failures(report) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="omniserve.bench.peers", description="Our engine beside its peers, in turns, at equal threads."
    )
    parser.add_argument("--out", type=Path, default=Path("results/peers.json"))
    parser.add_argument("--peers", nargs="+", choices=OTHERS, default=OTHERS)
    parser.add_argument("--bf16", action="store_true", help="ours with bfloat16 weights as well")
    parser.add_argument("--concurrency", nargs="+", type=_count, metavar="N", help=f"default: {CONCURRENCY}")
    parser.add_argument("--rounds", type=_count, help=f"default: {ROUNDS}")
    parser.add_argument("--threads", type=_threads, help="default: all cores")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one round, fewer cases and output tokens: shows that everything works, and no more",
    )
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _threads(text: str) -> int:
    value, limit = _count(text), available_cpus().count
    if value > limit:
        raise argparse.ArgumentTypeError(f"at most {limit}, the CPUs available here; got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
