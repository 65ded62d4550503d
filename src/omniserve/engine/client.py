"""EngineClient: starts the engine process and talks to it, from any thread and any event loop."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Container, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omniserve import errors
from omniserve.config import EngineConfig
from omniserve.engine.acceptance import Acceptance
from omniserve.engine.messages import (
    Abort,
    Add,
    Alive,
    Answer,
    AskAdmission,
    AskExplanations,
    AskStats,
    Failed,
    FromEngine,
    MessageBuffer,
    Ready,
    Refused,
    Start,
    Token,
    Tokens,
    from_engine_decoder,
    pack,
)
from omniserve.engine.outbox import Outbox
from omniserve.types import SLO, SamplingParams

Listener = Callable[[Token | Exception], None]
# How long a closing engine may take to end by itself before it is killed.
CLOSE_TIMEOUT_S = 5.0
# An interpreter on a busy machine may take so long until it gives its first sign of life.
FIRST_SIGN_S = 60.0
SILENT_SLICES = 4


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the engine said when it came up."""

    acceptance: Acceptance
    startup_s: float


def _refusal(message: Refused) -> errors.RequestError:
    if message.predicted_ttft_s is None or message.target_ttft_s is None:
        return errors.RequestError(message.field, message.message)
    return errors.SloUnattainableError(message.message, message.predicted_ttft_s, message.target_ttft_s)


def first_ones_first(tokens: Sequence[Token], unheard: Container[int]) -> list[Token]:
    """Tokens of one walk; those of requests that have none yet come before the others.

    Somebody waits for a first token. Who has had tokens can read them meanwhile, and a walk brings many.
    """
    return sorted(tokens, key=lambda token: token.request_id not in unheard)


class EngineClient:
    """One engine process. A reader thread always reads, so a slow caller never stalls the engine.

    Listeners are called on the reader thread with each token, or once with an exception. `death` is set when
    the process has ended, or was told to.
    """

    def __init__(self, config: EngineConfig, path: Path, hang_timeout_s: float | None = None) -> None:
        """Start the engine and wait until it is up; raises ConfigError, ModelError or EngineDeadError.

        hang_timeout_s: an engine that gives no sign of life for so long is killed; None: never.
        """
        self._hang_timeout_s = hang_timeout_s
        self._heard_s: float | None = None
        self._socket, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "omniserve.engine.process", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            # torch's own threads must not spin on the device's cores while its team works there.
            env={"OMP_WAIT_POLICY": "PASSIVE"} | os.environ,
        )
        theirs.close()
        self._lock = threading.Lock()
        self._outbox = Outbox(self._socket)
        self._ids = itertools.count()
        self._listeners: dict[int, Listener] = {}
        self._unheard: set[int] = set()  # requests without a token
        self._answers: dict[int, Future[dict[str, Any]]] = {}
        self._started: Future[EngineInfo] = Future()
        self._death: Exception | None = None
        self.death: Future[str] = Future()
        self._is_closing = self._was_hung = False
        self._reader = threading.Thread(target=self._read, name="omniserve-reader", daemon=True)
        self._reader.start()
        self._send(pack(Start(config, str(path))))
        try:
            self.info = self._started.result()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def silent_s(self) -> float:
        """Seconds since the last sign of life, of which there is one every second."""
        return 0.0 if self._heard_s is None else time.monotonic() - self._heard_s

    # ------------------------------------------------------------ calls

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        service_class: str,
        listener: Listener,
        bad_words: Sequence[Sequence[int]] = (),
        cache_salt: str | None = None,
        slo: SLO | None = None,
        arrived_s: float | None = None,
        completion_window_s: float | None = None,
        priority: int = 0,
    ) -> int:
        """Submit one text; `listener` hears its tokens until one carries a finish reason."""
        request_id = next(self._ids)
        message = pack(
            Add(
                request_id,
                list(prompt),
                params,
                service_class,
                [list(word) for word in bad_words],
                cache_salt,
                slo,
                arrived_s,
                completion_window_s,
                priority,
            )
        )
        with self._lock:
            self._raise_if_dead()
            self._listeners[request_id] = listener
            self._unheard.add(request_id)
        self._send(message)
        return request_id

    def abort(self, request_id: int) -> None:
        """Forget a request; its listener hears nothing more. Unknown and finished ids are ignored."""
        with self._lock:
            self._unheard.discard(request_id)
            is_running = self._listeners.pop(request_id, None) is not None and self._death is None
        if is_running:
            self._send(pack(Abort(request_id)))

    def stats(self) -> Future[dict[str, Any]]:
        """The engine's statistics, as soon as it answers."""
        return self._ask(lambda question_id: AskStats(question_id))

    def explain(self) -> Future[dict[str, Any]]:
        """Why the engine's last plans are as they are, and its last refusals, as soon as it answers."""
        return self._ask(lambda question_id: AskExplanations(question_id))

    def foresee(
        self,
        num_prompt: int,
        max_tokens: int | None,
        service_class: str,
        slo: SLO | None,
        arrived_s: float | None,
        priority: int,
    ) -> Future[dict[str, Any]]:
        """Why a request of at least `num_prompt` tokens would be refused: fields of SloUnattainableError, or
        nothing."""
        asked = num_prompt, max_tokens, service_class, slo, arrived_s, priority
        return self._ask(lambda question_id: AskAdmission(question_id, *asked))

    def _ask(
        self, question: Callable[[int], AskStats | AskExplanations | AskAdmission]
    ) -> Future[dict[str, Any]]:
        answer: Future[dict[str, Any]] = Future()
        question_id = next(self._ids)
        with self._lock:
            self._raise_if_dead()
            self._answers[question_id] = answer
        self._send(pack(question(question_id)))
        return answer

    def close(self) -> None:
        """End the engine and its host; callers still waiting get EngineDeadError."""
        self._is_closing = True
        with contextlib.suppress(OSError):  # the other end may be gone already
            self._socket.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(timeout=CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._outbox.close()
        if threading.current_thread() is not self._reader:
            self._reader.join()
        self._socket.close()

    def _raise_if_dead(self) -> None:
        if self._death is not None:
            raise errors.EngineGoneBeforeError(str(self._death))

    def _send(self, message: bytes) -> None:
        self._outbox.put(message)  # the reader thread tells everybody of the end

    # ------------------------------------------------------------ reader thread

    def _read(self) -> None:
        buffer = MessageBuffer()
        try:
            while data := self._receive():
                for body in buffer.feed(data):
                    self._heed(from_engine_decoder.decode(body))
        finally:
            self._die()

    def _receive(self) -> bytes:
        """What the engine sends next; empty when it has ended, if need be by our hand."""
        self._wait_for_input()
        try:
            data = self._socket.recv(1 << 20)
        except OSError:
            return b""
        self._heard_s = time.monotonic()
        return data

    def _wait_for_input(self) -> None:
        """Kill an engine that is silent for too long.

        Its silence is measured in slices: when this process was stopped along with the engine, only one of
        them seems silent.
        """
        if self._hang_timeout_s is None:
            return
        limit_s = self._hang_timeout_s
        if self._heard_s is None:
            limit_s = max(limit_s, FIRST_SIGN_S)
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        for _ in range(SILENT_SLICES):
            if poll.poll(1000 * limit_s / SILENT_SLICES):
                return
        self._was_hung = True
        self._process.kill()

    def _heed(self, message: FromEngine) -> None:
        match message:
            case Tokens(tokens=tokens):
                ordered = first_ones_first(tokens, self._unheard)
                self._tell([(t.request_id, t, t.finish_reason is not None) for t in ordered])
            case Refused(request_id=request_id):
                self._tell([(request_id, _refusal(message), True)])
            case Answer(question_id=question_id, answer=found):
                with self._lock:
                    answer = self._answers.pop(question_id)
                if answer.set_running_or_notify_cancel():
                    answer.set_result(found)
            case Ready(acceptance=acceptance, startup_s=startup_s):
                self._started.set_result(EngineInfo(acceptance, startup_s))
            case Alive():
                pass
            case Failed(kind=kind, message=text):
                self._death = getattr(errors, kind)(text)

    def _tell(self, news: Sequence[tuple[int, Token | Exception, bool]]) -> None:
        """Hand out news of requests, in order. True: it is the request's last."""
        with self._lock:
            self._unheard.difference_update(request_id for request_id, _, _ in news)
            listeners = [
                self._listeners.pop(request_id, None) if is_last else self._listeners.get(request_id)
                for request_id, _, is_last in news
            ]
        for listener, (request_id, item, _) in zip(listeners, news, strict=True):
            if listener is not None and not self._call(listener, item):
                self.abort(request_id)

    @staticmethod
    def _call(listener: Listener, news: Token | Exception) -> bool:
        """Call a listener; False when nobody listens there anymore (its event loop is closed)."""
        try:
            listener(news)
        except RuntimeError:
            return False
        return True

    def _die(self) -> None:
        """The engine is gone: say so to everybody who waits."""
        with self._lock:
            if self._death is None:
                self._death = errors.EngineDeadError(self._obituary())
            death = self._death
            listeners, self._listeners = list(self._listeners.values()), {}
            answers, self._answers = list(self._answers.values()), {}
        for listener in listeners:
            self._call(listener, errors.EngineDeadError(str(death)))
        for answer in answers:
            if answer.set_running_or_notify_cancel():
                answer.set_exception(errors.EngineDeadError(str(death)))
        if not self._started.done():
            self._started.set_exception(death)
        self.death.set_result(str(death))

    def _obituary(self) -> str:
        if self._is_closing:
            return "the engine was closed"
        if self._was_hung:
            return (
                f"the engine process (pid {self._process.pid}) gave no sign of life for "
                f"{self._hang_timeout_s:g} s and was killed; its requests are lost, start it again"
            )
        try:
            status = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "the engine closed its connection"
        how = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
        return f"the engine process (pid {self._process.pid}) {how}; its requests are lost, start it again"
