"""Real `omniserve serve` processes for tests."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import httpx
import openai

PATIENCE_S = 120.0
KEY = "sk-test"
# Small, quick to start, and the same for all tests that do not need more.
SMALL = (
    *("--host-offload", "never", "--device-threads", "1", "--device-memory-bytes", str(64 * 1024**2)),
    "--no-pin-cpus",  # tests run side by side
)


class Served:
    """A server process, and what it wrote to standard error.

    program: the `omniserve` to run, if not that of this environment.
    """

    def __init__(
        self,
        *arguments: str,
        env: dict[str, str] | None = None,
        program: Sequence[str] = (sys.executable, "-m", "omniserve.cli"),
    ) -> None:
        command = [*program, "serve", "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
        self.lines: list[str] = []
        self.base_url = ""
        self._heard = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            found = re.search(r"listening on (http://\S+)", line)
            if found:
                self.base_url = found[1]
                self._heard.set()
        self._heard.set()

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def wait_listening(self) -> None:
        assert self._heard.wait(PATIENCE_S), self.log
        assert self.base_url, self.log

    def wait_ready(self) -> None:
        self.wait_listening()
        self.wait_until(lambda: self.get("/ready").status_code == 200, "the server is ready")

    def wait_until(self, condition: object, what: str) -> None:
        """Poll; only a hang can fail this."""
        assert callable(condition)
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, f"never happened: {what}\n{self.log}"
            time.sleep(0.02)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(self.base_url + path, headers=headers, timeout=PATIENCE_S)

    def post(self, path: str, json: object = None, **headers: str) -> httpx.Response:
        return httpx.post(self.base_url + path, json=json, headers=headers, timeout=PATIENCE_S)

    def post_raw(self, path: str, content: bytes | Iterator[bytes]) -> httpx.Response:
        headers = {"content-type": "application/json"}
        return httpx.post(self.base_url + path, content=content, headers=headers, timeout=PATIENCE_S)

    def client(self, key: str = KEY) -> openai.OpenAI:
        url = self.base_url + "/v1"
        return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=PATIENCE_S)

    def async_client(self, key: str = KEY) -> openai.AsyncOpenAI:
        url = self.base_url + "/v1"
        return openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=PATIENCE_S)

    def wait_ended(self) -> int:
        status = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return status

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextmanager
def serving(*arguments: str, env: dict[str, str] | None = None, ready: bool = True) -> Iterator[Served]:
    server = Served(*arguments, env=env)
    try:
        if ready:
            server.wait_ready()
        yield server
    finally:
        server.close()
