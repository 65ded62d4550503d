"""Engine fixtures: models with their references."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.driver import Subject

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
