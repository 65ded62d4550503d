"""Signs of life of the engine, and what sends them without holding anybody up."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from conftest import TinyLlama
from omniserve.config import EngineConfig
from omniserve.engine.client import EngineClient
from omniserve.engine.outbox import Outbox
from omniserve.engine.pulse import Pulse
from omniserve.errors import EngineDeadError

SMALL = {"device_threads": 1, "host_offload": "never", "device_memory_bytes": 64 * 1024**2}


def test_a_pulse_is_given_once_in_a_while_however_often_work_goes_by() -> None:
    now, sent = [0.0], []
    pulse = Pulse(lambda: sent.append(now[0]), every_s=1.0, clock=lambda: now[0])
    for step in range(35):
        now[0] = step / 10
        pulse.beat()
        pulse.beat()
    assert sent == [0.0, 1.0, 2.0, 3.0]


def test_a_pulse_goes_on_by_itself_while_nothing_of_ours_goes_by_and_ends_with_that() -> None:
    sent, several = [], threading.Event()

    def send() -> None:
        sent.append(1)
        if len(sent) == 3:
            several.set()

    with Pulse(send, every_s=0.001).by_itself():
        assert several.wait(60)
    count = len(sent)
    time.sleep(0.02)
    assert len(sent) == count


def test_a_sender_is_not_held_up_by_an_end_that_does_not_read_and_nothing_is_lost_or_overtaken() -> None:
    ours, theirs = socket.socketpair()
    outbox = Outbox(ours)
    messages = [bytes([number]) * 100_000 for number in range(30)]
    for message in messages:  # far more than a socket holds; were it to wait, this would never end
        outbox.put(message)
    received = bytearray()
    while len(received) < 3_000_000:
        received += theirs.recv(1 << 20)
    assert received == b"".join(messages)
    outbox.put(b"and on")
    assert theirs.recv(100) == b"and on"
    theirs.close()
    for message in messages:
        outbox.put(message)  # nobody is left to hear
    ours.shutdown(socket.SHUT_RDWR)
    outbox.close()
    ours.close()


def test_closing_ends_a_send_that_nobody_reads() -> None:
    ours, theirs = socket.socketpair()
    outbox = Outbox(ours)
    outbox.put(b"x" * 10_000_000)
    ours.shutdown(socket.SHUT_RDWR)
    outbox.close()
    ours.close()
    theirs.close()


@pytest.mark.slow
def test_an_engine_that_hangs_is_killed_and_one_that_is_idle_is_not(
    tiny_llama: TinyLlama,
) -> None:
    path: Path = tiny_llama()
    client = EngineClient(EngineConfig(model=str(path), **SMALL), path, hang_timeout_s=4.0)
    try:
        time.sleep(6.0)  # longer than it may be silent: it gives signs though it has nothing to do
        assert not client.death.done()
        assert client.silent_s < 4.0
        os.kill(client.pid, signal.SIGSTOP)
        assert "gave no sign of life for 4 s and was killed" in client.death.result(60)
        with pytest.raises(EngineDeadError, match="no sign of life"):
            client.stats()
    finally:
        client.close()
