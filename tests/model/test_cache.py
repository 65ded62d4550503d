"""A cached folder is whole or it is made again; two makers at once make it once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from omniserve.model.cache import MANIFEST, VERIFIED, cache_root, ensure_folder, is_intact

SOURCE = {"version": "1"}


class Builder:
    """Writes two files and counts how often it was asked to."""

    def __init__(self) -> None:
        self.num_builds = 0

    def __call__(self, folder: Path) -> None:
        self.num_builds += 1
        (folder / "a.txt").write_text("alpha")
        (folder / "b.txt").write_text("beta")


@pytest.fixture
def build() -> Builder:
    return Builder()


@pytest.fixture
def folder(tmp_path: Path, build: Builder) -> Path:
    """A folder built once."""
    return ensure_folder(tmp_path / "cache" / "thing", SOURCE, build)


def test_an_intact_folder_is_built_once(folder: Path, build: Builder) -> None:
    ensure_folder(folder, SOURCE, build)
    ensure_folder(folder, SOURCE, build, full_check=True)
    assert build.num_builds == 1
    assert [p.name for p in folder.parent.iterdir() if p.is_dir()] == ["thing"]


def remove_file(folder: Path) -> None:
    (folder / "a.txt").unlink()


def cut_file(folder: Path) -> None:
    (folder / "a.txt").write_text("alp")


def change_content_keeping_the_size(folder: Path) -> None:
    (folder / "a.txt").write_text("ALPHA")
    os.utime(folder / "a.txt", (1, 1))


def remove_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def cut_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:-20])


@pytest.mark.parametrize(
    "breakage", [remove_file, cut_file, change_content_keeping_the_size, remove_manifest, cut_manifest]
)
def test_a_broken_folder_is_made_again(
    folder: Path, build: Builder, breakage: Callable[[Path], None]
) -> None:
    breakage(folder)
    assert not is_intact(folder, SOURCE)
    ensure_folder(folder, SOURCE, build)
    assert build.num_builds == 2
    assert (folder / "a.txt").read_text() == "alpha"
    assert is_intact(folder, SOURCE, full_check=True)


def test_a_silent_change_is_found_by_the_full_check(folder: Path) -> None:
    times = (folder / "a.txt").stat()
    (folder / "a.txt").write_text("ALPHA")
    os.utime(folder / "a.txt", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert is_intact(folder, SOURCE)
    assert not is_intact(folder, SOURCE, full_check=True)


def test_a_touched_file_is_compared_and_remembered(folder: Path, build: Builder) -> None:
    os.utime(folder / "a.txt", (1, 1))
    before = (folder / VERIFIED).read_text()
    ensure_folder(folder, SOURCE, build)
    assert build.num_builds == 1
    assert (folder / VERIFIED).read_text() != before


def test_another_source_means_another_build(folder: Path, build: Builder) -> None:
    ensure_folder(folder, {"version": "2"}, build)
    assert build.num_builds == 2


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "a.txt").write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        ensure_folder(tmp_path / "thing", SOURCE, fail)
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == []


def test_leftovers_of_a_crash_are_removed(tmp_path: Path, build: Builder) -> None:
    leftover = tmp_path / ".thing.4711.new"
    leftover.mkdir()
    ensure_folder(tmp_path / "thing", SOURCE, build)
    assert not leftover.exists()


def test_open_files_survive_a_rebuild(folder: Path, build: Builder) -> None:
    with (folder / "b.txt").open() as reader:
        remove_file(folder)
        ensure_folder(folder, SOURCE, build)
        assert reader.read() == "beta"


def test_two_processes_build_once(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from omniserve.model.cache import ensure_folder
def build(folder):
    with open({str(tmp_path / "log")!r}, "a") as log:
        log.write("built\\n")
    (folder / "a.bin").write_bytes(bytes(10_000_000))
ensure_folder(Path({str(tmp_path / "thing")!r}), {{"version": "1"}}, build)
"""
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [process.wait(timeout=60) for process in processes] == [0] * 4
    assert (tmp_path / "log").read_text() == "built\n"
    assert is_intact(tmp_path / "thing", SOURCE, full_check=True)


def test_the_environment_moves_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OMNISERVE_CACHE", str(tmp_path / "elsewhere"))
    assert cache_root() == tmp_path / "elsewhere"
    monkeypatch.delenv("OMNISERVE_CACHE")
    assert cache_root() == Path.home() / ".cache" / "omniserve"
