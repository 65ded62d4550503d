"""The record of a walk: which rows were in the batch at which layer."""

from __future__ import annotations

from collections.abc import Callable

from engine.driver import BE, LS, Subject
from engine.scripted import ScriptedEngine
from omniserve.engine.records import LayerTrace


def test_lanes_ride_one_walk_at_different_layers(tiny_subject: Callable[..., Subject]) -> None:
    """LS request `chat` walks all three layers. Lane `ahead` waits at layer 2 and lane `behind` at layer 0;
    each enters where it waits, and `behind` leaves again at layer 1."""
    run = ScriptedEngine(tiny_subject(), host_offload="always", device_memory_bytes=1 << 24)
    executor = run.executor
    ahead = run.add([5, 6, 7, 8], 4, BE)
    serve_until_waiting(run, layer=0)
    for layer in (1, 2):
        run.serve(0)
        run.step()  # a pass
        assert [at for at, _ in run.host.pending()] == [layer]
    run.add([9, 10, 11], 4, BE)
    serve_until_waiting(run, layer=0)
    behind = max(run.asked)
    chat = run.add([12, 13], 4, LS)
    run.step()  # the prompt of `chat`; nothing has been served, so no lane moves
    run.host.serve_all()
    executor.trace = []
    run.step()
    walk = executor.trace[0].walk
    assert executor.trace == [
        LayerTrace(walk, 0, (chat,), (behind,)),
        LayerTrace(walk, 1, (chat,), ()),
        LayerTrace(walk, 2, (chat,), (ahead,)),
    ]
    run.finish()
    run.assert_exact()
    run.close()


def serve_until_waiting(run: ScriptedEngine, layer: int) -> None:
    """Steps, with copies served and no task, until a row waits at `layer`."""
    while layer not in [at for at, _ in run.host.pending()]:
        run.host.serve_copies()
        run.step()
