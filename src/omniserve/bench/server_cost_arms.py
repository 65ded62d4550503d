"""The two ways to one engine that server_cost.py compares: over HTTP, and the Python API."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx
import msgspec

from omniserve.bench import server_cost_client
from omniserve.bench.measure import process_busy_s
from omniserve.bench.server_cost_client import Findings, Task
from omniserve.bench.server_cost_load import Load, Question, Timing, run_load
from omniserve.engine.async_llm import AsyncLLM
from omniserve.errors import OmniServeError
from omniserve.types import SamplingParams

START_LIMIT_S = 120.0
ANSWER_LIMIT_S = 300.0
END_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Passage:
    """What one load met. cpu_s: of the process that holds the engine's client, the engine itself left out;
    client_cpu_s: of the HTTP client beside it; walk_s: of one walk, by the engine's own clock."""

    places: list[list[Timing]]
    seconds: float
    cpu_s: float
    client_cpu_s: float
    walk_s: float


class Arm(Protocol):
    name: str

    async def carry(self, load: Load) -> Passage: ...


class PythonApi:
    """An AsyncLLM of this process, its engine in a process of its own as a server has it."""

    name = "Python API"

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm

    async def carry(self, load: Load) -> Passage:
        before = await self._llm.stats()
        began_s, began_cpu_s = time.monotonic(), time.process_time()
        places = await run_load(load, self._ask)
        seconds, cpu_s = time.monotonic() - began_s, time.process_time() - began_cpu_s
        after = await self._llm.stats()
        return Passage(places, seconds, cpu_s, 0.0, _walk_s(before, after))

    async def _ask(self, place: int, question: Question, token_s: list[float]) -> None:
        """A token without text, half a character, is no event here, as it is none of the server's."""
        ids = self._llm.encode_chat([{"role": "user", "content": question.content}])
        params = SamplingParams(temperature=0.0, max_tokens=question.num_output, ignore_eos=True)
        num_chars = 0
        async with aclosing(self._llm.submit(ids, params)) as outputs:
            async for output in outputs:
                if len(output.text) > num_chars or output.finished:
                    num_chars = len(output.text)
                    token_s.append(time.monotonic())


class Http:
    """`omniserve serve`, and for each load a client process."""

    name = "server"

    def __init__(self, pid: int, base_url: str) -> None:
        self._pid, self._base_url = pid, base_url

    async def carry(self, load: Load) -> Passage:
        before, began_cpu_s = self._stats(), process_busy_s(self._pid)
        findings = await asyncio.to_thread(self._asked, load)
        cpu_s, after = process_busy_s(self._pid) - began_cpu_s, self._stats()
        return Passage(findings.places, findings.seconds, cpu_s, findings.cpu_s, _walk_s(before, after))

    def _asked(self, load: Load) -> Findings:
        address = urlsplit(self._base_url)
        assert address.hostname is not None
        assert address.port is not None
        task = Task(address.hostname, address.port, [list(questions) for questions in load])
        ended = subprocess.run(
            [sys.executable, "-m", server_cost_client.__name__],
            input=msgspec.json.encode(task),
            stdout=subprocess.PIPE,
            timeout=ANSWER_LIMIT_S,
        )
        if ended.returncode:
            raise OmniServeError(f"the client ended with exit status {ended.returncode}")
        if not ended.stdout:
            raise OmniServeError("the client ended without a word: something else ended it")
        return msgspec.json.decode(ended.stdout, type=Findings)

    def _stats(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self._base_url}/admin/stats").json()
        return found


def _walk_s(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """Mean seconds of the walks between two readings of AsyncLLM.stats()."""
    return float((after["walk_s"] - before["walk_s"]) / (after["walks"] - before["walks"]))


@contextmanager
def serving(model: str, engine: Mapping[str, Any], log: Path) -> Iterator[Http]:
    """A server with these settings of the engine, ready; what it prints goes to `log`."""
    flags = [part for name, value in engine.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "omniserve.cli", "serve", model, "--port", "0", *flags]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=stderr)
    try:
        yield Http(process.pid, _ready_url(process, log))
    finally:
        process.terminate()
        try:
            process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready_url(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        found = re.search(r"listening on (http://\S+)", log.read_text())
        if found and httpx.get(f"{found[1]}/ready").status_code == 200:
            return found[1]
        time.sleep(0.1)
    raise OmniServeError(f"the server did not come up; see {log}")


# Of a model whose walk with 64 rows takes about as long on one core as that of a large one on an accelerator.
QUICK_SHAPE = {
    "num_hidden_layers": 4,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}


def write_quick_model(source: Path, folder: Path) -> None:
    """A model of that shape without weights in `folder`, with the tokenizer of the one in `source`."""
    config = json.loads((source / "config.json").read_text()) | QUICK_SHAPE
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(source / name)
