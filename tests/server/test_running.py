"""What is told of requests that run: how long they wait, and which are late already."""

from __future__ import annotations

from dataclasses import dataclass, replace

from omniserve.server.running import Running, RunningSnapshot
from omniserve.types import BEST_EFFORT, LATENCY_SENSITIVE, SLO

CHAT, FLEX = LATENCY_SENSITIVE.name, BEST_EFFORT.name
CLASSES = {CHAT: replace(LATENCY_SENSITIVE, slo=SLO(1.0, 0.1)), FLEX: BEST_EFFORT}
NOTHING = RunningSnapshot(0, None, 0, 0, None)


@dataclass(frozen=True)
class Request:
    silent_since_s: float
    has_token: bool = False
    service_class: str = CHAT
    slo: SLO | None = None


def test_the_longest_wait_and_gap_of_each_class_show_while_a_request_is_held() -> None:
    running = Running()
    with running.hold(Request(90.0)), running.hold(Request(99.5)), running.hold(Request(98.0, True)):
        with running.hold(Request(60.0, service_class=FLEX)):
            found = running.snapshot(CLASSES, 100.0)
            assert found[FLEX] == RunningSnapshot(1, 40.0, 0, 0, None), "without a target none is late"
        found = running.snapshot(CLASSES, 100.0)
        assert found == {CHAT: RunningSnapshot(2, 10.0, 1, 1, 2.0), FLEX: NOTHING}
    assert running.snapshot(CLASSES, 100.0) == {CHAT: NOTHING, FLEX: NOTHING}


def test_late_is_measured_by_the_targets_a_request_brought() -> None:
    running = Running()
    with running.hold(Request(90.0, slo=SLO(20.0, 1.0))):
        assert running.snapshot(CLASSES, 100.0)[CHAT].num_late == 0
        assert running.snapshot(CLASSES, 111.0)[CHAT].num_late == 1
