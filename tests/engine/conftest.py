"""Engine fixtures: models with their references, and what was counted about ties."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.driver import Subject
from engine.reference import MAX_TIED_SHARE, TALLY

TinySubject = Callable[..., Subject]


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Subject:
    """SmolLM2-135M in float32, loaded once."""
    return Subject(smollm2_path)


@pytest.fixture(scope="session")
def tiny_subject(tiny_llama: Callable[..., Path]) -> TinySubject:
    """`tiny_subject(dtype, **config)` -> a random Llama with its reference; one per argument set."""
    made: dict[str, Subject] = {}

    def make(dtype: torch.dtype = torch.float32, **config: Any) -> Subject:
        key = json.dumps([str(dtype), config], sort_keys=True)
        if key not in made:
            made[key] = Subject(tiny_llama(**config), dtype)
        return made[key]

    return make


@pytest.fixture(scope="session", autouse=True)
def few_outputs_are_ties() -> Iterator[None]:
    """The promise about all float32 outputs of the run, model by model."""
    yield
    for model in TALLY.outputs:
        assert TALLY.tied_share(model) <= MAX_TIED_SHARE, TALLY.lines()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TALLY.outputs or TALLY.notes:
        terminalreporter.section("token equality with transformers")
        for line in TALLY.lines():
            terminalreporter.line(line)
