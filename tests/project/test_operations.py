"""docs/operations.md says what the program does: every flag and its default, figures, backup, alerts."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from batch.stand import LIMITS, create, lines, upload
from omniserve import cli
from omniserve.attention.cpu import kv_geometry
from omniserve.batch.check import check_state
from omniserve.batch.limits import DAY_S, Limits, Quota
from omniserve.batch.store import Store
from omniserve.config import DEVICE_MEMORY_SHARE, HOST_MEMORY_SHARE, EngineConfig
from omniserve.server.flags import read_settings
from omniserve.server.settings import ServerConfig

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "operations.md").read_text()
PROSE = " ".join(TEXT.split())
ALERTS = tuple(re.findall(r"- alert: (\w+)", (ROOT / "deploy/prometheus/alerts.yml").read_text()))
MIB = 1024**2


def serve_actions() -> list[argparse.Action]:
    """Every argument of `omniserve serve`."""
    (commands,) = [a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return [a for a in commands.choices["serve"]._actions if a.dest not in ("help", "run")]


def documented() -> dict[str, tuple[str, str]]:
    """Flag -> its default and meaning, as the tables say."""
    found: dict[str, tuple[str, str]] = {}
    for flags, default, meaning in re.findall(
        r"^\| (`(?:--|MODEL)[^|]*) \| ([^|]*) \| ([^|]*) \|$", TEXT, re.MULTILINE
    ):
        for flag in re.findall(r"`([^`]+)`", flags):
            assert flag not in found, f"{flag} stands there twice"
            found[flag] = default.strip("`"), meaning
    return found


def default_of(flag: str) -> str:
    """As the tables show it, from the settings that a bare `omniserve serve` reads."""
    settings = read_settings(cli._parser().parse_args(["serve"]), {})
    name = flag.removeprefix("--").replace("-", "_")
    if name in ("MODEL", "log_level"):
        return settings.engine.model if name == "MODEL" else settings.log_level
    name = {"api_key": "api_keys"}.get(name, name)
    for part, nothing in ((settings.server, "none"), (settings.engine, "automatic")):
        for one in fields(part):
            if one.name in (name, f"{name}_s", f"{name}_bytes"):
                value: Any = getattr(part, one.name)
                if value is None or value == ():
                    return nothing
                return str(value).lower() if isinstance(value, bool) else re.sub(r"\.0$", "", str(value))
    assert name == "config" or name.startswith("slo_"), f"{flag}: whose is it?"
    return "none"


def test_every_flag_is_in_the_tables_and_no_other() -> None:
    flags = set()
    for action in serve_actions():
        names = [n for n in action.option_strings if not n.startswith("--no-")]
        flags |= set(names) or {str(action.metavar)}
    assert set(documented()) == flags


def test_the_tables_name_the_defaults() -> None:
    shown = {flag: re.sub(r"\.0$", "", default) for flag, (default, _) in documented().items()}
    assert shown == {flag: default_of(flag) for flag in documented()}


def test_the_tables_name_every_choice() -> None:
    for action in serve_actions():
        for choice in action.choices or ():
            default, meaning = documented()[action.option_strings[0]]
            assert choice == default or f"`{choice}`" in meaning, (action.option_strings, choice)


def test_there_is_a_section_for_every_alert_and_no_other_in_their_order() -> None:
    runbook = TEXT.partition("\n## Runbook\n")[2]
    assert tuple(re.findall(r"^### (.+)$", runbook, re.MULTILINE)) == ALERTS
    for section in re.split(r"^### .+$", runbook, flags=re.MULTILINE)[1:]:
        assert [word for word in ("*Means*", "*Look*", "*Do*") if word not in section] == []


def test_the_worked_example_is_what_the_engine_computes() -> None:
    layers, kv_heads, head_dim = 30, 3, 64  # smollm2-135m

    def token_bytes(kind: str) -> int:
        return kv_geometry(layers, kv_heads, head_dim, 64, kind).page_bytes // 64

    sizes = {kind: token_bytes(kind) for kind in ("float32", "int8")}
    assert f"= {sizes['float32']:,} bytes; on the host as int8" in TEXT
    assert f"= {sizes['int8']:,} |" in TEXT
    config, limit = EngineConfig(), 6 * 1024 * MIB
    for share, size in ((DEVICE_MEMORY_SHARE, config.page_size), (HOST_MEMORY_SHARE, config.host_page_size)):
        page_bytes = sizes["float32"] * size
        pages = int(limit * share) // page_bytes
        assert f"{page_bytes:,}" in TEXT
        assert f"{share:.0%}".replace("%", " %") + f" = {pages:,} pages = {pages * size:,} tokens" in TEXT


def test_retention_quota_and_reserve_are_those_of_the_store() -> None:
    limits, quota = Limits(), Quota()
    keeps = f"keep {quota.max_bytes // 1024**3} GiB, results included, and have {quota.max_open_batches} open"
    assert f"Files live {limits.retention_s // DAY_S} days" in PROSE
    assert keeps in PROSE
    assert f"less than {limits.reserve_bytes // MIB} MiB left" in PROSE
    assert f"limit of {limits.max_file_bytes // MIB} MiB" in PROSE


def test_the_backup_of_a_store_in_use_is_whole(tmp_path: Path) -> None:
    """The script of the document, run as it stands there beside an open store."""
    script = re.search(r"<<'END'\n(.*?)\nEND\n", TEXT, re.DOTALL)
    assert script is not None
    store = Store(tmp_path / "state", limits=LIMITS)
    try:
        create(store, lines(20))
        command = [sys.executable, "-c", script[1], str(tmp_path / "state"), str(tmp_path / "copy")]
        subprocess.run(command, check=True)
        upload(store, lines(3))
    finally:
        store.close()
    report = check_state(tmp_path / "copy")
    assert (report.problems, report.num_files, report.num_batches) == ([], 1, 1)
    restored = Store(tmp_path / "copy", limits=LIMITS)
    try:
        assert len(restored.batches.open_batches()) == 1
    finally:
        restored.close()


@pytest.mark.parametrize("name", ["operations.md", "api.md", "batches.md"])
def test_links_lead_somewhere(name: str) -> None:
    text = (ROOT / "docs" / name).read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (ROOT / "docs" / target).exists(), target
    for path in re.findall(r"`((?:deploy|tests|docs|scripts)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def test_the_readme_leads_here() -> None:
    assert "(docs/operations.md)" in (ROOT / "README.md").read_text()
    assert ServerConfig().port == 8000, "as the runbook's commands have it"
