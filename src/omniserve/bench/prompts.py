"""Prompts of an exact number of tokens, as text: the server's tokenizer is part of what is measured."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from omniserve.bench.load import Job
from omniserve.errors import ConfigError

POOL_SIZE = 512
MAX_TRIED = 20_000
# Without a tokenizer: words that nearly every vocabulary has as one token each.
# fmt: off
COMMON_WORDS = (
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school",
    "state", "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week",
    "company", "system", "program", "question", "work", "number", "night", "point", "home", "water", "room",
    "mother", "area", "money", "story", "fact", "month", "lot", "right", "study", "book", "eye", "job",
    "word", "business",
)
# fmt: on


class Text(Protocol):
    """What is needed of a tokenizer; omniserve.model.tokenizer.Tokenizer has it."""

    vocab_size: int

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


@dataclass(frozen=True, slots=True)
class Pool:
    """Words that are a token each, whatever stands beside them when `separator` is between them.

    num_added: tokens that the server adds to every prompt (start of text, chat template).
    """

    words: Sequence[str]
    separator: str
    num_added: int = 0

    def text(self, num_tokens: int, rng: random.Random) -> str:
        """A prompt without meaning of `num_tokens`; at least one word, however many tokens are added."""
        return self.separator.join(rng.choices(self.words, k=max(1, num_tokens - self.num_added)))


UNMEASURED = Pool(COMMON_WORDS, " ")


def measured_pool(tokenizer: Text, num_added: int) -> Pool:
    """Words of this tokenizer. ConfigError when it has none that stay a token each side by side."""
    rng = random.Random("pool")
    for words, separator in ((_spaced_words(tokenizer, rng), " "), (_letters(tokenizer), "")):
        pool = Pool(words, separator, num_added)
        if words and _is_exact(tokenizer, pool, rng):
            return pool
    raise ConfigError("tokenizer: no prompts of exact length can be made with it; leave it out with 'none'")


def _spaced_words(tokenizer: Text, rng: random.Random) -> list[str]:
    """Lower-case words that are a token at the start of a text and one more behind a space."""
    found: list[str] = []
    ids = rng.sample(range(tokenizer.vocab_size), min(MAX_TRIED, tokenizer.vocab_size))
    for token_id in ids:
        word = tokenizer.decode([token_id]).strip()
        if not (len(word) > 1 and word.isascii() and word.isalpha() and word.islower()):
            continue
        if _count(tokenizer, word) == 1 and _count(tokenizer, f"{word} {word}") == 2:
            found.append(word)
        if len(found) == POOL_SIZE:
            break
    return found


def _letters(tokenizer: Text) -> list[str]:
    """For vocabularies of bytes or characters."""
    return [letter for letter in "abcdefghijklmnopqrstuvwxyz" if _count(tokenizer, letter) == 1]


def _is_exact(tokenizer: Text, pool: Pool, rng: random.Random) -> bool:
    return all(_count(tokenizer, pool.text(pool.num_added + n, rng)) == n for n in (1, 7, 64, 500))


def _count(tokenizer: Text, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))


class Prompts:
    """The prompt of each job. Two share no beginning worth the name, so no prefix cache helps."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._made: dict[Job, str] = {}

    def prepare(self, jobs: Iterable[Job]) -> None:
        """Make the prompts of jobs whose sending must not be held up by that."""
        for job in jobs:
            self._made[job] = self._text(job)

    def take(self, job: Job) -> str:
        """The prompt of a job; one seed, class and number, one text."""
        made = self._made.pop(job, None)
        return self._text(job) if made is None else made

    def _text(self, job: Job) -> str:
        return self._pool.text(job.num_prompt, random.Random(f"{job.seed} {job.service_class} {job.number}"))
