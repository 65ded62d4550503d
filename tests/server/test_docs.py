"""docs/api.md says what the code does: its tables of fields, its endpoints, its codes."""

from __future__ import annotations

import re
from pathlib import Path

from omniserve.config import EngineConfig
from omniserve.engine.async_llm import AsyncLLM
from omniserve.server import fields
from omniserve.server.app import make_app
from omniserve.server.dashboard.watch import Watch
from omniserve.server.endpoints import make_endpoints
from omniserve.server.engine_keeper import EngineKeeper
from omniserve.server.request_models import ChatRequest, CompletionRequest
from omniserve.server.settings import ServerConfig
from omniserve.types import DEFAULT_CLASSES

DOCS = Path(__file__).parents[2] / "docs"
API = (DOCS / "api.md").read_text()


def test_every_field_stands_in_the_table_with_its_support_and_note() -> None:
    shared = [f for f in fields.COMPLETION_FIELDS if f in fields.CHAT_FIELDS]
    for field in (*fields.CHAT_FIELDS, *fields.COMPLETION_FIELDS):
        row = f"| `{field.name}` | {field.support} | {field.note} |"
        assert row in API.splitlines(), row
    documented = re.findall(r"^\| `([a-z_]+)` \| (?:supported|ignored|refused) \|", API, re.MULTILINE)
    both = len(fields.CHAT_FIELDS) + len(fields.COMPLETION_FIELDS) - len(shared)
    assert len(documented) == both, "and no other"


def test_supported_fields_are_those_that_are_read() -> None:
    tables = ((fields.CHAT_FIELDS, ChatRequest), (fields.COMPLETION_FIELDS, CompletionRequest))
    for table, model in tables:
        assert len({f.name for f in table}) == len(table), "each once"
        assert {f.name for f in table if f.support == "supported"} == set(model.model_fields)


def test_every_endpoint_is_documented() -> None:
    config = ServerConfig()
    endpoints = make_endpoints(config, EngineConfig(), EngineKeeper(AsyncLLM), ["tiny"])
    watch = Watch(endpoints, DEFAULT_CLASSES, "tiny", None)
    for path, operations in make_app(config, endpoints, ["tiny"], None, watch).openapi()["paths"].items():
        for method in operations:
            assert f"`{method.upper()} {path}`" in API


def test_every_code_is_documented() -> None:
    folder = Path(fields.__file__).parent
    source = "".join(file.read_text() for file in folder.glob("*.py"))
    given = re.findall(r'code="([a-z_]+)"', source)
    given += re.findall(r'unavailable\([^)]*"([a-z_]+)"\)', source)
    assert len(given) >= 10
    for code in given:
        assert f"`{code}`" in API
