"""Service classes, their targets and clamps."""

from __future__ import annotations

import math

import pytest

from omniserve.config import EngineConfig
from omniserve.engine.acceptance import check_service
from omniserve.errors import ConfigError, RequestError
from omniserve.policy.terms import walk_bound_s
from omniserve.types import BEST_EFFORT, DEFAULT_CLASSES, LATENCY_SENSITIVE, SLO, ServiceClass

CHAT = ServiceClass("chat", 0, False, SLO(1.0, 0.1), tightest=SLO(0.5, 0.05), loosest=SLO(4.0, 0.4))
PATIENT = ServiceClass("patient", 1, False, SLO(5.0, 0.5))


def test_any_number_of_classes_may_have_targets() -> None:
    config = EngineConfig(classes=(CHAT, PATIENT, BEST_EFFORT))
    assert check_service(config, "patient", None, None) is PATIENT
    assert walk_bound_s(config.classes) == 0.125, "a quarter of the tightest TTFT that anybody may ask for"
    assert walk_bound_s(DEFAULT_CLASSES) is None


def test_a_request_may_bring_its_own_targets_within_the_clamp() -> None:
    assert CHAT.slo_of(None) == SLO(1.0, 0.1)
    assert CHAT.slo_of(SLO(0.5, 0.4)) == SLO(0.5, 0.4)


@pytest.mark.parametrize("own", [SLO(0.4, 0.1), SLO(1.0, 0.04), SLO(4.1, 0.1), SLO(1.0, 0.5)])
def test_targets_outside_the_clamp_are_refused_with_the_clamp(own: SLO) -> None:
    with pytest.raises(RequestError, match=r"ttft_s 0\.5, tpot_s 0\.05 to ttft_s 4, tpot_s 0\.4"):
        CHAT.slo_of(own)


def test_without_a_clamp_nobody_is_faster_than_its_class() -> None:
    assert PATIENT.slo_of(SLO(50.0, 0.5)) == SLO(50.0, 0.5)
    with pytest.raises(RequestError, match="outside the clamp of class 'patient'"):
        PATIENT.slo_of(SLO(4.9, 0.5))


def test_a_class_without_targets_gives_none() -> None:
    with pytest.raises(RequestError, match="has no targets"):
        LATENCY_SENSITIVE.slo_of(SLO(1.0, 0.1))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, "1", None])
def test_targets_are_seconds_above_zero(value: object) -> None:
    with pytest.raises(RequestError, match="ttft_s must be a number of seconds above 0"):
        SLO(value, 0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ((), "at least one ServiceClass"),
        ((CHAT, CHAT), "a name of its own"),
        ((CHAT, ServiceClass("bulk", 0, True)), "higher rank than all others"),
        ((CHAT, ServiceClass("bulk", 9, True, SLO(1.0, 1.0))), "best-effort and can have no targets"),
        ((ServiceClass("chat", 0, False, SLO(1.0, 0.1), tightest=SLO(2.0, 0.1)),), "outside its own clamp"),
        (
            (ServiceClass("chat", 0, False, None, tightest=SLO(2.0, 0.1), loosest=SLO(1.0, 0.1)),),
            "the clamp of 'chat' is empty",
        ),
    ],
)
def test_classes_that_cannot_be_served_are_refused(classes: tuple[ServiceClass, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(classes=classes)


def test_only_best_effort_jobs_have_a_completion_window() -> None:
    config = EngineConfig()
    check_service(config, "best_effort", None, 3600.0)
    with pytest.raises(RequestError, match="completion_window_s"):
        check_service(config, "latency_sensitive", None, 3600.0)
    with pytest.raises(RequestError, match="above 0"):
        check_service(config, "best_effort", None, -5.0)


def test_ls_only_refuses_best_effort_requests_at_once() -> None:
    config = EngineConfig(policy="ls_only", host_offload="never")
    with pytest.raises(RequestError, match="serves no best-effort work"):
        check_service(config, "best_effort", None, None)
