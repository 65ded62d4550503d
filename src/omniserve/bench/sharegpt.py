"""Lengths of real conversations: a file of ShareGPT V3, counted with the tokenizer of the model."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from omniserve.bench.prompts import Text
from omniserve.errors import ConfigError

# The filter of vLLM's benchmark: tokens of prompt and reply at least, of the prompt and of both at most.
MIN_TOKENS, MAX_PROMPT, MAX_TOTAL = 4, 1024, 2048


def sharegpt_sizes(path: Path, tokenizer: Text, seed: int) -> Iterator[tuple[int, int]]:
    """Tokens of the first message and of its reply, of one conversation after the other in an order of the
    seed's, over and over. ConfigError when the file is none of ShareGPT or has none short enough."""
    exchanges = _first_exchanges(path)
    random.Random(f"{seed} sharegpt").shuffle(exchanges)
    sizes = []
    for prompt, reply in exchanges:
        size = len(tokenizer.encode(prompt)), len(tokenizer.encode(reply))
        if min(size) >= MIN_TOKENS and size[0] <= MAX_PROMPT and sum(size) <= MAX_TOTAL:
            sizes.append(size)
            yield size
    if not sizes:
        raise ConfigError(
            f"dataset-path {path}: no conversation begins with at least {MIN_TOKENS} tokens each way, "
            f"{MAX_PROMPT} of prompt and {MAX_TOTAL} of both at most"
        )
    while True:
        yield from sizes


def _first_exchanges(path: Path) -> list[tuple[str, str]]:
    try:
        conversations = json.loads(path.read_text(encoding="utf-8"))
        turns = [entry["conversations"][:2] for entry in conversations]
        return [(t[0]["value"], t[1]["value"]) for t in turns if len(t) == 2]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"dataset-path {path}: can not be read as ShareGPT, a list of objects with `conversations` "
            f"({type(error).__name__}: {error})"
        ) from None
