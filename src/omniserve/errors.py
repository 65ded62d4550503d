"""Every error a user can meet, as one small tree.

    OmniServeError
     +-- ConfigError     a setting is unknown, out of range or impossible on this machine
     +-- ModelError      a checkpoint is missing, broken or of an unsupported family
     +-- RequestError    one request is refused; nothing else is disturbed
     |    +-- SloUnattainableError  its targets, or those of others, could not be held; try again later
     +-- EngineDeadError the engine process is gone; every waiting caller gets this
          +-- EngineGoneBeforeError  it was gone when the call came

Messages name the field, the limit and the way out.
"""

from __future__ import annotations


class OmniServeError(Exception):
    """Base of all errors raised on purpose by this package."""


class ConfigError(OmniServeError):
    """A setting is unknown, out of range, or cannot be met on this machine."""


class ModelError(OmniServeError):
    """A checkpoint is missing, broken, or of a family that is not supported."""


class RequestError(OmniServeError, ValueError):
    """One request is refused. `field` names the offending parameter, `reason` the limit and the way out."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.reason = message


class SloUnattainableError(RequestError):
    """A latency-sensitive request is refused at its arrival; it, or others beside it, would miss their
    targets.

    predicted_ttft_s, target_ttft_s: seconds from arrival to the first token, as predicted and as asked for.
    """

    def __init__(self, message: str, predicted_ttft_s: float, target_ttft_s: float) -> None:
        super().__init__("slo", message)
        self.predicted_ttft_s = predicted_ttft_s
        self.target_ttft_s = target_ttft_s


class EngineDeadError(OmniServeError):
    """The engine process has ended; requests in flight are lost to this caller."""


class EngineGoneBeforeError(EngineDeadError):
    """The engine process had ended before the request came to it, so that the request had no part in it."""
