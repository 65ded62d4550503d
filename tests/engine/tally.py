"""What a test run compared with transformers: counts, the promise about ties, and the summary at the end.

A plugin of tests/conftest.py. Where tests run in several processes each counts its own, and the one that
started them adds up: the promise is about the whole run. Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest

MAX_TIED_SHARE = 0.02


@dataclass(slots=True)
class Tally:
    """Counts of one test run; outputs by model."""

    outputs: Counter[str] = field(default_factory=Counter)
    tied_outputs: Counter[str] = field(default_factory=Counter)
    worst_logit_error: float = 0.0
    notes: list[str] = field(default_factory=list)

    def tied_share(self, model: str) -> float:
        return self.tied_outputs[model] / self.outputs[model]

    def has_too_many_ties(self) -> bool:
        return any(self.tied_share(model) > MAX_TIED_SHARE for model in self.outputs)

    def add(self, other: Tally) -> None:
        self.outputs.update(other.outputs)
        self.tied_outputs.update(other.tied_outputs)
        self.worst_logit_error = max(self.worst_logit_error, other.worst_logit_error)
        self.notes += other.notes

    def plain(self) -> dict[str, Any]:
        """Built-in types alone, as they travel between processes."""
        return asdict(self) | {"outputs": dict(self.outputs), "tied_outputs": dict(self.tied_outputs)}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Tally:
        counts = {name: Counter(plain[name]) for name in ("outputs", "tied_outputs")}
        return cls(**(plain | counts))

    def lines(self) -> list[str]:
        ties = [
            f"{model}: {self.tied_outputs[model]} of {count} outputs differ from transformers by a tie"
            for model, count in self.outputs.items()
        ]
        return [*ties, f"worst logit error {self.worst_logit_error:.1e} of the scale", *self.notes]


TALLY = Tally()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the counts on, or hold the promise about all float32 outputs of the run, model by model."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["tally"] = TALLY.plain()
    elif TALLY.has_too_many_ties() and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A process of pytest-xdist has ended; one that was killed has no counts."""
    if "tally" in getattr(node, "workeroutput", {}):
        TALLY.add(Tally.from_plain(node.workeroutput["tally"]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TALLY.outputs or TALLY.notes:
        terminalreporter.section("token equality with transformers")
        for line in TALLY.lines():
            terminalreporter.line(line)
    if TALLY.has_too_many_ties():
        said = f"FAILED: more than {MAX_TIED_SHARE:.0%} of a model's outputs are ties"
        terminalreporter.line(said, red=True)
