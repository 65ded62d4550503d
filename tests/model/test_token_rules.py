"""Rules on logits: bias, bad words, min_tokens, penalties, each against its formula written out plainly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniserve.model.sampling import Chooser, sample
from omniserve.model.token_rules import TokenCounts, TokenRules, apply_rules

VOCAB = 12
NEGATIVE_INFINITY = float("-inf")
IDS = st.integers(0, VOCAB - 1)
TEXTS = st.lists(IDS, max_size=30)


def changed(logits: Sequence[float], rules: TokenRules) -> list[float]:
    rows = torch.tensor([logits])
    apply_rules(rows, [0], [rules])
    return [float(x) for x in rows[0]]


def plain_changed(
    logits: Sequence[float],
    prompt: Sequence[int],
    output: Sequence[int],
    bias: dict[int, float],
    bad_words: Sequence[Sequence[int]],
    min_tokens: int,
    stop_ids: Sequence[int],
    penalties: tuple[float, float, float],
) -> list[float]:
    repetition, presence, frequency = penalties
    result = []
    for token, value in enumerate(logits):
        value += bias.get(token, 0.0)
        for *head, last in bad_words:
            if token == last and (not head or list(output[-len(head) :]) == head):
                value = NEGATIVE_INFINITY
        if token in stop_ids and len(output) < min_tokens:
            value = NEGATIVE_INFINITY
        if token in prompt or token in output:
            value = value / repetition if value > 0 else value * repetition
        count = list(output).count(token)
        result.append(value - frequency * count - presence * (count > 0))
    return result


@given(
    prompt=TEXTS,
    output=TEXTS,
    bias=st.dictionaries(IDS, st.floats(-100, 100, width=32), max_size=4),
    bad_words=st.lists(st.lists(IDS, min_size=1, max_size=3), max_size=6),
    min_tokens=st.integers(0, 10),
    stop_ids=st.lists(IDS, max_size=3),
    penalties=st.tuples(
        st.sampled_from([1.0, 1.0, 0.5, 1.3]),
        st.sampled_from([0.0, 0.0, -2.0, 1.5]),
        st.sampled_from([0.0, 0.0, -0.5, 0.25]),
    ),
)
@settings(max_examples=200, deadline=None)
def test_any_rules_change_logits_as_the_plain_formula_at_every_token(
    prompt: list[int],
    output: list[int],
    bias: dict[int, float],
    bad_words: list[list[int]],
    min_tokens: int,
    stop_ids: list[int],
    penalties: tuple[float, float, float],
) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)).tolist()
    rules = TokenRules(
        prompt=prompt,
        logit_bias=bias,
        bad_words=bad_words,
        min_tokens=min_tokens,
        stop_ids=stop_ids,
        repetition_penalty=penalties[0],
        presence_penalty=penalties[1],
        frequency_penalty=penalties[2],
    )
    for length in range(len(output) + 1):
        if length:
            rules.push(output[length - 1])
        expected = plain_changed(
            logits, prompt, output[:length], bias, bad_words, min_tokens, stop_ids, penalties
        )
        assert changed(logits, rules) == pytest.approx(expected, rel=1e-5, abs=1e-4)


@given(rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_rows_with_rules_side_by_side_change_as_alone_and_others_not_at_all(
    rows: list[tuple[list[int], list[int]]],
) -> None:
    logits = torch.randn(2 * len(rows), VOCAB, generator=torch.Generator().manual_seed(2))
    all_rules = []
    for prompt, output in rows:
        rules = TokenRules(
            prompt=prompt, repetition_penalty=1.4, frequency_penalty=0.3, bad_words=[[3], [1, 2]]
        )
        for token in output:
            rules.push(token)
        all_rules.append(rules)
    together = logits.clone()
    apply_rules(together, [2 * i for i in range(len(rows))], all_rules)
    assert torch.equal(together[1::2], logits[1::2])
    for i, rules in enumerate(all_rules):
        assert together[2 * i].tolist() == changed(logits[2 * i].tolist(), rules)


@given(prompt=TEXTS, output=st.lists(st.integers(0, 5000), max_size=300))
@settings(max_examples=50, deadline=None)
def test_counts_kept_one_by_one_are_the_counts_of_the_text(prompt: list[int], output: list[int]) -> None:
    counts = TokenCounts(prompt)
    for token in output:
        counts.push(token)
    kept = dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True))
    assert kept == dict.fromkeys(prompt, 0) | Counter(output)


def test_a_bias_of_100_forces_a_token_and_one_of_minus_100_keeps_it_away() -> None:
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(4))
    forced = Chooser(1.0, rules=TokenRules(logit_bias={17: 100.0}))
    assert {sample(logits, [forced], [p])[0] for p in range(200)} == {17}
    best = int(logits.argmax())
    avoided = Chooser(1.0, rules=TokenRules(logit_bias={best: -100.0}))
    assert best not in {sample(logits, [avoided], [p])[0] for p in range(500)}


def test_a_bad_word_is_never_completed_but_its_beginning_may_come() -> None:
    logits = torch.zeros(1, 4)
    rules = TokenRules(bad_words=[[1, 2, 3], [0, 0]])
    text: list[int] = []
    for position in range(3000):
        text += sample(logits, [Chooser(1.0, rules=rules)], [position])
        rules.push(text[-1])
    triples, pairs = set(zip(text, text[1:], text[2:], strict=False)), set(pairwise(text))
    assert (1, 2, 3) not in triples
    assert (0, 0) not in pairs
    assert {(1, 2), (2, 3)} <= pairs


def test_rules_without_effect_are_empty_and_others_are_not() -> None:
    assert TokenRules(prompt=[1, 2], stop_ids=[3]).is_empty
    assert TokenRules(logit_bias={}, bad_words=[]).is_empty
    for rules in (
        TokenRules(logit_bias={1: 1.0}),
        TokenRules(bad_words=[[1]]),
        TokenRules(bad_words=[[1, 2]]),
        TokenRules(min_tokens=1, stop_ids=[1]),
        TokenRules(presence_penalty=0.1),
        TokenRules(repetition_penalty=1.1),
    ):
        assert not rules.is_empty
