"""Why batch storage refused something. The HTTP side turns each of these into one status code."""

from __future__ import annotations

import errno
import os
import sqlite3

from omniserve.errors import OmniServeError, RequestError

# Conditions of the disk, as SQLite names them; any other SQLite error is a fault of ours and is not caught.
_FULL = ("SQLITE_FULL",)
_DISK = (*_FULL, "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)


class StateError(OmniServeError):
    """The state directory cannot be used: another writer has it, its version is newer, or it is damaged."""


class StorageError(OmniServeError):
    """The disk did not take a write; nothing of it counts. `is_full`: for want of space."""

    def __init__(self, message: str, is_full: bool) -> None:
        super().__init__(message)
        self.is_full = is_full


class NoDescriptorError(StorageError):
    """The process, or the machine, has too many files open; the disk is well. Nothing of the write counts."""

    def __init__(self, cause: Exception) -> None:
        message = f"too many files are open: {cause}; try again, and let the server have more (ulimit -n)"
        super().__init__(message, is_full=False)


class NotFoundError(RequestError):
    """No such object, or it belongs to another owner (which is not told apart)."""


class ConflictError(RequestError):
    """The object is in a state in which this cannot be done."""


class TooLargeError(RequestError):
    """An upload is larger than a file may be."""


class QuotaError(RequestError):
    """The owner has used up what it may keep."""


def storage_error(error: OSError | sqlite3.Error) -> StorageError | None:
    """What a failed write means for the caller; None when it is no condition of the disk."""
    if _is_for_want_of_descriptors(error):
        return NoDescriptorError(error)
    if isinstance(error, sqlite3.Error):
        name = getattr(error, "sqlite_errorname", "")
        if not name.startswith(_DISK):
            return None
        is_full = name.startswith(_FULL)
    else:
        is_full = error.errno in _NO_SPACE
    what = "the disk of the state directory is full" if is_full else "the state directory cannot be written"
    return StorageError(f"{what}: {error}; free space or repair it, then try again", is_full)


def _is_for_want_of_descriptors(error: OSError | sqlite3.Error) -> bool:
    """SQLite does not tell why it could not open a file, so that another one is tried."""
    if isinstance(error, OSError):
        return error.errno in _NO_DESCRIPTOR
    if not getattr(error, "sqlite_errorname", "").startswith("SQLITE_CANTOPEN"):
        return False
    try:
        os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as refusal:
        return refusal.errno in _NO_DESCRIPTOR
    return False
