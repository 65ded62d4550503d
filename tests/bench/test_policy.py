"""bench-policy: the scenes that it times are what they are called. Sizes are smaller here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omniserve.bench import policy

FIGURES = {"schedule", "schedule_with_4_arrivals", "admission", "admission_behind_4_prompts"}


def test_both_scenes_are_timed_and_the_second_has_batch_rows_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, size in {"NUM_LANES": 40, "NUM_QUEUED": 100, "NUM_CHATS": 16, "ROUNDS": 20}.items():
        monkeypatch.setattr(policy, name, size)
    path = tmp_path / "policy.json"
    assert policy.main(["--json", str(path)]) == 0
    always = json.loads(path.read_text())
    auto = always["auto"]
    for scene in (always, auto):
        assert scene.keys() >= FIGURES
        assert (scene["requests"]["lane"], scene["requests"]["waiting"]) == (40, 100)
    assert always["best_effort_on_device"] == [0, 0]
    assert min(auto["best_effort_on_device"]) > 0
    printed = capsys.readouterr().out
    assert "host_offload always: " in printed
    assert "host_offload auto: " in printed
