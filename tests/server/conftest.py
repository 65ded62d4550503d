"""One server process for all tests that leave it as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from server.processes import SMALL, Served, serving


@pytest.fixture(scope="session")
def tiny_model(tiny_llama: Callable[..., Path]) -> Path:
    """A random Llama with a byte tokenizer and a context of 512 tokens."""
    return tiny_llama(max_position_embeddings=512)


@pytest.fixture(scope="session")
def server(tiny_model: Path) -> Iterator[Served]:
    """A real server over the tiny model, called `tiny`."""
    with serving(
        str(tiny_model), "--served-model-name", "tiny", "alias", "--log-level", "debug", *SMALL
    ) as one:
        yield one


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with server.client() as one:
        yield one
