"""What transformers' own model says, and when a difference from it is only a tie.

Scale of a position: the largest absolute logit there. Rounding differs with the number of rows in a matrix
product, so where the two best logits of the reference lie within TIE of the scale either one may win.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.tally import TALLY

TIE = 1e-3
# Measured on all scenarios: below 1e-5 of the scale; a wrong or missing KV entry costs 1e-2 and more.
LOGIT_TOLERANCE = 2e-4


@dataclass(frozen=True, slots=True)
class _Run:
    """Greedy tokens and the logits [len(tokens), vocab] float32 they were chosen from."""

    tokens: tuple[int, ...]
    logits: Tensor


class Reference:
    """transformers' model of one folder, alone with one prompt at a time; answers are kept."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        self._path = path
        self._dtype = dtype
        self._name = path.name.rstrip("0123456789")  # all tiny Llamas together
        self._loaded: Any = None
        self._runs: dict[tuple[int, ...], _Run] = {}
        self._forced: dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor] = {}

    @property
    def model(self) -> Any:
        if self._loaded is None:
            from transformers import AutoModelForCausalLM, GenerationConfig
            from transformers.utils import logging

            logging.disable_progress_bar()
            model = AutoModelForCausalLM.from_pretrained(
                self._path, dtype=self._dtype, attn_implementation="sdpa"
            )
            # No token is special: the engine is told to go on after the end-of-text token too.
            model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
            self._loaded = model.eval()
        return self._loaded

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """Greedy tokens after `prompt`, exactly `max_new_tokens` of them."""
        return list(self._run(tuple(prompt), max_new_tokens).tokens[:max_new_tokens])

    def logits(self, prompt: Sequence[int], ours: Sequence[int]) -> Tensor:
        """Logits [len(ours), vocab] float32 that our tokens had to be chosen from (teacher forcing)."""
        run = self._run(tuple(prompt), len(ours))
        if run.tokens[: len(ours)] == tuple(ours):
            return run.logits[: len(ours)]
        key = tuple(prompt), tuple(ours)
        if key not in self._forced:
            ids = torch.tensor([[*prompt, *ours[:-1]]])
            with torch.inference_mode(), one_thread():
                self._forced[key] = self.model(ids, logits_to_keep=len(ours)).logits[0].float()
        return self._forced[key]

    def check(self, prompt: Sequence[int], ours: Sequence[int]) -> int:
        """Assert that `ours` is what the model alone produces; returns the number of ties on the way.

        After a first difference the reference goes on from our tokens: each of them must be its best one,
        or tie with it.
        """
        TALLY.outputs[self._name] += 1
        expected = self.generate(prompt, len(ours))
        if list(ours) == expected:
            return 0
        logits = self.logits(prompt, ours)
        best, scale = logits.max(dim=-1).values, logits.abs().max(dim=-1).values
        gaps = (best - logits[torch.arange(len(ours)), torch.tensor(ours)]) / scale
        first = next(i for i, pair in enumerate(zip(ours, expected, strict=True)) if pair[0] != pair[1])
        wrong = (gaps > TIE).nonzero().flatten().tolist()
        assert not wrong, (
            f"prompt of {len(prompt)} tokens: token {wrong[0]} is {ours[wrong[0]]}, "
            f"{float(gaps[wrong[0]]):.1e} of the scale below the reference's best "
            f"(first difference at {first})\nours      {list(ours)}\nreference {expected}"
        )
        TALLY.tied_outputs[self._name] += 1
        return max(1, int((gaps > 0).sum()))

    def check_logits(self, prompt: Sequence[int], ours: Sequence[int], logits: Tensor) -> float:
        """Assert that our logits [len(ours), vocab] are the reference's at every position; returns the worst
        difference, as a hold of the scale."""
        expected = self.logits(prompt, ours)
        errors = (logits - expected).abs().max(dim=-1).values / expected.abs().max(dim=-1).values
        worst = float(errors.max())
        assert worst <= LOGIT_TOLERANCE, (
            f"prompt of {len(prompt)} tokens: logits differ by {worst:.1e} of the scale "
            f"at token {int(errors.argmax())} of {len(ours)}"
        )
        TALLY.worst_logit_error = max(TALLY.worst_logit_error, worst)
        return worst

    def _run(self, prompt: tuple[int, ...], max_new_tokens: int) -> _Run:
        run = self._runs.get(prompt)
        if run is None or len(run.tokens) < max_new_tokens:
            ids = torch.tensor([prompt])
            with torch.inference_mode(), one_thread():
                out = self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_new_tokens,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            run = _Run(tuple(out.sequences[0, len(prompt) :].tolist()), torch.cat(out.logits).float())
            assert len(run.tokens) == max_new_tokens, "the reference took a token for the end"
            self._runs[prompt] = run
        return run


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread for a while: rounding is the same on every machine, and on a busy one no call waits
    for a thread that is not running."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
