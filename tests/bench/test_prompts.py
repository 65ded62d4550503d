"""Prompts have the length asked for, whatever the vocabulary; lengths of ShareGPT are those of its file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import pytest

from omniserve.bench.http_setup import make_pool
from omniserve.bench.load import Job
from omniserve.bench.prompts import UNMEASURED, Pool, Prompts, measured_pool
from omniserve.bench.sharegpt import sharegpt_sizes
from omniserve.errors import ConfigError
from omniserve.model.tokenizer import Tokenizer

LS = "latency_sensitive"


def job(number: int, num_prompt: int) -> Job:
    return Job(number, LS, num_prompt, 4, seed=1)


def lengths(tokenizer: Tokenizer, pool: Pool, wanted: Sequence[int]) -> list[int]:
    prompts = Prompts(pool)
    return [len(tokenizer.encode(prompts.take(job(i, n)))) for i, n in enumerate(wanted)]


WANTED = (1, 2, 17, 300, 2500)


def test_prompts_are_exact_in_a_vocabulary_of_words(smollm2_path: Path) -> None:
    tokenizer = Tokenizer(smollm2_path)
    assert lengths(tokenizer, make_pool(tokenizer, is_chat=False), WANTED) == list(WANTED)


def test_prompts_are_exact_in_a_vocabulary_of_bytes(tiny_llama: Callable[..., Path]) -> None:
    tokenizer = Tokenizer(tiny_llama())
    assert lengths(tokenizer, make_pool(tokenizer, is_chat=False), WANTED) == list(WANTED)


def test_the_template_of_a_chat_is_part_of_its_prompt(smollm2_path: Path) -> None:
    tokenizer = Tokenizer(smollm2_path)
    text = Prompts(make_pool(tokenizer, is_chat=True)).take(job(0, 100))
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": text}])
    assert len(tokenizer.encode(prompt, add_special_tokens=False)) == 100


def test_a_prompt_shorter_than_what_is_added_to_it_still_has_a_word() -> None:
    assert Prompts(Pool(["word"], " ", num_added=9)).take(job(0, 4)) == "word"


def test_a_prompt_made_before_is_the_one_made_on_the_way() -> None:
    before, later = Prompts(UNMEASURED), Prompts(UNMEASURED)
    before.prepare([job(3, 20)])
    assert before.take(job(3, 20)) == later.take(job(3, 20))
    assert later.take(job(3, 20)) != later.take(job(4, 20))


def test_a_vocabulary_in_which_words_do_not_stay_themselves_is_refused() -> None:
    class Merging:
        """Every text is one token."""

        vocab_size = 4

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [0]

        def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            return "word"

    with pytest.raises(ConfigError, match=r"^tokenizer: .* 'none'"):
        measured_pool(Merging(), 0)


# ---------------------------------------------------------------- ShareGPT


def conversation(*texts: str) -> dict[str, object]:
    return {"conversations": [{"from": "human", "value": text} for text in texts]}


def test_sharegpt_gives_first_exchanges_that_are_neither_too_short_nor_too_long(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    """In bytes: 5 and 6, 7 and 8; one too short, one too long, one without a reply."""
    path = tmp_path / "sharegpt.json"
    path.write_text(
        json.dumps(
            [
                conversation("a" * 5, "b" * 6, "c" * 90),
                conversation("a" * 3, "b" * 6),
                conversation("a" * 7, "b" * 8),
                conversation("a" * 1025, "b" * 8),
                conversation("a" * 9),
            ]
        )
    )
    sizes = sharegpt_sizes(path, Tokenizer(tiny_llama()), seed=0)
    first, again = list(islice(sizes, 2)), list(islice(sizes, 2))
    assert sorted(first) == [(5, 6), (7, 8)]
    assert again == first


@pytest.mark.parametrize(
    "text", ["no json", "{}", '[{"turns": []}]', "[3]", json.dumps([conversation("a", "b")])]
)
def test_a_file_that_is_no_sharegpt_is_refused_by_name(
    tmp_path: Path, tiny_llama: Callable[..., Path], text: str
) -> None:
    path = tmp_path / "sharegpt.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"^dataset-path .*sharegpt\.json: "):
        next(sharegpt_sizes(path, Tokenizer(tiny_llama()), seed=0))
