"""Real processes, stopped and killed for real: chat goes on, batch comes back, callers always hear."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.reference import Reference
from omniserve import LLM, EngineDeadError, RequestOutput, SamplingParams
from omniserve.engine.async_llm import AsyncLLM

CHAT = [
    "The three largest cities of Italy are",
    "Water boils at a temperature of",
    "My favourite season of the year is autumn because",
]
BATCH = [
    "Once upon a time there was a lighthouse keeper who",
    "The history of bread begins",
    "A bicycle stays upright because",
    "Dear family, the ship has reached",
]
SHORT = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)
PATIENCE_S = 120.0


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(condition: Any, what: str) -> None:
    """Poll until `condition()`; only a hang can fail this."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.02)


class Background:
    """A generate() call on a thread of its own."""

    def __init__(self, llm: LLM, prompts: list[str], params: SamplingParams, service_class: str) -> None:
        self.outputs: list[RequestOutput] = []
        self.error: Exception | None = None
        self.num_tokens = 0

        def count(_: int, __: RequestOutput) -> None:
            self.num_tokens += 1

        def work() -> None:
            try:
                self.outputs = llm.generate(prompts, params, service_class, on_progress=count)
            except Exception as error:
                self.error = error

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    def join(self, timeout_s: float = PATIENCE_S) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def reference(smollm2_path: Path) -> Reference:
    """transformers on the same weights."""
    return Reference(smollm2_path)


def assert_exact(reference: Reference, outputs: list[RequestOutput]) -> None:
    for output in outputs:
        reference.check(output.prompt_token_ids, output.token_ids)


def frozen_host(reentry: str, reference: Reference) -> bool:
    """Chat while the host is stopped with lanes in flight; returns whether chat finished before SIGCONT.

    Whatever happened, lanes must yield nothing while frozen, and every token of chat and batch be exact.
    """
    with LLM(host_offload="always", reentry=reentry, max_num_batched_tokens=32) as llm:
        batch = Background(llm, BATCH, LONG, "best_effort")
        wait_until(lambda: llm.stats()["num_lane_tokens"] >= len(BATCH), "lanes decode")
        with stopped(llm.stats()["host_pid"]):
            chat = Background(llm, CHAT, SHORT, "latency_sensitive")
            finished = chat.join(timeout_s=20.0 if reentry == "wait" else PATIENCE_S)
            if finished:
                before = llm.stats()
                assert len(chat.outputs) == len(CHAT)
                more = llm.generate(CHAT[:1], SHORT)
                after = llm.stats()
                assert after["num_lane_tokens"] == before["num_lane_tokens"], "a frozen host yields nothing"
                assert after["requests"]["lane"] == len(BATCH)
                assert_exact(reference, more)
        assert chat.join()
        assert batch.join()
        stats = llm.stats()
        assert_exact(reference, chat.outputs + batch.outputs)
        assert (stats["device_wait_s"] > 0) == (reentry == "wait")
        assert [o.metrics.num_lane_tokens for o in batch.outputs] == [LONG.max_tokens - 1] * len(BATCH)
        return finished


@pytest.mark.parametrize("reentry", ["same_iteration", "next_iteration"])
def test_chat_goes_on_token_exact_while_the_host_is_stopped(reentry: str, reference: Reference) -> None:
    assert frozen_host(reentry, reference)


def test_the_synchronous_rule_fails_where_ours_goes_on(reference: Reference) -> None:
    assert not frozen_host("wait", reference)


def test_a_killed_host_costs_lanes_a_prefill_and_chat_nothing(reference: Reference) -> None:
    with LLM(host_offload="always", max_num_batched_tokens=32) as llm:
        batch = Background(llm, BATCH, LONG, "best_effort")
        chat = Background(llm, CHAT, LONG, "latency_sensitive")
        wait_until(lambda: llm.stats()["num_lane_tokens"] >= len(BATCH), "lanes decode")
        host_pid = llm.stats()["host_pid"]
        os.kill(host_pid, signal.SIGKILL)
        assert chat.join()
        assert batch.join()
        stats = llm.stats()
        assert_exact(reference, chat.outputs + batch.outputs)
        assert stats["host_deaths"] == 1
        assert stats["num_dropped"] >= 1
        assert stats["host_pid"] != host_pid
        assert stats["device_wait_s"] == 0.0
        pages = stats["pages"]
        assert pages["device_free"] == pages["device_total"]


def test_a_killed_engine_is_an_error_for_every_caller_and_takes_its_host_along() -> None:
    llm = LLM(host_offload="always")
    try:
        callers = [
            Background(
                llm, [text], SamplingParams(temperature=0.0, max_tokens=2000, ignore_eos=True), "best_effort"
            )
            for text in BATCH
        ]
        wait_until(lambda: all(c.num_tokens > 0 for c in callers), "every caller has a token")
        host_pid = llm.stats()["host_pid"]
        os.kill(llm.engine_pid, signal.SIGKILL)
        for caller in callers:
            assert caller.join(), "a caller hangs"
            assert isinstance(caller.error, EngineDeadError)
        with pytest.raises(EngineDeadError, match="killed by signal 9"):
            llm.generate(CHAT[0])
        with pytest.raises(EngineDeadError):
            llm.stats()
        wait_until(lambda: not alive(host_pid), "the host ends with its engine")
    finally:
        llm.close()


def test_closing_ends_both_processes_and_tells_who_still_waits() -> None:
    llm = LLM(host_offload="always")
    caller = Background(
        llm, BATCH[:1], SamplingParams(temperature=0.0, max_tokens=2000, ignore_eos=True), "best_effort"
    )
    wait_until(lambda: caller.num_tokens > 0, "the first token")
    pids = [llm.engine_pid, llm.stats()["host_pid"]]
    llm.close()
    assert caller.join()
    assert isinstance(caller.error, EngineDeadError)
    wait_until(lambda: not any(alive(p) for p in pids), "both processes end")


def test_a_killed_caller_leaves_no_process_behind() -> None:
    code = (
        "import time\nfrom omniserve import LLM\nllm = LLM(host_offload='always')\n"
        "print(llm.engine_pid, llm.stats()['host_pid'], flush=True)\ntime.sleep(600)\n"
    )
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert caller.stdout is not None
    pids = [int(p) for p in caller.stdout.readline().split()]
    assert len(pids) == 2
    caller.kill()
    caller.wait()
    caller.stdout.close()
    wait_until(lambda: not any(alive(p) for p in pids), "engine and host end")


def test_processes_carry_titles() -> None:
    with LLM(host_offload="always") as llm:
        wait_until(lambda: llm.stats()["host_state"] == "ready", "the host is up")
        titles = [
            Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
            for pid in (llm.engine_pid, llm.stats()["host_pid"])
        ]
    assert titles == ["omniserve: engine", "omniserve: host"]


def test_leaving_the_iterator_frees_pages_and_slot() -> None:
    async def scenario() -> None:
        llm = AsyncLLM(host_offload="always")
        try:
            stream = llm.submit(
                BATCH[0], SamplingParams(temperature=0.0, max_tokens=2000, ignore_eos=True), "best_effort"
            )
            seen = 0
            async for _ in stream:
                seen += 1
                if seen == 3:
                    break
            await stream.aclose()  # type: ignore[attr-defined]
            while True:
                stats = await llm.stats()
                if (
                    not any(stats["requests"].values())
                    and stats["pages"]["host_free"] == stats["pages"]["host_total"]
                ):
                    break
                await asyncio.sleep(0.02)
            assert stats["pages"]["device_free"] == stats["pages"]["device_total"]
        finally:
            llm.close()

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S))
