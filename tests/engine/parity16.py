"""How near a 16-bit engine is to the float32 model, beside transformers in the same 16 bits."""

from __future__ import annotations

import random
from collections.abc import Sequence

from engine.driver import Subject, run
from engine.prompts import Pool
from engine.reference import Reference
from engine.scenarios import SCENARIOS, Settings, config_of
from engine.tally import TALLY

# Of two equally good decoders the mean error of thousands of logits differs by a few percent.
ERROR_RATIO = 1.3


def report_agreement(
    name: str, subject: Subject, exact: Reference, pool: Pool, scenario: str, lengths: Sequence[int]
) -> None:
    """Serve a scenario; note how many tokens equal transformers', and assert that the mean logit error is not
    larger than transformers' own by more than a few percent."""
    settings = Settings()
    story = SCENARIOS[scenario](pool, settings, lengths, random.Random(5))
    outcome = run(subject, config_of(subject, story, settings), story.arrivals)
    story.proves(outcome)
    num_equal = num_tokens = 0
    our_error = their_error = 0.0
    for arrival, tokens, logits in zip(outcome.arrivals, outcome.tokens, outcome.logits, strict=True):
        expected = subject.reference.generate(arrival.prompt, len(tokens))
        num_equal += sum(a == b for a, b in zip(tokens, expected, strict=True))
        num_tokens += len(tokens)
        best = exact.logits(arrival.prompt, tokens)
        our_error += float((logits - best).abs().mean())
        their_error += float((subject.reference.logits(arrival.prompt, tokens) - best).abs().mean())
    ratio = our_error / their_error
    dtype = str(subject.decoder.dtype).removeprefix("torch.")
    TALLY.notes.append(
        f"{dtype}, {name}: {num_equal} of {num_tokens} tokens equal transformers'; "
        f"mean logit error {ratio:.2f} times transformers' own"
    )
    assert ratio < ERROR_RATIO
