"""Messages between a caller's process and the engine process: msgpack behind a length."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import msgspec

from omniserve.config import EngineConfig
from omniserve.engine.acceptance import Acceptance
from omniserve.types import SLO, FinishReason, SamplingParams, TokenLogprobs

_LENGTH = struct.Struct("!I")


class Start(msgspec.Struct, tag=True):
    """First message to the engine: settings and the checkpoint's folder."""

    config: EngineConfig
    path: str


class Add(msgspec.Struct, tag=True):
    """One text to generate. bad_words: those of the parameters as token ids.

    slo: targets of its own. arrived_s: when it arrived at the API (time.monotonic(), which processes of one
    machine share). completion_window_s: seconds from then in which a best-effort job should end. priority:
    within the class, lower goes first.
    """

    request_id: int
    prompt: list[int]
    params: SamplingParams
    service_class: str
    bad_words: list[list[int]] = []
    cache_salt: str | None = None
    slo: SLO | None = None
    arrived_s: float | None = None
    completion_window_s: float | None = None
    priority: int = 0


class Abort(msgspec.Struct, tag=True):
    request_id: int


class AskStats(msgspec.Struct, tag=True):
    question_id: int


class AskExplanations(msgspec.Struct, tag=True):
    question_id: int


class AskAdmission(msgspec.Struct, tag=True):
    """Would a request be refused for its targets whatever its prompt is? See Engine.check_arrival."""

    question_id: int
    num_prompt: int
    max_tokens: int | None
    service_class: str
    slo: SLO | None = None
    arrived_s: float | None = None
    priority: int = 0


class Ready(msgspec.Struct, tag=True):
    """The engine is up: what it accepts, and the seconds it took."""

    acceptance: Acceptance
    startup_s: float


class Alive(msgspec.Struct, tag=True):
    """A sign of life: the engine goes on, though it has nothing to tell."""


class Failed(msgspec.Struct, tag=True):
    """The engine ends. `kind` is the name of an error class of omniserve.errors."""

    kind: str
    message: str


class Refused(msgspec.Struct, tag=True):
    """A request is not served. The two times are there when it is its targets that could not be held."""

    request_id: int
    field: str
    message: str
    predicted_ttft_s: float | None = None
    target_ttft_s: float | None = None


class Token(msgspec.Struct, array_like=True):
    """One new token of a request; `finish_reason` is set on its last one.

    is_exact: neither from lossy KV nor from rounded weights. num_cached: prompt tokens found in the prefix
    cache. With the first token: prompt_logprobs, if asked for, and started_s, when the engine began with the
    prompt (time.monotonic()).
    """

    request_id: int
    token_id: int
    by_lane: bool = False
    finish_reason: FinishReason | None = None
    is_exact: bool = True
    num_cached: int = 0
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    started_s: float | None = None


class Tokens(msgspec.Struct, tag=True):
    tokens: list[Token]


class Answer(msgspec.Struct, tag=True):
    """To AskStats, AskExplanations or AskAdmission; to the last: empty, or the fields of Refused."""

    question_id: int
    answer: dict[str, Any]


ToEngine = Start | Add | Abort | AskStats | AskExplanations | AskAdmission
FromEngine = Ready | Alive | Failed | Refused | Tokens | Answer

_encoder = msgspec.msgpack.Encoder()
to_engine_decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def pack(message: ToEngine | FromEngine) -> bytes:
    """The bytes of one message: its length, then msgpack."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


class MessageBuffer:
    """Cuts a byte stream back into message bodies."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._bytes += data
        while len(self._bytes) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._bytes)
            end = _LENGTH.size + length
            if len(self._bytes) < end:
                return
            body = bytes(self._bytes[_LENGTH.size : end])
            del self._bytes[:end]
            yield body
