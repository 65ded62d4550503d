"""History: the last plans with their reasons, and the last refusals. Plain data, readable at run time."""

from __future__ import annotations

from collections import deque
from dataclasses import fields
from typing import Any

from omniserve.policy.explanation import Explanation, LeftOut, Refusal
from omniserve.policy.latency import WalkLoad
from omniserve.policy.plan import Plan

MAX_PLANS = 256
MAX_REFUSALS = 256


class History:
    """Two ring buffers. An entry costs a reference when it is made, and its plain form when somebody asks."""

    def __init__(self) -> None:
        self._plans: deque[tuple[float, Plan]] = deque(maxlen=MAX_PLANS)
        self._refusals: deque[Refusal] = deque(maxlen=MAX_REFUSALS)
        self.num_refused = 0

    def note_plan(self, at_s: float, plan: Plan) -> None:
        self._plans.append((at_s, plan))

    def note_refusal(self, refusal: Refusal) -> None:
        self.num_refused += 1
        self._refusals.append(refusal)

    def slack_s(self) -> float | None:
        """What the newest plan with chats that have targets left of their slack beside their own rows.

        Below 0: they alone take too long. None when no such plan is known.
        """
        whys = (plan.why for _, plan in reversed(self._plans))
        found = next((why for why in whys if why is not None and why.slack_s is not None), None)
        return None if found is None or found.slack_s is None else found.slack_s - found.latency_sensitive_s

    def as_plain(self) -> dict[str, Any]:
        """{"plans": [...], "refusals": [...]}, oldest first. Times on the engine's clock."""
        return {
            "plans": [{"at_s": at_s, **_plain(plan)} for at_s, plan in self._plans],
            "refusals": [_fields(refusal) for refusal in self._refusals],
        }


def _plain(plan: Plan) -> dict[str, Any]:
    moves: dict[str, list[int]] = {}
    for move in plan.moves:
        moves.setdefault(type(move).__name__, []).append(move.request_id)
    return {
        "kind": plan.kind,
        "decodes": list(plan.decodes),
        "chunks": [[chunk.request_id, chunk.start, chunk.num_tokens] for chunk in plan.chunks],
        "lane_starts": list(plan.lane_starts),
        "lane_cap": list(plan.lane_cap),
        "moves": moves,
        "pass_budget_s": plan.budget_s,
        "why": None if plan.why is None else _why(plan.why),
    }


def _why(why: Explanation) -> dict[str, Any]:
    return _fields(why) | {"load": _fields(why.load), "left_out": [_fields(one) for one in why.left_out]}


def _fields(value: Explanation | LeftOut | Refusal | WalkLoad) -> dict[str, Any]:
    """Shallow: the engine stands still while it answers, and `asdict` copies everything."""
    return {field.name: getattr(value, field.name) for field in fields(value)}
