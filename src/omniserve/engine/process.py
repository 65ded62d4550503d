"""The engine process: `python -m omniserve.engine.process SOCKET_FD`, a loop around Engine.

Commands come in and tokens go out through one socket. Its closing means that nobody is left to serve.
"""

from __future__ import annotations

import logging
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import setproctitle

from omniserve.engine.loop import Engine, StepOutput
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
    ToEngine,
    Token,
    Tokens,
    pack,
    to_engine_decoder,
)
from omniserve.engine.pulse import Pulse
from omniserve.engine.records import ChosenToken
from omniserve.errors import OmniServeError, RequestError, SloUnattainableError

logger = logging.getLogger("omniserve.engine")


class Channel:
    """The engine's end of the socket."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._buffer = MessageBuffer()
        self.is_closed = False

    def has_input(self) -> bool:
        readable, _, _ = select.select([self.socket], [], [], 0)
        return bool(readable)

    def send(self, message: FromEngine) -> None:
        """Send, or note that nobody is left to hear."""
        try:
            self.socket.sendall(pack(message))
        except (BrokenPipeError, ConnectionResetError):
            self.is_closed = True

    def send_sign(self) -> None:
        self.send(Alive())

    def receive(self) -> Iterator[ToEngine]:
        """Messages of one read; blocks when nothing has arrived."""
        try:
            data = self.socket.recv(1 << 20)
        except ConnectionResetError:
            data = b""
        self.is_closed = self.is_closed or not data
        for body in self._buffer.feed(data):
            try:
                yield to_engine_decoder.decode(body)
            except msgspec.ValidationError as error:
                self._refuse(body, error)

    def _refuse(self, body: bytes, error: Exception) -> None:
        """A message of the wrong shape is its sender's trouble alone."""
        request_id = msgspec.msgpack.decode(body).get("request_id")
        if request_id is None:
            raise error
        self.send(Refused(request_id, "request", str(error)))


class EngineLoop:
    """Feeds commands to an Engine and its tokens to the channel. Ids outside are the caller's own."""

    def __init__(self, engine: Engine, channel: Channel, pulse: Pulse | None = None) -> None:
        self.engine = engine
        self.channel = channel
        self._pulse = pulse or Pulse(channel.send_sign)
        self._engine_ids: dict[int, int] = {}
        self._caller_ids: dict[int, int] = {}

    def run(self) -> None:
        """Serve until the channel closes."""
        while not self.channel.is_closed:
            self._pulse.beat()
            while self.channel.has_input() and not self.channel.is_closed:
                for message in self.channel.receive():
                    self._heed(message)
            output = self.engine.step()
            self._send(output)
            if output.was_idle:
                self.engine.sleep([self.channel.socket.fileno()])

    def _heed(self, message: ToEngine) -> None:
        match message:
            case Add():
                self._add(message)
            case Abort(request_id=caller_id):
                engine_id = self._engine_ids.pop(caller_id, None)
                if engine_id is not None:
                    del self._caller_ids[engine_id]
                    self.engine.abort(engine_id)
            case AskStats(question_id=question_id):
                self.channel.send(Answer(question_id, self.engine.stats()))
            case AskExplanations(question_id=question_id):
                self.channel.send(Answer(question_id, self.engine.explain()))
            case AskAdmission():
                self.channel.send(self._foresee(message))
            case Start():
                raise AssertionError("an engine starts once")

    def _foresee(self, asked: AskAdmission) -> Answer:
        try:
            self.engine.check_arrival(
                asked.num_prompt,
                asked.max_tokens,
                asked.service_class,
                asked.slo,
                asked.arrived_s,
                asked.priority,
            )
        except SloUnattainableError as error:
            return Answer(
                asked.question_id,
                {
                    "message": error.reason,
                    "predicted_ttft_s": error.predicted_ttft_s,
                    "target_ttft_s": error.target_ttft_s,
                },
            )
        return Answer(asked.question_id, {})

    def _add(self, message: Add) -> None:
        try:
            engine_id = self.engine.add(
                message.prompt,
                message.params,
                message.service_class,
                message.bad_words,
                message.cache_salt,
                message.slo,
                message.arrived_s,
                message.completion_window_s,
                message.priority,
            )
        except SloUnattainableError as error:
            times = error.predicted_ttft_s, error.target_ttft_s
            self.channel.send(Refused(message.request_id, error.field, error.reason, *times))
            return
        except RequestError as error:
            self.channel.send(Refused(message.request_id, error.field, error.reason))
            return
        self._engine_ids[message.request_id] = engine_id
        self._caller_ids[engine_id] = message.request_id

    def _send(self, output: StepOutput) -> None:
        if not output.tokens:
            return
        tokens = []
        for token in output.tokens:
            caller_id = self._caller_ids[token.request_id]
            is_exact = self.engine.is_exact(token.by_lane)
            num_cached = output.num_cached[token.request_id]
            new = Token(caller_id, token.token_id, token.by_lane, token.finish_reason, is_exact, num_cached)
            if isinstance(token, ChosenToken):
                new.logprobs, new.prompt_logprobs = token.logprobs, token.prompt_logprobs
            new.started_s = output.started_s.get(token.request_id)
            tokens.append(new)
            if token.finish_reason is not None:
                del self._engine_ids[caller_id], self._caller_ids[token.request_id]
        self.channel.send(Tokens(tokens))


def _start(channel: Channel, pulse: Pulse, began: float) -> Engine:
    (message,) = channel.receive()
    assert isinstance(message, Start)
    with pulse.by_itself():
        from omniserve.engine.build import load_engine  # torch, which takes its time

        engine = load_engine(message.config, Path(message.path), channel.has_input, pulse.beat)
    channel.send(Ready(engine.acceptance, time.monotonic() - began))
    return engine


def main(arguments: list[str]) -> int:
    began = time.monotonic()
    setproctitle.setproctitle("omniserve: engine")
    # Ctrl-C reaches the whole process group, the SIGTERM of many supervisors every process of a service; the
    # caller decides what they mean and closes the socket.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=int(arguments[0])))
    pulse = Pulse(channel.send_sign)
    engine: Engine | None = None
    try:
        engine = _start(channel, pulse, began)
        EngineLoop(engine, channel, pulse).run()
    except OmniServeError as error:
        channel.send(Failed(type(error).__name__, str(error)))
        return 1
    except Exception as error:
        logger.exception("the engine failed")
        channel.send(Failed("EngineDeadError", f"the engine failed: {type(error).__name__}: {error}"))
        return 1
    finally:
        if engine is not None:
            engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
