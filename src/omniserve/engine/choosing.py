"""How the next tokens of a request are to be chosen, from its parameters."""

from __future__ import annotations

from collections.abc import Sequence

from omniserve.engine.acceptance import Acceptance
from omniserve.model.sampling import Chooser
from omniserve.model.token_rules import TokenRules
from omniserve.types import SamplingParams


def make_chooser(
    acceptance: Acceptance,
    prompt: Sequence[int],
    params: SamplingParams,
    bad_words: Sequence[Sequence[int]],
    seed: int,
) -> Chooser:
    """bad_words: those of the parameters as token ids."""
    rules = TokenRules(
        prompt=prompt,
        logit_bias=params.logit_bias,
        bad_words=bad_words,
        min_tokens=params.min_tokens,
        # The model's own end of text too where it is ignored: such a text has not come to an end.
        stop_ids=acceptance.stop_ids(params).union(acceptance.eos_token_ids),
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
    )
    return Chooser(
        temperature=params.temperature,
        seed=seed,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        rules=None if rules.is_empty else rules,
        num_logprobs=params.logprobs,
    )
