"""Folders in the cache that are whole or absent: built aside, checksummed, renamed, one builder at a time.

$OMNISERVE_CACHE (default ~/.cache/omniserve)
  models/<name>/            files, manifest.json (sha256 and size of each), verified.json (see `is_intact`)
  models/.<name>.lock       held while building
  models/.<name>.<pid>.*    a build under way, or what a crash left of one (removed by the next builder)
  downloads/                source archives
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
VERIFIED = "verified.json"


def cache_root() -> Path:
    """$OMNISERVE_CACHE, or ~/.cache/omniserve. Need not exist yet."""
    root = os.environ.get("OMNISERVE_CACHE")
    return Path(root).expanduser().absolute() if root else Path.home() / ".cache" / "omniserve"


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def ensure_folder(
    folder: Path, source: Mapping[str, str], build: Callable[[Path], None], *, full_check: bool = False
) -> Path:
    """`folder`, built by `build(temporary_folder)` when it is absent, broken or made from another `source`.

    `source` says what the content is made from (versions, hashes) and is kept in the manifest. Two processes
    may call this at once: one builds, the other waits. `full_check` recomputes every checksum.
    """
    if is_intact(folder, source, full_check=full_check):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / f".{folder.name}.lock"):
        if not is_intact(folder, source, full_check=full_check):
            _remove_leftovers(folder)
            _build(folder, source, build)
    return folder


def is_intact(folder: Path, source: Mapping[str, str], *, full_check: bool = False) -> bool:
    """Whether `folder` holds what its manifest says, made from `source`.

    Sizes are always compared. Checksums are compared when asked for, and when a file's size or modification
    time differs from those at the last comparison, kept in verified.json.
    """
    manifest = _read_object(folder / MANIFEST)
    if manifest is None or manifest.get("source") != dict(source):
        return False
    files = manifest.get("files")
    if not isinstance(files, dict):
        return False
    found = {name: _fingerprint(folder / name) for name in files}
    if any(print_ is None or print_["size"] != files[name]["size"] for name, print_ in found.items()):
        return False
    if not full_check and _read_object(folder / VERIFIED) == found:
        return True
    if any(sha256_of(folder / name) != entry["sha256"] for name, entry in files.items()):
        return False
    _remember(folder, found)
    return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on file `path` between processes; the kernel drops it when a holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(folder: Path, source: Mapping[str, str], build: Callable[[Path], None]) -> None:
    new = folder.parent / f".{folder.name}.{os.getpid()}.new"
    new.mkdir()
    try:
        build(new)
        names = sorted(path.name for path in new.iterdir())
        for name in names:
            # Some writers make private files; a cache may be shared.
            (new / name).chmod(0o644)
        files = {n: {"size": (new / n).stat().st_size, "sha256": sha256_of(new / n)} for n in names}
        _write_object(new / MANIFEST, {"source": dict(source), "files": files})
        _remember(new, {name: _fingerprint(new / name) for name in names})
        for path in (*new.iterdir(), new):
            _fsync(path)
        if folder.exists():
            # A folder cannot be replaced by a rename. Whoever has files of the old one open keeps them.
            folder.rename(folder.parent / f".{folder.name}.{os.getpid()}.old")
        new.rename(folder)
        _fsync(folder.parent)
    finally:
        _remove_leftovers(folder)


def _remove_leftovers(folder: Path) -> None:
    """Temporary folders of this process and of dead ones. The lock is held, so nobody is using them."""
    for pattern in (f".{folder.name}.*.new", f".{folder.name}.*.old"):
        for path in folder.parent.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _fingerprint(path: Path) -> dict[str, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _remember(folder: Path, found: Mapping[str, dict[str, int] | None]) -> None:
    """Best effort: in a cache that cannot be written, checksums are simply compared each time."""
    temporary = folder / f".{VERIFIED}.{os.getpid()}"
    try:
        _write_object(temporary, dict(found))
        temporary.replace(folder / VERIFIED)
    except OSError:
        temporary.unlink(missing_ok=True)


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _write_object(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
