"""Who has the next place: the owner whose batches had least so far, in tokens. Pure.

A virtual token counter for each owner (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024,
algorithm 1): the one with the least is served next, and one who comes anew begins no lower than the least of
those who waited last, so that nobody is owed anything for time without work. Of two owners who both wait,
neither gets ahead by more than the lines in flight cost.
"""

from __future__ import annotations

from collections.abc import Iterable

from omniserve.batch.records import Usage

# What a token costs, as in the paper: one to read, two to write.
INPUT_COST, OUTPUT_COST = 1.0, 2.0
# Weight of the newest line in what lines usually cost.
NEWEST = 0.1


def cost_of(usage: Usage) -> float:
    """Tokens of a line; what a cache held is free."""
    return INPUT_COST * (usage.input_tokens - usage.cached_tokens) + OUTPUT_COST * usage.output_tokens


class FairShare:
    """Counters of owners. A line counts as usual when it starts, and as what it took once that is known."""

    def __init__(self) -> None:
        self._had: dict[str, float] = {}
        self._waiting: frozenset[str] = frozenset()
        self._level = 0.0
        self._usual: dict[str, float] = {}
        self._usual_of_all = 1.0

    def had(self, owner: str) -> float:
        return self._had.get(owner, 0.0)

    def set_waiting(self, owners: Iterable[str]) -> None:
        """Who waits for a place now. Those who did not before are lifted to the least of those who did."""
        waiting = frozenset(owners)
        if self._waiting:
            self._level = max(self._level, min(map(self.had, self._waiting)))
        for owner in waiting - self._waiting:
            self._had[owner] = max(self.had(owner), self._level)
        self._waiting = waiting

    def begin(self, owner: str) -> float:
        """A line of `owner` starts; returns what it counts until it ends."""
        expected = self._usual.get(owner, self._usual_of_all)
        self._had[owner] = self.had(owner) + expected
        return expected

    def end(self, owner: str, expected: float, cost: float | None) -> None:
        """The line took `cost`, or did not run (None)."""
        self._had[owner] += (cost or 0.0) - expected
        if cost is not None:
            usual = self._usual.get(owner, cost)
            self._usual[owner] = self._usual_of_all = usual + NEWEST * (cost - usual)
