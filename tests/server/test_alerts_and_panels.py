"""What lies in deploy/ and docs/metrics.md is held to the exposition of a real server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from omniserve.config import EngineConfig, split_cpus
from omniserve.engine.build import choose_dtype, model_len
from omniserve.engine.calibration import profile_key, profile_path, profiled_rows
from omniserve.model.families import read_model_config
from omniserve.model.loading import load_decoder
from omniserve.types import BEST_EFFORT, LATENCY_SENSITIVE, SLO, ServiceClass
from policy.latency_fits import small_fit
from server.processes import serving

MIB = 1024**2
ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "deploy/grafana/omniserve.json").read_text())
ALERTS = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
DOCUMENT = (ROOT / "docs/metrics.md").read_text()

ALERT_NAMES = {
    "OmniServeDown",
    "OmniServeNotReady",
    "OmniServeAttainmentLow",
    "OmniServePredictionOff",
    "OmniServeHostDown",
    "OmniServeLaneStuck",
    "OmniServeEngineRestarting",
    "OmniServeEngineSilent",
    "OmniServeBatchLinesGivenUp",
    "OmniServeBatchOverdue",
    "OmniServeStateDiskFull",
    "OmniServeBestEffortStarved",
}
# Series that have no sample until something happens that one chat and one flex request are not.
UNTIL_REFUSED = {"omniserve:refused", "omniserve:unserved"}
UNTIL_A_BATCH = {"omniserve:batch_lines_per_second", "omniserve:batch_eta_seconds"}
# Prometheus's own, of each scrape.
OF_PROMETHEUS = {"up"}
# Where a unit is what is counted, base units stand at the end of the name.
ABBREVIATED = re.compile(r"_(ms|s|sec|secs|millis|milliseconds|mb|kb|gb|kib|mib|gib|percent|pct)(_|$)")


# ---------------------------------------------------------------- a real exposition


def put_profile(model: str, config: EngineConfig) -> None:
    """A latency profile of round numbers where an engine of this model looks for it: nothing is measured."""
    path = Path(model)
    shape = read_model_config(path)
    max_model_len = model_len(config, shape)
    decoder = load_decoder(path, choose_dtype(config, shape), max_model_len=max_model_len)
    assert config.max_num_batched_tokens == profiled_rows(config)
    key = profile_key(config, decoder, split_cpus(config), max_model_len)
    fit = small_fit(num_layers=decoder.num_layers, key=key)
    profile_path(key).parent.mkdir(parents=True, exist_ok=True)
    profile_path(key).write_text(json.dumps(fit.to_json()))


@pytest.fixture(scope="module")
def exposition(
    tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Metric]:
    """Families by name, after one chat and one flex request, of a server with targets, a host and a state
    directory."""
    folder = tmp_path_factory.mktemp("metrics")
    model = str(tiny_llama(max_position_embeddings=512))
    classes = (
        ServiceClass("latency_sensitive", LATENCY_SENSITIVE.rank, False, SLO(60.0, 10.0)),
        BEST_EFFORT,
    )
    config = EngineConfig(
        model=model,
        classes=classes,
        device_threads=1,
        host_threads=1,
        host_offload="always",
        max_num_batched_tokens=64,
    )
    flags = ("--slo-ttft-s", "60", "--slo-tpot-s", "10", "--device-threads", "1", "--host-threads", "1")
    flags += ("--host-offload", "always", "--max-num-batched-tokens", "64")
    flags += ("--device-memory-bytes", str(64 * MIB), "--host-memory-bytes", str(64 * MIB))
    flags += ("--state-dir", str(folder / "state"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMNISERVE_CACHE", str(folder / "cache"))
        put_profile(model, config)
        with serving(model, "--served-model-name", "tiny", *flags) as server, server.client() as client:
            for tier in ("default", "flex"):
                answer = client.chat.completions.create(
                    model="tiny",
                    messages=[{"role": "user", "content": "Hello"}],
                    service_tier=tier,
                    max_tokens=8,
                    extra_body={"ignore_eos": True},
                )
                assert answer.choices[0].finish_reason == "length"
            text = server.get("/metrics").text
        assert len(list((folder / "cache" / "profiles").glob("*.json"))) == 1, "the engine found it"
    return {family.name: family for family in text_string_to_metric_families(text)}


def is_ours(name: str) -> bool:
    return name.startswith(("omniserve:", "vllm:")) and not name.endswith("_created")


def shown_name(family: Metric) -> str:
    """As people write it: counters with their ending."""
    return family.name + ("_total" if family.type == "counter" else "")


def sample_names(exposition: Mapping[str, Metric]) -> set[str]:
    """Names that queries may use, of series without a sample so far too."""
    endings = {"histogram": ("_bucket", "_count", "_sum"), "counter": ("_total",), "gauge": ("",)}
    return {f.name + end for f in exposition.values() for end in endings[f.type]}


def labels_of(family: Metric) -> set[str]:
    return {label for sample in family.samples for label in sample.labels} - {"le"}


def test_every_series_has_a_sample_once_a_chat_and_a_flex_request_were_served(
    exposition: dict[str, Metric],
) -> None:
    empty = {name for name, family in exposition.items() if not family.samples}
    assert empty == UNTIL_REFUSED | UNTIL_A_BATCH


def test_a_chat_and_a_flex_request_show_where_they_should(exposition: dict[str, Metric]) -> None:
    def value(name: str, **labels: str) -> float:
        (found,) = (
            s.value
            for family in exposition.values()
            for s in family.samples
            if s.name == name and s.labels == labels
        )
        return float(found)

    assert value("omniserve:slo_met_total", service_class="latency_sensitive") == 1
    assert value("omniserve:attainment_ratio", service_class="latency_sensitive") == 1
    harvested = [value("omniserve:harvested_tokens_total", path=path) for path in ("lane", "device")]
    assert (harvested[0] > 0, sum(harvested)) == (True, 8)
    assert value("omniserve:swap_bytes_total", direction="out") > 0
    assert value("omniserve:host_up") == value("omniserve:ready") == value("omniserve:promises_slo") == 1
    assert value("vllm:generation_tokens_total", model_name="tiny", engine="0") == 8, "of the chat alone"
    chats = {name for name in sample_names(exposition) if re.match("vllm:request_.*_count", name)}
    assert len(chats) == 11
    for name in chats:
        assert value(name, model_name="tiny", engine="0") == 1, f"{name}: of the chat alone"


def test_names_and_types_follow_the_conventions(exposition: dict[str, Metric]) -> None:
    """Prometheus's: a help text, base units, `_total` on counters alone, no reserved endings and labels."""
    for name, family in exposition.items():
        if not name.startswith("omniserve:") or name.endswith("_created"):
            continue
        assert family.documentation.strip(), name
        assert family.type in ("counter", "gauge", "histogram"), name
        assert re.fullmatch(r"omniserve:[a-z][a-z0-9]*(_[a-z0-9]+)*", name)
        assert not ABBREVIATED.search(name), name
        if family.type != "counter":
            assert not name.endswith(("_total", "_count", "_sum", "_bucket", "_info")), name
        assert labels_of(family).isdisjoint({"quantile", "instance", "job"}), name


# ---------------------------------------------------------------- the documentation


def documented() -> dict[str, tuple[str, set[str]]]:
    rows = re.findall(r"^\| `([a-z]+:[a-z0-9_]+)` \| (\w+) \|([^|]*)\|", DOCUMENT, re.MULTILINE)
    assert len({row[0] for row in rows}) == len(rows), "each once"
    return {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def test_every_series_is_documented_with_its_type_and_labels_and_no_other(
    exposition: dict[str, Metric],
) -> None:
    shown = {shown_name(f): f for name, f in exposition.items() if is_ours(name)}
    table = documented()
    assert table.keys() == shown.keys()
    for name, family in shown.items():
        assert table[name][0] == family.type, name
        if family.samples:
            assert table[name][1] == labels_of(family), name


# ---------------------------------------------------------------- queries


def selectors(query: str) -> list[tuple[str, dict[str, str]]]:
    """Series and exact label values that a query asks for; raises on a query that is none."""
    for variable, stand_in in (("$__rate_interval", "5m"), ("$__range", "1h"), ("$instance", ".*")):
        query = query.replace(variable, stand_in)
    found: list[tuple[str, dict[str, str]]] = []

    def visit(node: object) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            equal = promql_parser.MatchOp.Equal
            found.append((node.name, {m.name: m.value for m in node.matchers.matchers if m.op == equal}))

    promql_parser.walk(promql_parser.parse(query), visit)
    assert found, query
    return found


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def dashboard_queries() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def rules() -> list[dict[str, Any]]:
    return [rule for group in ALERTS["groups"] for rule in group["rules"]]


@pytest.mark.parametrize("query", [*dashboard_queries(), *(rule["expr"] for rule in rules())])
def test_every_query_asks_for_what_a_server_shows(query: str, exposition: dict[str, Metric]) -> None:
    names = sample_names(exposition)
    samples = [s for family in exposition.values() for s in family.samples]
    for name, exact in selectors(query):
        if name in OF_PROMETHEUS:
            continue
        assert name in names
        assert any(s.name == name and exact.items() <= s.labels.items() for s in samples) or any(
            name.startswith(family) for family in UNTIL_REFUSED | UNTIL_A_BATCH
        ), f"nothing has the labels of {name}{exact}"


def test_the_dashboard_shows_every_series_of_ours(exposition: dict[str, Metric]) -> None:
    asked = {name for query in dashboard_queries() for name, _ in selectors(query)}
    for name, family in exposition.items():
        if name.startswith("omniserve:") and is_ours(name):
            ending = "_bucket" if family.type == "histogram" else ""
            assert shown_name(family) + ending in asked


def test_the_dashboard_can_be_imported_anywhere() -> None:
    assert DASHBOARD["id"] is None, "Grafana gives it one"
    (source,) = (v for v in DASHBOARD["templating"]["list"] if v["type"] == "datasource")
    assert (source["name"], source["query"]) == ("datasource", "prometheus")
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    own = {"type": "prometheus", "uid": "${datasource}"}
    for panel in panels():
        assert panel["datasource"] == own
        assert all(target["datasource"] == own for target in panel["targets"])
        assert panel["description"], panel["title"]


def test_no_two_panels_of_the_dashboard_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert max(x for x, _ in cells) < 24
        assert taken.isdisjoint(cells), panel["title"]
        taken |= cells


def test_alerts_have_their_names_and_lead_to_their_line_of_the_runbook() -> None:
    assert {rule["alert"] for rule in rules()} == ALERT_NAMES
    assert len(rules()) == len(ALERT_NAMES)
    for rule in rules():
        annotations = rule["annotations"]
        assert annotations["summary"]
        assert annotations["description"]
        assert annotations["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("warning", "critical")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool comes with Prometheus")
def test_alerts_fire_when_they_should_and_only_then() -> None:
    for command in ("check", "test"):
        file = "alerts.yml" if command == "check" else "alerts_test.yml"
        arguments = ["promtool", command, "rules", str(ROOT / "deploy/prometheus" / file)]
        ran = subprocess.run(arguments, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
