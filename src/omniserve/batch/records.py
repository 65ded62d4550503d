"""What the store knows about files, batches and lines: plain values."""

from __future__ import annotations

from dataclasses import dataclass, field

from omniserve.batch.states import Status


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A stored file. Times in seconds since the epoch."""

    seq: int
    id: str
    owner: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int | None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of finished lines."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input_tokens + other.input_tokens,
            self.cached_tokens + other.cached_tokens,
            self.output_tokens + other.output_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
        )


@dataclass(frozen=True, slots=True)
class LineError:
    """What is wrong with the input of a batch; `line` counts from 1, None: the file as a whole."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """A batch. Times in seconds since the epoch; `output_bytes`, `error_bytes`: what counts of its results.

    `output_file_id` and `error_file_id` are set aside from the beginning; they are files of the owner only
    when the batch has ended and something was written to them.
    """

    seq: int
    id: str
    owner: str
    endpoint: str
    input_file_id: str
    completion_window: str
    expires_at: int
    output_life_s: int | None
    metadata: dict[str, str] | None
    output_file_id: str
    error_file_id: str
    created_at: int
    status: Status = Status.VALIDATING
    ending: Status | None = None
    model: str | None = None
    errors: tuple[LineError, ...] = ()
    total: int = 0
    completed: int = 0
    failed: int = 0
    output_bytes: int = 0
    error_bytes: int = 0
    usage: Usage = field(default_factory=Usage)
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    ended_at: int | None = None

    @property
    def num_left(self) -> int:
        """Lines that have no result yet."""
        return self.total - self.completed - self.failed

    @property
    def has_ended(self) -> bool:
        return self.ended_at is not None


@dataclass(frozen=True, slots=True)
class NewBatch:
    """What its owner asks for, checked."""

    endpoint: str
    input_file_id: str
    completion_window: str
    window_s: int
    metadata: dict[str, str] | None = None
    output_life_s: int | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """One line of an input; `number` counts from 1, `raw` is its JSON.

    num_deaths: engines that died while they had it.
    """

    number: int
    raw: bytes
    num_deaths: int = 0


@dataclass(frozen=True, slots=True)
class LineResult:
    """The one result of a line: `data` is its whole result line, newline included."""

    number: int
    data: bytes
    is_success: bool
    usage: Usage = field(default_factory=Usage)
