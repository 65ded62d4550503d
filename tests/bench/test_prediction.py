"""The prediction benchmark's report: every walk counts, and each model is judged before it learns."""

from __future__ import annotations

import pytest
from rich.console import Console

from omniserve.bench.prediction import Watched, as_report, show
from omniserve.policy.latency_model import LatencyModel
from policy.latency_fits import decodes, small_fit


def test_the_fitted_model_stays_and_the_learning_one_follows() -> None:
    watched = Watched(LatencyModel(small_fit()), LatencyModel(small_fit()))
    load = decodes(8, 500)
    expected_s = watched.fitted.walk_s(load, False)
    for _ in range(50):
        watched.observe(load, False, 2 * expected_s)
    report = as_report(watched, [(1.0, 1.0), (1.0, 2.0)])
    row = report["kinds"]["decode, host idle"]
    assert row["as_fitted"] == {"count": 50, "mean": pytest.approx(0.5), "p90": pytest.approx(0.5)}
    assert row["corrected"]["count"] == 50
    assert row["corrected"]["mean"] > 0.9
    assert row["mean_s"] == pytest.approx(2 * expected_s)
    assert report["overall"] == row
    assert report["noise_floor"]["mean"] == 0.75


def test_the_table_names_every_kind_and_the_noise_floor(capsys: pytest.CaptureFixture[str]) -> None:
    watched = Watched(LatencyModel(small_fit()), LatencyModel(small_fit()))
    watched.observe(decodes(1, 1), True, 0.02)
    report = as_report(watched, [(1.0, 1.0)]) | {"cores_of_others": 0.0}
    show(report, Console(width=200))
    shown = capsys.readouterr().out
    assert "decode, host busy" in shown
    assert "overall" in shown
    assert "noise floor: one plan 1 times against its median: mean 100.0%" in shown
