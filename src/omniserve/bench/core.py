"""First figures of the engine: `python -m omniserve.bench.core [--out FILE]`.

Medians over repeats with their range. How fast others are is told by peers.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from omniserve import LLM, SamplingParams
from omniserve.bench.measure import Spread, machine, seconds_of, write_json
from omniserve.config import EngineConfig, split_cpus

if TYPE_CHECKING:
    from omniserve.model.decoder import Decoder

MODEL = "smollm2-135m"
LANE_ROWS = (0, 1, 4, 8, 16)
LANE_COUNTS = (1, 8, 32)
LANE_CONTEXT = 256


# ---------------------------------------------------------------- start-up


def measure_startup(repeats: int) -> Spread:
    """Seconds from nothing to the first token could be asked for: engine process, weights, memory."""

    def start() -> None:
        LLM(MODEL).close()

    start()  # fills the page cache
    return Spread([seconds_of(start) for _ in range(repeats)])


# ---------------------------------------------------------------- lanes


def measure_lane_rate(repeats: int) -> dict[int, Spread]:
    """Lane tokens/s with no other work: every decode token by host attention, in passes."""
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    prompt = [(7 * i) % 40000 + 100 for i in range(LANE_CONTEXT)]
    result = {}
    with LLM(MODEL, host_offload="always", max_lane_rows=32, enable_prefix_caching=False) as llm:
        for count in LANE_COUNTS:
            rates = []
            for _ in range(repeats):
                llm.generate([prompt], params, "best_effort")
                before = llm.stats()
                llm.generate([prompt] * count, params, "best_effort")
                after = llm.stats()
                busy_s = after["pass_s"] - before["pass_s"] + after["starved_s"] - before["starved_s"]
                rates.append((after["num_lane_tokens"] - before["num_lane_tokens"]) / busy_s)
            result[count] = Spread(rates)
    return result


@cache
def _decoder() -> Decoder:
    """Loaded once: this process is the device from then on, and has its CPUs only."""
    from omniserve.engine.build import device_decoder
    from omniserve.model.sources import ensure_model

    config = EngineConfig(max_model_len=1024)
    return device_decoder(config, split_cpus(config), ensure_model(MODEL))


def measure_walk_cost(repeats: int, device_rows: int) -> dict[int, Spread]:
    """Seconds of one walk with `device_rows` decode rows and r lane rows at every layer.

    A scripted host answers between walks, off the clock: what is timed is the rows' own cost (GEMM rows,
    exits and entries), not the host's. With the paper's rule and r starts a walk, r rows sit at each layer.
    """
    from omniserve.engine.build import make_engine
    from omniserve.host.scripted import ScriptedHost

    decoder = _decoder()
    result = {}
    for lane_rows in LANE_ROWS:
        config = EngineConfig(
            host_offload="always",
            reentry="next_iteration",
            max_lanes=max(1, lane_rows * (decoder.num_layers + 2)),
            max_lane_rows=max(1, lane_rows),
            device_memory_bytes=1 << 30,
            host_memory_bytes=2 << 30,
            max_copies_per_step=32,
            page_size=32,
            host_page_size=32,
        )
        engine = make_engine(
            config, decoder, 1024, split_cpus(config), host=lambda geometry, *_: ScriptedHost(geometry)
        )
        host = engine.host
        assert isinstance(host, ScriptedHost)
        port, counters = host.segment.port, engine.executor.counters
        lasting = SamplingParams(temperature=0.0, max_tokens=1000, ignore_eos=True)
        for i in range(device_rows):
            engine.add([100 + i], lasting, "latency_sensitive")
        for i in range(lane_rows * (decoder.num_layers + 2)):
            engine.add(
                [200 + i], SamplingParams(temperature=0.0, max_tokens=25, ignore_eos=True), "best_effort"
            )
        for _ in range(4 * decoder.num_layers if lane_rows else 8):
            engine.step()
            host.serve_all()
        samples = []
        for _ in range(repeats):
            entered, began_s = port.stats()["lane_entries"], counters.walk_s
            engine.step()
            samples.append(counters.walk_s - began_s)
            rows = port.stats()["lane_entries"] - entered
            assert rows == lane_rows * decoder.num_layers, (rows, lane_rows)
            host.serve_all()
        result[lane_rows] = Spread(samples)
        engine.close()
    return result


# ---------------------------------------------------------------- report


def report_startup(console: Console, repeats: int) -> dict[str, Any]:
    startup = measure_startup(repeats)
    console.print(f"start-up with a warm cache: {startup} s")
    return startup.as_dict()


def report_lanes(console: Console, repeats: int) -> dict[str, Any]:
    rates = measure_lane_rate(repeats)
    rows = [(str(count), str(rate)) for count, rate in rates.items()]
    title = f"lane tokens/s, context {LANE_CONTEXT}, no device rows"
    console.print(_table(title, ("lanes", "tokens/s"), rows))
    return {str(count): rate.as_dict() for count, rate in rates.items()}


def report_walks(console: Console, repeats: int) -> dict[str, Any]:
    report = {}
    for device_rows in (1, 8):
        walks = measure_walk_cost(4 * repeats, device_rows)
        rows = []
        for count, cost in walks.items():
            in_ms = Spread([1e3 * seconds for seconds in (cost.low, cost.median, cost.high)])
            rows.append((str(count), str(in_ms), f"{cost.median / walks[0].median:.2f}x"))
        title = f"one walk, {device_rows} device rows, lane rows at every layer"
        console.print(_table(title, ("lane rows", "ms", "over 0 lane rows"), rows))
        report[f"{device_rows} device rows"] = {str(r): cost.as_dict() for r, cost in walks.items()}
    return report


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title)
    for name in columns:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    return table


PARTS: dict[str, Callable[[Console, int], dict[str, Any]]] = {
    "startup_s": report_startup,
    "lane_tokens_per_s": report_lanes,
    "walk_s": report_walks,
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="omniserve.bench.core", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/core.json"), help="other parts in it stay")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args(arguments)
    console = Console()
    report = json.loads(options.out.read_text()) if options.out.exists() else {}
    report["machine"] = machine()
    for part in options.parts:
        with console.status(f"measuring {part} ..."):
            report[part] = PARTS[part](console, options.repeats) | {"repeats": options.repeats}
    write_json(options.out, report)
    console.print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
