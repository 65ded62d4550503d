"""Blobs: the bytes of files, under names that only we make. What is written counts once it is synced."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_FILE_ID = re.compile(r"file-[0-9a-f]{32}")


def new_id(prefix: str) -> str:
    """A name nobody can guess: the prefix and 32 hexadecimal digits."""
    return prefix + secrets.token_hex(16)


class Disk:
    """The system calls that durability rests on. Tests put failing ones in their place."""

    def write(self, descriptor: int, data: bytes, offset: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(descriptor, view, offset)
            view, offset = view[written:], offset + written

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def sync_folder(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def free_bytes(self, folder: Path) -> int:
        status = os.statvfs(folder)
        return status.f_bavail * status.f_frsize


@dataclass(slots=True)
class Incoming:
    """An upload on its way: bytes on disk that nobody was promised yet."""

    file_id: str
    path: Path
    descriptor: int
    disk: Disk
    num_bytes: int = 0

    @property
    def is_open(self) -> bool:
        return self.descriptor >= 0

    def write(self, data: bytes) -> None:
        self.disk.write(self.descriptor, data, self.num_bytes)
        self.num_bytes += len(data)

    def close(self) -> None:
        """Also after a failure; the bytes that lie there are removed unless they were kept."""
        if self.is_open:
            os.close(self.descriptor)
            self.descriptor = -1
        self.path.unlink(missing_ok=True)


class Blobs:
    """The folders `files` and `incoming` of a state directory."""

    def __init__(self, root: Path, disk: Disk) -> None:
        self.folder, self._incoming, self._disk = root / "files", root / "incoming", disk
        for folder in (self.folder, self._incoming):
            folder.mkdir(mode=0o700, exist_ok=True)
        disk.sync_folder(root)

    def path(self, file_id: str) -> Path:
        """Where a file's bytes are. Only names of our own making get here; anything else is a fault."""
        if not _FILE_ID.fullmatch(file_id):
            raise ValueError(f"not a file id: {file_id!r}")
        return self.folder / file_id

    def begin(self) -> Incoming:
        file_id = new_id("file-")
        path = self._incoming / file_id
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        return Incoming(file_id, path, descriptor, self._disk)

    def keep(self, incoming: Incoming) -> None:
        """Give a synced upload its place; lasting when this returns."""
        place = self.path(incoming.file_id)
        os.rename(incoming.path, place)
        try:
            self._disk.sync_folder(self.folder)
        except OSError:
            os.rename(place, incoming.path)  # it is not accepted, and goes as others do
            raise

    def append(self, file_id: str, length: int, data: bytes) -> int:
        """Write `data` behind the first `length` bytes, those that count; returns the new length.

        Bytes that lie beyond `length` are of an attempt that was never recorded and go.
        """
        path = self.path(file_id)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            if size < length:
                # Damage from outside: the store opens anew and fails the batch (BatchStore.recover).
                raise OSError(errno.EIO, f"{path} holds {size} bytes, {length} were recorded")
            if size > length:
                os.ftruncate(descriptor, length)
            self._disk.write(descriptor, data, length)
            self._disk.sync(descriptor)
        finally:
            os.close(descriptor)
        if length == 0:  # its first bytes that count: its name must last too
            self._disk.sync_folder(self.folder)
        return length + len(data)

    def cut(self, file_id: str, length: int) -> None:
        """Drop bytes beyond the first `length`, left by an append that was never recorded."""
        path = self.path(file_id)
        if path.exists() and path.stat().st_size > length:
            os.truncate(path, length)

    def size(self, file_id: str) -> int | None:
        """Bytes there are; None when there is no such file."""
        try:
            return self.path(file_id).stat().st_size
        except FileNotFoundError:
            return None

    def open(self, file_id: str) -> BinaryIO:
        return self.path(file_id).open("rb")

    def remove(self, file_id: str) -> None:
        self.path(file_id).unlink(missing_ok=True)

    def ids(self) -> Iterator[str]:
        """Every file there is, whether it counts or not."""
        return (path.name for path in self.folder.iterdir() if _FILE_ID.fullmatch(path.name))

    def clear_incoming(self) -> None:
        """Uploads that a process left half-way when it died."""
        for path in self._incoming.iterdir():
            path.unlink()
