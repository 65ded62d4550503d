"""The real server, HTTP and all, over an engine that does what a test says and when."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx

from omniserve.config import EngineConfig
from omniserve.engine.acceptance import Acceptance
from omniserve.errors import EngineDeadError, OmniServeError, SloUnattainableError
from omniserve.server.run import Server, listen
from omniserve.server.settings import ServerConfig
from omniserve.types import CompletionOutput, RequestMetrics, RequestOutput, SamplingParams

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
PATIENCE_S = 60.0
HITS = {"queried_tokens": 40, "hit_tokens": 10}
# What metrics take from an engine's statistics.
STATS: dict[str, Any] = {
    "walks": 7,
    "walk_s": 0.7,
    "lane_passes": 5,
    "pass_s": 0.1,
    "starved_s": 0.0,
    "device_tokens": 20,
    "prompt_tokens": 30,
    "harvested_lane_tokens": 6,
    "harvested_device_tokens": 4,
    "latency_sensitive_paid_s": 0.02,
    "swap_out_bytes": 4096,
    "swap_in_bytes": 1024,
    "num_dropped": 0,
    "num_displaced": 3,
    "num_swapped_in": 1,
    "num_broken_promises": 0,
    "host_deaths": 0,
    "host_busy_s": 0.5,
    "host_busy_share": 0.25,
    "host_kv_bytes_read": 8192,
    "host_state": "ready",
    "prefix_cache": {"device_latency_sensitive": HITS, "device_best_effort": HITS, "host": HITS},
    "pages": {"device_total": 8, "device_latency_sensitive": 2, "host_lanes": 3},
    "requests": {"waiting": 0, "prefill": 0, "device": 1, "moving_out": 0, "lane": 2, "moving_in": 0},
    "oldest_lane_s": 1.5,
    "slack_s": 0.05,
    "prediction": {"decode, host busy": {"count": 9, "mean": 0.95, "p90": 0.8}},
    "policy": "slo",
    "promises_slo": True,
    "uptime_s": 2.0,
}


class ScriptedTokenizer:
    longest_token = 1

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, ids))


class ScriptedProgress:
    """As Progress is to the server."""

    def __init__(self, output: RequestOutput) -> None:
        self._output, self.texts = output, output.outputs

    def output(self) -> RequestOutput:
        return self._output


class ScriptedLLM:
    """As AsyncLLM is to the server. A request has `before` tokens at once; more come with `go`, all of them.

    running: requests in the engine; asked: what each came with; refuse_with: what every request raises;
    deadly: a prompt that holds this ends the engine.
    tpot_s: of every text; metrics: what else each experienced. counted: statistics that differ from STATS.
    is_silent: it does not answer.
    """

    startup_s, engine_pid = 0.0, 1
    acceptance = Acceptance(4096, 1 << 20, (2,), 4096, "device_memory_bytes")
    tokenizer = ScriptedTokenizer()
    deadly: str | None = None

    def __init__(self, before: int = 0) -> None:
        self.before = before
        self.go = asyncio.Event()
        self.end = asyncio.Event()
        self.running: set[str] = set()
        self.asked: list[dict[str, Any]] = []
        self.refuse_with: OmniServeError | None = None
        self.num_encoded = self.num_stats = 0
        self.tpot_s = 0.0
        self.metrics = RequestMetrics(0.0)
        self.counted: dict[str, Any] = {}
        self.is_silent = False
        self.silent_s = 0.0
        self.foreseen: list[int] = []

    async def check_arrival(
        self, num_prompt: int, max_tokens: int | None, service_class: str, arrived_s: float,
        slo: Any = None, priority: int = 0,
    ) -> None:  # fmt: skip
        self.foreseen.append(num_prompt)
        if isinstance(self.refuse_with, SloUnattainableError):
            raise self.refuse_with

    def encode(self, text: str) -> list[int]:
        self.num_encoded += 1
        return list(map(ord, text))

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        return self.encode("".join(m["content"] for m in messages))

    async def stream(
        self, ids: list[int], params: SamplingParams, service_class: str, request_id: str, arrived_s: float,
        cache_salt: str | None = None, slo: Any = None, completion_window_s: float | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[ScriptedProgress, None]:  # fmt: skip
        own = {"class": service_class, "salt": cache_salt, "slo": slo, "priority": priority}
        self.asked.append({**own, "window": completion_window_s, "params": params, "id": request_id})
        if self.refuse_with is not None:
            raise self.refuse_with
        if self.deadly is not None and self.deadly in self.tokenizer.decode(ids):
            self.end.set()
            raise EngineDeadError("the engine process was killed by signal 11")
        assert request_id not in self.running
        self.running.add(request_id)
        count = params.max_tokens or 4
        try:
            for number in range(1, count + 1):
                if number > self.before:
                    await self._turn()
                reason = "length" if number == count else None
                tokens = list(range(97, 97 + number))
                metrics = replace(self.metrics, tpot_s=self.tpot_s)
                one = CompletionOutput(0, tokens, "x" * number, reason, metrics=metrics)  # type: ignore[arg-type]
                yield ScriptedProgress(RequestOutput(request_id, ids, [one]))
        finally:
            self.running.discard(request_id)

    async def _turn(self) -> None:
        """Until it may go on; EngineDeadError when it is dead first."""
        tasks = [asyncio.ensure_future(event.wait()) for event in (self.go, self.end)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        if self.end.is_set():
            raise EngineDeadError("the engine process was killed by signal 9")

    async def wait_ended(self) -> str:
        await self.end.wait()
        return "the engine process was killed by signal 9"

    async def explain(self) -> dict[str, Any]:
        return {"plans": []}

    async def stats(self) -> dict[str, Any]:
        self.num_stats += 1
        if self.is_silent:
            await asyncio.Event().wait()
        return STATS | self.counted

    def close(self) -> None:
        """Called on another thread, when it is dead or the server ends."""


class Stand:
    """A running server: its parts, its engines so far (the last one runs), and a client for each purpose."""

    def __init__(self, server: Server, base_url: str, engines: list[ScriptedLLM]) -> None:
        self.server, self.base_url, self.engines = server, base_url, engines
        self.http = httpx.AsyncClient(base_url=base_url, timeout=PATIENCE_S)

    @property
    def llm(self) -> ScriptedLLM:
        return self.engines[-1]

    @property
    def doors(self) -> Any:
        return self.server.endpoints.doors

    async def chat(self, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        return await self.http.post(CHAT, json={"messages": HELLO} | fields, headers=headers)

    @asynccontextmanager
    async def streaming(
        self, headers: dict[str, str] | None = None, **fields: Any
    ) -> AsyncIterator[tuple[httpx.Response, AsyncIterator[str]]]:
        body = {"messages": HELLO, "stream": True, "max_tokens": 4} | fields
        async with self.http.stream("POST", CHAT, json=body, headers=headers) as response:
            yield response, response.aiter_lines()

    async def until(self, condition: Any) -> None:
        """Only a hang can fail this."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0.002)


@asynccontextmanager
async def standing(
    engine_config: EngineConfig | None = None, before: int = 0, **settings: Any
) -> AsyncIterator[Stand]:
    config = ServerConfig(port=0, served_model_name=("tiny",), **settings)
    engines: list[ScriptedLLM] = []
    loop = asyncio.get_running_loop()

    async def make_here() -> ScriptedLLM:
        engines.append(ScriptedLLM(before))
        return engines[-1]

    def make() -> Any:
        """On a thread of the server's."""
        return asyncio.run_coroutine_threadsafe(make_here(), loop).result()

    listener = listen(config)
    server = Server(config, engine_config or EngineConfig(), make)
    task = asyncio.create_task(server.serve(listener))
    port = listener.getsockname()[1]
    stand = Stand(server, f"http://127.0.0.1:{port}", engines)
    try:
        await stand.until(lambda: server.keeper.state == "ready")
        yield stand
    finally:
        await stand.http.aclose()
        server.stop()
        server.stop()
        await asyncio.wait_for(task, PATIENCE_S)


def events(lines: list[str]) -> list[Any]:
    """Decoded data of server-sent events."""
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [one if one == "[DONE]" else json.loads(one) for one in data]
