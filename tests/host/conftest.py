"""Fixtures of the tests around the segment."""

import os
from collections.abc import Iterator

import pytest

from host.lane_rig import MAX_LANES, Rig


@pytest.fixture
def rig() -> Rig:
    rig = Rig()
    for slot in range(MAX_LANES):
        rig.open_lane(slot)
        rig.start_token(slot)
    return rig


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)
