"""The mailbox between the reader thread and event loops."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from omniserve.engine.mailbox import TURN, Mailbox

NUM_THREADS, NUM_EACH = 4, 5000


class WaitingLoop(asyncio.SelectorEventLoop):
    """Only counts what it is asked to call."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Callable[[], None]] = []

    def call_soon_threadsafe(self, callback: Any, *arguments: Any, context: Any = None) -> Any:
        self.asked.append(callback)

    call_soon = call_soon_threadsafe


def test_what_comes_together_wakes_the_loop_once() -> None:
    loop, received = WaitingLoop(), list[int]()
    mailbox = Mailbox(loop)
    for number in range(TURN):
        mailbox.put(received.append, number)
    (deliver,) = loop.asked
    assert received == []
    deliver()
    assert received == list(range(TURN))
    mailbox.put(received.append, TURN)
    assert len(loop.asked) == 2
    loop.close()


def test_the_loop_may_look_at_its_sockets_between_turns() -> None:
    loop, received = WaitingLoop(), list[int]()
    mailbox = Mailbox(loop)
    for number in range(2 * TURN + 1):
        mailbox.put(received.append, number)
    seen = []
    for deliver in loop.asked:
        deliver()
        seen.append(len(received))
    assert seen == [TURN, 2 * TURN, 2 * TURN + 1]
    assert received == list(range(2 * TURN + 1))
    loop.close()


def test_what_is_put_while_mail_is_handed_out_comes_too() -> None:
    loop, received = WaitingLoop(), list[int]()
    mailbox = Mailbox(loop)

    def receive(number: int) -> None:
        received.append(number)
        if number:
            mailbox.put(receive, number - 1)

    mailbox.put(receive, 3)
    for deliver in loop.asked:
        deliver()
    assert received == [3, 2, 1, 0]
    loop.close()


def test_nothing_from_other_threads_is_lost_or_changes_its_order() -> None:
    async def story() -> list[list[int]]:
        received: list[list[int]] = [[] for _ in range(NUM_THREADS)]
        mailbox, is_over = Mailbox(asyncio.get_running_loop()), asyncio.Event()
        num_open = NUM_THREADS

        def leave(_: None) -> None:
            nonlocal num_open
            num_open -= 1
            if not num_open:
                is_over.set()

        def send(at: int) -> None:
            for number in range(NUM_EACH):
                mailbox.put(received[at].append, number)
            mailbox.put(leave, None)

        threads = [threading.Thread(target=send, args=(at,)) for at in range(NUM_THREADS)]
        for thread in threads:
            thread.start()
        async with asyncio.timeout(60):
            await is_over.wait()
        for thread in threads:
            thread.join()
        return received

    assert asyncio.run(story()) == [list(range(NUM_EACH))] * NUM_THREADS


def test_whoever_puts_hears_that_the_loop_is_closed() -> None:
    loop = asyncio.new_event_loop()
    mailbox = Mailbox(loop)
    loop.close()
    with pytest.raises(RuntimeError, match="closed"):
        mailbox.put(print, None)
