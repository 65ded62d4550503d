"""Rounds of a comparison: every engine answers the same prompts, in turns, one at a time."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omniserve.bench.measure import Rounds
from omniserve.bench.peer_process import PeerError, PeerProcess
from omniserve.host.others import Others

OURS = "omniserve"
WARM_UP_TOKENS = 4
FIRST_TOKEN_ID = 100  # below are control tokens


@dataclass(frozen=True, slots=True)
class Case:
    """Prompts that arrive at once, equally long."""

    prompts: int
    prompt_tokens: int
    output_tokens: int

    @property
    def is_prefill(self) -> bool:
        return self.output_tokens == 1

    @property
    def counted_tokens(self) -> int:
        """What a rate counts: tokens of prompts where those are the work, else output tokens."""
        return self.prompts * (self.prompt_tokens if self.is_prefill else self.output_tokens)

    @property
    def text(self) -> str:
        return f"prompt of {self.prompt_tokens}" if self.is_prefill else f"{self.prompts} at once"

    def token_ids(self, seed: str, vocabulary: int) -> list[list[int]]:
        """Prompts drawn at random: those of two seeds begin differently."""
        draw = random.Random(f"{seed} {self}")
        ids = range(FIRST_TOKEN_ID, vocabulary)
        return [draw.choices(ids, k=self.prompt_tokens) for _ in range(self.prompts)]


def warm_ups(cases: Sequence[Case]) -> list[Case]:
    """What an engine computes before it is measured: a few tokens of every batch, one long prompt."""
    batches = [c for c in cases if not c.is_prefill]
    long_prompts = sorted((c for c in cases if c.is_prefill), key=lambda c: c.prompt_tokens)
    return [
        *(replace(c, output_tokens=min(WARM_UP_TOKENS, c.output_tokens)) for c in batches),
        *long_prompts[:1],
    ]


@dataclass(frozen=True, slots=True)
class Contender:
    """An engine ready to be started: interpreter, and settings of `peer_engines.py`."""

    name: str
    python: Path
    settings: dict[str, Any]


@dataclass
class Measured:
    """What a run has measured so far. A peer that failed keeps its rounds and takes part in no later one."""

    rates: dict[Case, Rounds]
    same_first_tokens: dict[Case, Rounds]
    versions: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    startup_s: Rounds = field(default_factory=Rounds)
    others_busy_cores: Rounds = field(default_factory=Rounds)

    @classmethod
    def nothing(cls, cases: Sequence[Case]) -> Measured:
        return cls({case: Rounds() for case in cases}, {case: Rounds() for case in cases})

    def as_dict(self, peers: Sequence[str]) -> dict[str, Any]:
        return {
            "peers": {
                name: {"version": self.versions.get(name), "failure": self.failures.get(name)}
                for name in peers
            },
            "startup_s": self.startup_s.as_dicts(),
            "cases": [self._case_as_dict(case) for case in self.rates],
            "others_busy_cores": self.others_busy_cores.as_dicts(),
        }

    def _case_as_dict(self, case: Case) -> dict[str, Any]:
        rates = self.rates[case]
        others = [name for name in rates.samples if name != OURS and OURS in rates.samples]
        shares = self.same_first_tokens[case].samples
        return {
            "case": case.text,
            "prompts": case.prompts,
            "prompt_tokens": case.prompt_tokens,
            "output_tokens": case.output_tokens,
            "counts": "prompt tokens" if case.is_prefill else "output tokens",
            "tokens_per_s": rates.as_dicts(),
            "ours_over": {name: rates.ratio(OURS, name).as_dict() for name in others},
            "same_first_tokens": {name: statistics.mean(values) for name, values in shares.items()},
        }


class Comparison:
    """Takes rounds of `cases` by `contenders`; `vocabulary`: token ids to draw prompts from are below it.

    `step(text)` is called as each part begins.
    """

    def __init__(
        self,
        contenders: Sequence[Contender],
        cases: Sequence[Case],
        vocabulary: int,
        logs: Path,
        step: Callable[[str], None],
    ) -> None:
        self.measured = Measured.nothing(cases)
        self._contenders = {c.name: c for c in contenders}
        self._cases = cases
        self._vocabulary = vocabulary
        self._logs = logs
        self._step = step

    def take_round(self, number: int) -> None:
        """Starts all that have not failed before, measures every case, ends them. `number` counts from 0."""
        with ExitStack() as stack:
            running: dict[str, PeerProcess] = {}
            for name in self._turns(number):
                self._step(f"{name}: start-up")
                try:
                    running[name] = stack.enter_context(self._start(name))
                except PeerError as error:
                    self.measured.failures[name] = str(error)
            for case in self._cases:
                prompts = case.token_ids(str(number), self._vocabulary)
                answers: dict[str, list[list[int]]] = {}
                for name in self._turns(number):
                    self._step(f"{name}: {case.text}")
                    try:
                        answers[name] = self._ask(name, running[name], case, prompts)
                    except PeerError as error:
                        self.measured.failures[name] = str(error)
                        running[name].close()
                self._compare(case, answers)

    def _turns(self, number: int) -> Iterator[str]:
        """Names of those that have not failed. A round begins with the one that was second the last time."""
        names = list(self._contenders)
        first = number % len(names) if names else 0
        for name in names[first:] + names[:first]:
            if name not in self.measured.failures:
                yield name

    def _start(self, name: str) -> PeerProcess:
        """The engine, up and warm. What its start-up took is taken before it is warmed up."""
        contender = self._contenders[name]
        peer = PeerProcess(contender.python, contender.settings, self._logs / f"{name}.log")
        self.measured.versions[name] = peer.version
        self.measured.startup_s.add(name, peer.startup_s)
        try:
            for case in warm_ups(self._cases):
                peer.generate(case.token_ids("warm-up", self._vocabulary), case.output_tokens)
        except BaseException:
            peer.close()
            raise
        return peer

    def _ask(self, name: str, peer: PeerProcess, case: Case, prompts: list[list[int]]) -> list[list[int]]:
        watch = Others(own_s=peer.busy_s)
        seconds, outputs = peer.generate(prompts, case.output_tokens)
        self.measured.others_busy_cores.add(name, watch.cores())
        self.measured.rates[case].add(name, case.counted_tokens / seconds)
        return outputs

    def _compare(self, case: Case, answers: dict[str, list[list[int]]]) -> None:
        """Takes down in how many of the requests a peer's first token is ours."""
        ours = answers.pop(OURS, None)
        if ours is not None:
            for name, theirs in answers.items():
                same = sum(a[0] == b[0] for a, b in zip(ours, theirs, strict=True))
                self.measured.same_first_tokens[case].add(name, same / len(ours))
