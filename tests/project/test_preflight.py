"""The preflight names everything that is missing in one line to copy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PREFLIGHT = Path(__file__).parents[2] / "scripts" / "preflight.sh"
TOOLS = ("bash", "df", "awk", "dirname", "head", "id", "env", "uname")


def run(path: Path, *arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(path), "PYTHON": python, "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(
        ["bash", str(PREFLIGHT), *arguments], env=environment, capture_output=True, text=True
    )


def tools(folder: Path, *names: str) -> Path:
    """A PATH of these commands alone."""
    for name in names:
        found = subprocess.run(["bash", "-c", f"command -v {name}"], capture_output=True, text=True)
        if found.stdout.strip():
            (folder / name).symlink_to(found.stdout.strip())
    return folder


def test_a_complete_machine_passes() -> None:
    result = subprocess.run(["bash", str(PREFLIGHT)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "free disk" in result.stdout
    assert "minutes" in result.stdout


def test_missing_compiler_and_make_are_one_apt_line(tmp_path: Path) -> None:
    result = run(tools(tmp_path, *TOOLS))
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if "apt-get install" in line]
    assert line.split("install -y ")[1].split() == ["g++", "make"]


def test_a_missing_python_asks_for_venv_and_headers_too(tmp_path: Path) -> None:
    result = run(tools(tmp_path, *TOOLS), "--packages", python="no-such-python")
    assert result.returncode == 0
    assert result.stdout.split() == ["python3", "python3-venv", "python3-dev", "g++", "make"]


def test_tests_in_a_browser_ask_for_one(tmp_path: Path) -> None:
    folder = tools(tmp_path, *TOOLS, "g++", "make", "python3")
    assert "chromium" not in run(folder, "--packages").stdout.split()
    assert "chromium" in run(folder, "--page", "--packages").stdout.split()
