"""An engine in a process of its own, spoken to over the protocol of `peer_engines.py`."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from omniserve.bench import peer_engines
from omniserve.bench.measure import tree_busy_s

START_LIMIT_S = 600.0  # until the first token: vLLM compiles
ANSWER_LIMIT_S = 900.0
END_LIMIT_S = 20.0


class PeerError(Exception):
    """A peer that cannot be installed, does not start or does not answer; one line that says why."""


class PeerProcess:
    """One engine, up after construction, and stopped but while it answers: the threads of some spin on for
    seconds after an answer, on the cores of whoever is measured next.

    `startup_s`: seconds from the start of the process until a first token had come back. `version`: that of
    the engine. Everything may raise PeerError; what the process prints goes to `log`. A context manager.
    """

    def __init__(self, python: Path, settings: Mapping[str, Any], log: Path) -> None:
        self.name = str(settings["engine"])
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        # -P: the folder of peer_engines.py is no place to import from. A session of its own: all that the
        # engine starts ends with it.
        command = [str(python), "-P", peer_engines.__file__, json.dumps(dict(settings))]
        # Threads are a setting; a number from outside would stand beside it.
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {
            "HF_HUB_OFFLINE": "1"
        }
        began_s = time.perf_counter()
        with log.open("w") as stderr:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    text=True,
                    env=environment,
                    start_new_session=True,
                )
            except OSError as error:
                raise PeerError(f"{self.name} does not start: {error}") from error
        try:
            self.version: str = self._receive(START_LIMIT_S)["version"]
        except BaseException:
            self.close()
            raise
        self.startup_s = time.perf_counter() - began_s
        self._signal(signal.SIGSTOP)

    def generate(self, prompts: list[list[int]], max_tokens: int) -> tuple[float, list[list[int]]]:
        """Seconds it took, and `max_tokens` tokens for each prompt; PeerError if there are more or fewer."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            with contextlib.suppress(BrokenPipeError):  # `_receive` says what the process died of
                self._process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}) + "\n")
                self._process.stdin.flush()
            answer = self._receive(ANSWER_LIMIT_S)
        finally:
            self._signal(signal.SIGSTOP)
        outputs: list[list[int]] = answer["outputs"]
        lengths = [len(output) for output in outputs]
        if lengths != [max_tokens] * len(prompts):
            raise PeerError(
                f"{self.name} made {sum(lengths)} tokens for {len(prompts)} prompts, "
                f"{max_tokens} asked for each"
            )
        return float(answer["seconds"]), outputs

    def busy_s(self) -> float:
        """CPU seconds of the process and all its descendants so far."""
        return tree_busy_s(self._process.pid)

    def close(self) -> None:
        """End the process and all it started."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_LIMIT_S)
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()

    def _signal(self, number: signal.Signals) -> None:
        """To the process and all it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _receive(self, limit_s: float) -> dict[str, Any]:
        """The next message. A message is written at once, so whatever can be read is followed by its end."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], limit_s)[0]:
            raise PeerError(f"{self.name} has not answered for {limit_s:.0f} s; see {self._log}")
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"{self.name} ended: {last_line(self._log.read_text())} (see {self._log})")
        message: dict[str, Any] = json.loads(line)
        return message


def last_line(text: str) -> str:
    """The last line that says something; what a traceback or pip ends with."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"
