"""Requests of every kind that the OpenAPI document allows, and many that it does not: no fault inside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import checks

from omniserve.batch.service import BatchService
from omniserve.config import EngineConfig
from omniserve.engine.async_llm import AsyncLLM
from omniserve.server.app import make_app
from omniserve.server.dashboard.watch import Watch
from omniserve.server.endpoints import make_endpoints
from omniserve.server.engine_keeper import EngineKeeper
from omniserve.server.settings import ServerConfig
from omniserve.types import DEFAULT_CLASSES
from server.processes import SMALL, Served, serving

# Hundreds of requests.
pytestmark = pytest.mark.slow

CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def scratch(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of its own: best-effort work is paused and drained on it, and files come and go."""
    state = str(tmp_path_factory.mktemp("scratch") / "state")
    with serving(str(tiny_model), "--served-model-name", "tiny", "--state-dir", state, *SMALL) as one:
        yield one


def document() -> Any:
    """Of a server with everything, none of which is started."""
    config = ServerConfig()
    endpoints = make_endpoints(config, EngineConfig(), EngineKeeper(AsyncLLM), ["tiny"])
    batches = cast("BatchService", object())
    watch = Watch(endpoints, DEFAULT_CLASSES, "tiny", batches)
    return make_app(config, endpoints, ["tiny"], batches, watch).openapi()


schema = schemathesis.openapi.from_dict(document())


@schema.parametrize()
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_no_request_finds_a_fault_inside(case: Any, scratch: Served) -> None:
    if isinstance(case.body, dict) and isinstance(case.body.get("n"), int):
        case.body["n"] = min(case.body["n"], 2)
    case.call_and_validate(scratch.base_url, checks=CHECKS, timeout=60)
    faults = [i for i, line in enumerate(scratch.lines) if "Traceback" in line]
    assert not faults, "".join(scratch.lines[faults[0] - 1 :][:60])
