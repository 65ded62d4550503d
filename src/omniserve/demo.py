"""The demo: a chat stream alone, the same stream with batch work riding along, then a frozen host.

Everything printed was measured in this run. Both legs replay the same arrivals with the same device threads.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from omniserve.bench.measure import percentile
from omniserve.engine.async_llm import AsyncLLM
from omniserve.errors import OmniServeError
from omniserve.types import RequestOutput, SamplingParams

CHAT = (
    "What is the capital of France?",
    "Give me three tips for better sleep.",
    "Explain in two sentences why the sky is blue.",
    "Write a short greeting for a colleague who comes back from holiday.",
    "What should I pack for a weekend in the mountains?",
)
BATCH = (
    "Summarise the water cycle for a ten year old, in detail.",
    "Describe how bread is made, from grain to loaf, step by step.",
    "List the planets of the solar system and say something about each of them.",
    "Tell the story of a lighthouse keeper and a storm.",
    "Explain how a bicycle stays upright, with examples.",
    "Write a long letter from a sailor to his family.",
)
CHAT_TOKENS = 32
BATCH_TOKENS = 400
NUM_BATCH = 12
# Chat requests arrive as a Poisson stream of this rate, with a fixed seed.
CHAT_RATE_PER_S = 0.7
FREEZE_S = 4.0
LANES_TIMEOUT_S = 60.0
# With 32 device tokens a walk, a batch prompt's chunk delays the chat by a few tens of milliseconds.
# The legs send the same prompts again: with a prefix cache the later ones would compute less, and texts
# "alone" would start from the KV they are to be compared with.
SETTINGS: dict[str, Any] = {
    "host_offload": "always",
    "max_num_batched_tokens": 32,
    "max_lanes": NUM_BATCH,
    "enable_prefix_caching": False,
}


@dataclass
class Leg:
    """What one leg measured. Seconds and tokens."""

    name: str
    seconds: float = 0.0
    chat: list[RequestOutput] = field(default_factory=list)
    chat_tokens: int = 0
    batch_tokens: int = 0
    lane_tokens: int = 0
    stats_before: dict[str, Any] = field(default_factory=dict)
    stats_after: dict[str, Any] = field(default_factory=dict)

    def gained(self, name: str) -> float:
        return float(self.stats_after[name]) - float(self.stats_before[name])

    def percentile(self, metric: str, share: float) -> float:
        """The value that `share` of the finished chat requests do not exceed, seconds."""
        values = [v for o in self.chat if (v := getattr(o.metrics, metric)) is not None]
        return percentile(values, share) if values else float("nan")


class Demo:
    """One engine, three scenes."""

    def __init__(self, llm: AsyncLLM, console: Console, leg_s: float) -> None:
        self.llm = llm
        self.console = console
        self.leg_s = leg_s
        self.chat_ids = [llm.encode_chat([{"role": "user", "content": text}]) for text in CHAT]
        self.batch_ids = [llm.encode_chat([{"role": "user", "content": text}]) for text in BATCH]
        self.batch_outputs: dict[int, RequestOutput] = {}

    # ------------------------------------------------------------ requests

    async def _chat(self, leg: Leg, number: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=CHAT_TOKENS, ignore_eos=True)
        prompt = self.chat_ids[number % len(self.chat_ids)]
        async for output in self.llm.submit(prompt, params):
            leg.chat_tokens += 1
            if output.finished:
                leg.chat.append(output)

    async def _batch(self, leg: Leg, number: int) -> None:
        """Keeps one batch request running at all times, with a new prompt whenever one is done."""
        params = SamplingParams(temperature=0.0, max_tokens=BATCH_TOKENS, ignore_eos=True)
        prompt = self.batch_ids[number % len(self.batch_ids)]
        while True:
            async for output in self.llm.submit(prompt, params, "best_effort"):
                leg.batch_tokens += 1
                self.batch_outputs[number] = output

    async def _arrivals(self, leg: Leg) -> None:
        """The chat stream: Poisson arrivals, the same in every leg."""
        rng = random.Random(20)
        began, due, tasks = time.monotonic(), 0.0, []
        for number in range(10_000):
            due += rng.expovariate(CHAT_RATE_PER_S)
            if due > self.leg_s - 1.0:
                break
            await asyncio.sleep(max(0.0, began + due - time.monotonic()))
            tasks.append(asyncio.create_task(self._chat(leg, number)))
        await asyncio.gather(*tasks)
        await asyncio.sleep(max(0.0, began + self.leg_s - time.monotonic()))

    # ------------------------------------------------------------ scenes

    async def chat_leg(self, name: str) -> Leg:
        leg = Leg(name, stats_before=await self.llm.stats())
        began = time.monotonic()
        with self._progress(leg) as refresh:
            stream = asyncio.create_task(self._arrivals(leg))
            while not stream.done():
                refresh(time.monotonic() - began, await self.llm.stats())
                await asyncio.wait([stream], timeout=0.25)
            await stream
        leg.seconds = time.monotonic() - began
        leg.stats_after = await self.llm.stats()
        leg.lane_tokens = int(leg.gained("num_lane_tokens"))
        return leg

    async def freeze(self) -> Leg:
        """Stop the host process for a few seconds while a chat request streams."""
        host_pid = (await self.llm.stats())["host_pid"]
        leg = Leg("host frozen")
        os.kill(host_pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(0.2)  # what the host had finished before the stop still enters
            leg.stats_before = await self.llm.stats()
            began, number = time.monotonic(), 0
            with self._progress(leg) as refresh:
                while time.monotonic() - began < FREEZE_S:
                    await self._chat(leg, number)
                    number += 1
                    refresh(time.monotonic() - began, await self.llm.stats())
            leg.seconds = time.monotonic() - began
            leg.stats_after = await self.llm.stats()
        finally:
            os.kill(host_pid, signal.SIGCONT)
        leg.lane_tokens = int(leg.gained("num_lane_tokens"))
        return leg

    async def count_exact(self) -> tuple[int, int]:
        """Run the batch prompts on the device alone; how many lane texts are equal, of how many."""
        equal = total = 0
        for number, output in self.batch_outputs.items():
            if number >= len(self.batch_ids) or not output.token_ids:
                continue
            params = SamplingParams(
                temperature=0.0, max_tokens=min(len(output.token_ids), 32), ignore_eos=True
            )
            alone = [o async for o in self.llm.submit(self.batch_ids[number], params)][-1]
            total += 1
            equal += alone.token_ids == output.token_ids[: len(alone.token_ids)]
        return equal, total

    @contextmanager
    def _progress(self, leg: Leg) -> Iterator[Any]:
        with Live(console=self.console, refresh_per_second=8, transient=True) as live:

            def refresh(elapsed_s: float, stats: dict[str, Any]) -> None:
                lanes = stats["requests"]["lane"]
                lane_tokens = stats["num_lane_tokens"] - leg.stats_before.get("num_lane_tokens", 0)
                live.update(
                    f"  [bold]{leg.name}[/bold]  {elapsed_s:4.1f} s   chat {leg.chat_tokens:4d} tokens"
                    f"   lanes {lanes:2d}   lane tokens {lane_tokens:5d}"
                )

            yield refresh


async def _run(console: Console, leg_s: float) -> tuple[list[Leg], tuple[int, int], float]:
    began = time.monotonic()
    with console.status("starting the engine and the host process ..."):
        llm = AsyncLLM(**SETTINGS)
    up_s = time.monotonic() - began
    console.print(f"engine and host are up after {up_s:.1f} s (engine alone {llm.startup_s:.1f} s)\n")
    try:
        demo = Demo(llm, console, leg_s)
        console.print("[1] chat alone")
        alone = await demo.chat_leg("chat alone")
        console.print(
            "[2] the same chat, with batch requests as lanes: their attention runs in the host process"
        )
        mixed_leg = Leg("warm-up")
        batch = [asyncio.create_task(demo._batch(mixed_leg, i)) for i in range(NUM_BATCH)]
        async with asyncio.timeout(LANES_TIMEOUT_S):
            while (await llm.stats())["requests"]["lane"] < NUM_BATCH // 2:
                await asyncio.sleep(0.1)
        mixed = await demo.chat_leg("chat with batch")
        console.print(f"[3] the host process is stopped (SIGSTOP) for {FREEZE_S:.0f} s while chat goes on")
        frozen = await demo.freeze()
        await asyncio.sleep(1.0)
        for task in batch:
            task.cancel()
        await asyncio.gather(*batch, return_exceptions=True)
        with console.status("comparing lane texts with the model alone ..."):
            exact = await demo.count_exact()
        return [alone, mixed, frozen], exact, llm.startup_s
    finally:
        llm.close()


def _table(legs: list[Leg]) -> Table:
    table = Table(title="measured in this run")
    table.add_column("")
    for leg in legs:
        table.add_column(leg.name, justify="right")
    rows: list[tuple[str, Any]] = [
        ("seconds", lambda g: f"{g.seconds:.1f}"),
        ("chat requests finished", lambda g: f"{len(g.chat)}"),
        ("chat TTFT p50 / p95, ms", lambda g: _pair(g, "ttft_s")),
        ("chat TPOT p50 / p95, ms", lambda g: _pair(g, "tpot_s")),
        ("chat tokens/s", lambda g: f"{g.chat_tokens / g.seconds:.1f}"),
        ("batch tokens/s (lanes)", lambda g: f"{g.lane_tokens / g.seconds:.1f}"),
        ("walks / lane passes", lambda g: f"{g.gained('walks'):.0f} / {g.gained('lane_passes'):.0f}"),
        ("lane entries, in the same iteration", _entries),
        ("device waited for the host, s", lambda g: f"{g.gained('device_wait_s'):.3f}"),
    ]
    for name, value in rows:
        table.add_row(name, *(value(leg) for leg in legs))
    return table


def _pair(leg: Leg, metric: str) -> str:
    return f"{leg.percentile(metric, 0.5) * 1e3:.0f} / {leg.percentile(metric, 0.95) * 1e3:.0f}"


def _entries(leg: Leg) -> str:
    entries, same = leg.gained("lane_entries"), leg.gained("same_iteration_entries")
    return f"{entries:.0f}, {same / entries:.0%}" if entries else "0"


def run_demo(leg_s: float, json_path: str | None = None) -> int:
    """Run the three scenes and print the table; 0 when chat went on under the frozen host."""
    console = Console()
    console.print("[bold]OmniServe[/bold]: SmolLM2-135M; the device is CPU threads, the host other cores\n")
    try:
        legs, (equal, total), startup_s = asyncio.run(_run(console, leg_s))
    except TimeoutError:
        raise OmniServeError(f"no lanes after {LANES_TIMEOUT_S:.0f} s: is the host process up?") from None
    alone, mixed, frozen = legs
    console.print(_table(legs))
    slower = mixed.percentile("tpot_s", 0.5) / alone.percentile("tpot_s", 0.5)
    waited_s = frozen.gained("device_wait_s")
    for line in (
        f"lane texts equal to the model alone: {equal} of {total} (first 32 tokens)",
        f"host KV: {frozen.stats_after['host_kv_dtype']} (host_kv_dtype='int8' would hold more; it is lossy)",
        f"the price: chat TPOT p50 is {slower:.2f}x that of chat alone (no targets set)",
        f"host frozen: {len(frozen.chat)} chat requests finished, lanes made {frozen.lane_tokens} tokens, "
        f"the device waited {waited_s:.1f} s",
    ):
        console.print(line, soft_wrap=True)
    if json_path:
        compared = {"startup_s": startup_s, "equal": equal, "compared": total}
        Path(json_path).write_text(json.dumps({**compared, "legs": [asdict(g) for g in legs]}, indent=2))
    return 0 if frozen.chat and waited_s == 0 else 1
