"""The last requests that were turned away, and how many there were of each kind. Pure: times are given."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import asdict, dataclass
from typing import Any

MAX_KEPT = 20


@dataclass(frozen=True, slots=True)
class Refusal:
    """at_s: seconds since the epoch. code, why: of the answer. Predicted and target TTFT, where known."""

    at_s: float
    request_id: str
    service_class: str
    code: str
    why: str
    predicted_ttft_s: float | None = None
    target_ttft_s: float | None = None


class RefusalLog:
    """The newest refusals, and counts of all since the server started."""

    def __init__(self) -> None:
        self._last: deque[Refusal] = deque(maxlen=MAX_KEPT)
        self._counts: Counter[tuple[str, str]] = Counter()

    def note(self, refusal: Refusal) -> None:
        self._counts[refusal.service_class, refusal.code] += 1
        self._last.append(refusal)

    def as_plain(self) -> dict[str, Any]:
        """Counts by class and code, the largest first; refusals, the newest first."""
        counts = [
            {"service_class": service_class, "code": code, "count": count}
            for (service_class, code), count in self._counts.most_common()
        ]
        return {"counts": counts, "last": [asdict(refusal) for refusal in reversed(self._last)]}
