"""Real server processes: an engine that is killed, a stop in good order, batches beside chats."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import sys
from pathlib import Path

import openai
import pytest

from server.processes import SMALL, Served, serving

pytestmark = pytest.mark.slow

NUM_DROPPED = 1000
HELLO = [{"role": "user", "content": "Hello"}]


def engine_pids(server: Served) -> list[int]:
    return [int(pid) for pid in re.findall(r"engine is up after .* \(pid (\d+)\)", server.log)]


def test_an_engine_that_is_killed_takes_nothing_with_it_but_its_requests(tiny_model: Path) -> None:
    async def story(server: Served) -> None:
        async with server.async_client() as client:
            asked = {
                "model": "tiny",
                "messages": HELLO,
                "max_tokens": 400,
                "extra_body": {"ignore_eos": True},
            }
            (pid,) = engine_pids(server)
            os.kill(pid, signal.SIGSTOP)
            running = [asyncio.create_task(client.chat.completions.create(**asked)) for _ in range(3)]
            await asyncio.sleep(0.2)
            os.kill(pid, signal.SIGKILL)
            for task in running:
                with pytest.raises(openai.InternalServerError) as caught:
                    await task
                assert (caught.value.status_code, caught.value.code) == (503, "engine_unavailable")
            server.wait_until(lambda: server.get("/ready").status_code == 200, "another engine")
            answer = await client.chat.completions.create(**asked)
            assert answer.usage.completion_tokens == 400
            assert len(engine_pids(server)) == 2

    with serving(str(tiny_model), "--served-model-name", "tiny", *SMALL) as server:
        asyncio.run(story(server))


def test_an_engine_that_hangs_is_killed_and_started_again_and_the_server_answers_meanwhile(
    tiny_model: Path,
) -> None:
    prompts = [[7] * 500] * 256  # more than a socket holds: an engine that does not read is no trouble

    async def story(server: Served) -> None:
        async with server.async_client() as client:
            (pid,) = engine_pids(server)
            os.kill(pid, signal.SIGSTOP)
            asked = [
                asyncio.create_task(client.completions.create(model="tiny", prompt=prompts, max_tokens=2))
                for _ in range(3)
            ]
            server.wait_until(lambda: server.get("/ready").status_code == 503, "it is not ready")
            assert server.get("/health").status_code == 200
            assert server.get("/ready").json()["status"] in ("unresponsive", "restarting")
            for task in asked:
                with pytest.raises(openai.InternalServerError) as caught:
                    await task
                assert caught.value.code == "engine_unavailable"
            server.wait_until(lambda: server.get("/ready").status_code == 200, "another engine")
            assert (await client.completions.create(model="tiny", prompt="Hello", max_tokens=2)).usage
            assert len(engine_pids(server)) == 2
            assert "gave no sign of life for 8 s and was killed" in server.log

    hang = ("--engine-hang-timeout", "8")
    with serving(str(tiny_model), "--served-model-name", "tiny", *hang, *SMALL) as server:
        asyncio.run(story(server))


def test_a_server_answers_while_it_loads_and_stops_in_good_order(tiny_model: Path) -> None:
    with serving(str(tiny_model), *SMALL, ready=False) as server:
        server.wait_listening()
        assert server.get("/health").status_code == 200
        early = server.get("/ready")
        assert (early.status_code, early.json()["status"]) in ((503, "loading"), (200, "ready"))
        server.wait_ready()
        (pid,) = engine_pids(server)
        assert server.get("/v1/models").json()["data"][0]["id"] == tiny_model.name
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_ended() == 0, server.log
        assert not Path(f"/proc/{pid}").exists(), "the engine is gone too"
        assert "Traceback" not in server.log


def test_a_sigterm_to_every_process_lets_chats_end(tiny_model: Path) -> None:
    """As supervisors send it that know no main process, and a `kill` of the process group does."""
    long = {"model": "tiny", "messages": HELLO, "max_tokens": 480, "extra_body": {"ignore_eos": True}}
    sizes = ("--device-memory-bytes", str(64 * 1024**2), "--host-memory-bytes", str(64 * 1024**2))
    threads = ("--device-threads", "1", "--host-threads", "1")

    async def story(server: Served) -> None:
        async with server.async_client() as client:
            stream = await client.chat.completions.create(**long, stream=True)  # type: ignore[call-overload]
            await anext(stream)
            (engine,) = engine_pids(server)
            host = server.get("/admin/stats").json()["host_pid"]
            for pid in (host, engine, server.process.pid):
                os.kill(pid, signal.SIGTERM)
            reasons = [chunk.choices[0].finish_reason async for chunk in stream]
            assert reasons[-1] == "length"
        assert server.wait_ended() == 0, server.log
        assert "starting it again" not in server.log
        assert not any(Path(f"/proc/{pid}").exists() for pid in (engine, host))

    with serving(str(tiny_model), "--served-model-name", "tiny", *sizes, *threads) as server:
        server.wait_until(
            lambda: server.get("/admin/stats").json()["host_state"] == "ready", "the host is up"
        )
        asyncio.run(story(server))


def test_a_server_takes_as_many_connections_as_the_system_lets_it(tiny_model: Path) -> None:
    low = ("bash", "-c", 'ulimit -Sn 128; exec "$0" -m omniserve.cli "$@"', sys.executable)
    server = Served(str(tiny_model), *SMALL, program=low)
    try:
        server.wait_listening()
        limits = Path(f"/proc/{server.process.pid}/limits").read_text()
        (found,) = re.findall(r"Max open files +(\S+) +(\S+)", limits)
        assert found[0] == found[1] != "128"
    finally:
        server.close()


def test_what_keeps_a_server_from_starting_is_one_line(tiny_model: Path) -> None:
    with serving("no/such-model", ready=False) as server:
        assert server.wait_ended() == 1
        assert "no/such-model" in server.lines[-1]
        assert "Traceback" not in server.log
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with serving(str(tiny_model), *SMALL, "--port", port, ready=False) as server:
            assert server.wait_ended() == 1
            assert "cannot listen" in server.lines[-1]


def test_a_batch_runs_beside_chats_over_the_same_endpoints(tiny_model: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    lines = [
        {"custom_id": "good", "method": "POST", "url": "/v1/chat/completions",
         "body": {"model": "tiny", "messages": HELLO, "max_tokens": 4, "temperature": 0}},
        {"custom_id": "bad", "method": "POST", "url": "/v1/chat/completions",
         "body": {"model": "tiny", "messages": HELLO, "tools": [{"type": "function"}]}},
    ]  # fmt: skip
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with serving(str(tiny_model), "--served-model-name", "tiny", "--state-dir", str(state), *SMALL) as server:
        with server.client() as client:
            file = client.files.create(file=("lines.jsonl", content), purpose="batch")
            batch = client.batches.create(
                input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
            )
            server.wait_until(
                lambda: client.batches.retrieve(batch.id).status == "completed", "the batch is through"
            )
            done = client.batches.retrieve(batch.id)
            assert (done.request_counts.completed, done.request_counts.failed) == (1, 1)
            good = json.loads(client.files.content(done.output_file_id).read())
            bad = json.loads(client.files.content(done.error_file_id).read())
            alone = client.chat.completions.create(**lines[0]["body"])  # type: ignore[call-overload]
        assert (
            good["response"]["body"]["choices"][0]["message"]["content"] == alone.choices[0].message.content
        )
        assert good["response"]["body"]["service_tier"] == "flex"
        assert bad["response"]["body"]["error"]["code"] == "unsupported_parameter"
        assert server.get("/v1/files/unknown").status_code == 404
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_ended() == 0, server.log


def test_connections_dropped_at_random_while_a_batch_runs_leave_nothing_behind(
    tiny_model: Path, tmp_path: Path
) -> None:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 40, "temperature": 0}
    url = "/v1/chat/completions"
    lines = [{"custom_id": str(i), "method": "POST", "url": url, "body": body} for i in range(100)]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    rng = random.Random(3)

    # Best-effort work decodes with host attention: its lanes have slots and host pages to give back.
    sizes = {name: str(64 * 1024**2) for name in ("--device-memory-bytes", "--host-memory-bytes")}
    with_lanes = ("--host-offload", "always", "--device-threads", "1", "--host-threads", "1")

    async def drop(server: Served, gate: asyncio.Semaphore) -> None:
        host, port = server.base_url.removeprefix("http://").split(":")
        how = {"max_tokens": 200, "stream": rng.random() < 0.7, "service_tier": rng.choice(("auto", "flex"))}
        sent = json.dumps(body | how).encode()
        head = f"POST {url} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(sent)}\r\n\r\n"
        async with gate:
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write((head.encode() + sent)[: rng.choice((20, 10_000, 10_000, 10_000))])
            await asyncio.sleep(rng.random() * 0.2)
            writer.transport.abort()

    async def drop_all(server: Served) -> None:
        gate = asyncio.Semaphore(64)
        await asyncio.gather(*(drop(server, gate) for _ in range(NUM_DROPPED)))

    def is_quiet() -> bool:
        stats = server.get("/admin/stats").json()
        pages, slots = stats["pages"], stats["slots"]
        is_free = all(pages[f"{side}_free"] == pages[f"{side}_total"] > 0 for side in ("device", "host"))
        held = ("device_incoming", "host_lanes", "host_mirrors", "host_retiring")
        is_free = is_free and not any(pages[name] for name in held) and slots["free"] == slots["total"] > 0
        inside = server.get("/admin/best_effort").json()
        return is_free and not any((*stats["requests"].values(), inside["num_requests"]))

    def num_descriptors(pid: int) -> int:
        return len(os.listdir(f"/proc/{pid}/fd"))

    arguments = (*with_lanes, *(one for item in sizes.items() for one in item))
    with serving(
        str(tiny_model), "--served-model-name", "tiny", "--state-dir", str(tmp_path / "s"), *arguments
    ) as server:
        with server.client() as client:
            alone = client.chat.completions.create(**body).choices[0].message.content
            flex = client.chat.completions.create(**body, service_tier="flex").choices[0].message.content
            assert flex == alone
            server.wait_until(is_quiet, "what its first requests held is given up")
            pids = (server.process.pid, *engine_pids(server))
            num_open = [num_descriptors(pid) for pid in pids]
            file = client.files.create(file=("lines.jsonl", content), purpose="batch")
            batch = client.batches.create(input_file_id=file.id, endpoint=url, completion_window="24h")
            asyncio.run(drop_all(server))
            server.wait_until(
                lambda: client.batches.retrieve(batch.id).status == "completed", "it is through"
            )
            done = client.batches.retrieve(batch.id)
            results = client.files.content(done.output_file_id).read().splitlines()
        texts = [json.loads(line)["response"]["body"]["choices"][0]["message"]["content"] for line in results]
        assert texts == [alone] * len(lines), "complete and right"
        server.wait_until(is_quiet, "every page, slot, lane and request is given up")
        assert server.get("/admin/stats").json()["num_lane_tokens"] > 100, "lanes there were"
        for pid, before in zip(pids, num_open, strict=True):
            server.wait_until(
                lambda pid=pid, before=before: num_descriptors(pid) <= before, "and every descriptor"
            )
        assert "Traceback" not in server.log
