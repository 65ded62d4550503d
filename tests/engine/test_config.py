"""What settings mean that leave a choice open."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from omniserve import config
from omniserve.types import BEST_EFFORT, LATENCY_SENSITIVE, SLO

SLOW = SLO(1.0, 0.1)
TARGETS = (replace(LATENCY_SENSITIVE, slo=SLOW), BEST_EFFORT)
# No target of its own, but requests may bring some.
TIGHTEST_ONLY = (replace(LATENCY_SENSITIVE, tightest=SLOW), BEST_EFFORT)


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({}, config.DEVICE_ROWS),
        ({"classes": TARGETS}, config.DEVICE_ROWS_WITH_TARGETS),
        ({"classes": TIGHTEST_ONLY}, config.DEVICE_ROWS_WITH_TARGETS),
        ({"classes": TARGETS, "policy": "paper"}, config.DEVICE_ROWS_WITH_TARGETS),
        ({"classes": TARGETS, "calibrate": "never"}, config.DEVICE_ROWS),
        ({"classes": TARGETS, "policy": "sarathi", "host_offload": "never"}, config.DEVICE_ROWS),
        ({"classes": TARGETS, "calibrate": "never", "max_num_batched_tokens": 9}, 9),
    ],
)
def test_walks_are_large_only_where_predictions_bound_them(settings: dict[str, Any], rows: int) -> None:
    assert config.EngineConfig(**settings).max_device_rows == rows
