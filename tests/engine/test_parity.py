"""Every token of SmolLM2 equals transformers', whatever happens to the requests (float32).

See docs/design.md, "Exactness".
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import get_args

import pytest

from engine.driver import Subject
from engine.prompts import LENGTHS, Pool, pool_of, text_of
from engine.scenarios import SCENARIOS, Settings, few_lengths, serve
from omniserve.config import Reentry

REENTRIES: tuple[Reentry, ...] = ("same_iteration", "next_iteration")
CHUNKS = (16, 64, 512)
# (page_size, host_page_size): equal, either one the larger, and one that does not divide the other.
PAGES = ((16, 16), (8, 16), (16, 8), (8, 5))
AXES = (tuple(SCENARIOS), REENTRIES, CHUNKS, PAGES)
Case = tuple[str, Reentry, int, tuple[int, int]]
# Without lanes nothing enters, whatever the rule.
MATRIX: list[Case] = [case for case in itertools.product(*AXES) if case[:2] != ("ls_alone", "next_iteration")]
# The extremes of each setting: half the cases that the pairs of all settings would need.
EXTREMES = [case for case in MATRIX if case[2] != 64 and case[3] in ((16, 16), (8, 5))]


def pairs_of(case: Case) -> set[tuple[int, object, int, object]]:
    """All pairs of settings that a case tries together."""
    return {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(case)), 2)}


def pairwise(cases: list[Case]) -> list[Case]:
    """A small part of `cases` with every pair of settings still in it: always the one with most new pairs."""
    missing = set().union(*map(pairs_of, cases))
    chosen = []
    while missing:
        chosen.append(max(cases, key=lambda case: len(pairs_of(case) & missing)))
        missing -= pairs_of(chosen[-1])
    return chosen


def once_each(cases: list[Case]) -> list[Case]:
    """One of each scenario, in turns the first and the last of it, so that all settings come up."""
    names = sorted({case[0] for case in cases})
    return [[case for case in cases if case[0] == name][-(i % 2)] for i, name in enumerate(names)]


def settings_of(case: Case) -> Settings:
    _, reentry, chunk, (page_size, host_page_size) = case
    return Settings(reentry, chunk, page_size, host_page_size)


def name_of(case: Case) -> str:
    return f"{case[0]}-{settings_of(case)}"


@pytest.fixture(scope="module")
def pool(smollm2_path: Path) -> Pool:
    from omniserve.model.tokenizer import Tokenizer

    return pool_of(Tokenizer(smollm2_path).encode(text_of(4)))


def serve_case(smollm2: Subject, pool: Pool, case: Case, lengths: list[int]) -> None:
    settings = settings_of(case)
    serve(smollm2, SCENARIOS[case[0]](pool, settings, lengths, random.Random(name_of(case))), settings)


@pytest.mark.parametrize("case", once_each(pairwise(EXTREMES)), ids=name_of)
def test_tokens_equal_in_every_scenario(smollm2: Subject, pool: Pool, case: Case) -> None:
    """Each under one of the settings; the full matrix has all, small models others (test_parity_tiny.py)."""
    serve_case(smollm2, pool, case, few_lengths(random.Random(name_of(case))))


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", MATRIX, ids=name_of)
def test_tokens_equal_in_the_whole_matrix(smollm2: Subject, pool: Pool, case: Case) -> None:
    serve_case(smollm2, pool, case, list(LENGTHS))


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["ls_alone", "be_always", "mixed"])
def test_all_prompts_from_1_to_1500_tokens_at_once(smollm2: Subject, pool: Pool, scenario: str) -> None:
    assert len(LENGTHS) >= 24
    serve_case(smollm2, pool, (scenario, "same_iteration", 64, (16, 16)), list(LENGTHS))


def test_tokens_equal_when_the_device_waits_for_lanes(smollm2: Subject, pool: Pool) -> None:
    assert "wait" in get_args(Reentry)
    lengths = few_lengths(random.Random(1))
    serve_case(smollm2, pool, ("mixed", "wait", 64, (16, 16)), lengths)
