"""What one request asked for and got, as its accounts are kept when it ends."""

from __future__ import annotations

from dataclasses import dataclass

from omniserve.types import RequestMetrics


@dataclass(frozen=True, slots=True)
class Served:
    """A request that had a token. Tokens; times in `metrics`, which are those of all its texts.

    num_prompt, num_cached: of all its prompts, each once, and what was found of them in the prefix cache.
    num_output, num_longest: of all its texts, and of the longest one. num_texts: of each prompt (`n`).
    max_tokens: of each text, as it was asked for; None: as many as fit.
    """

    num_prompt: int
    num_cached: int
    num_output: int
    num_longest: int
    num_texts: int
    max_tokens: int | None
    metrics: RequestMetrics
