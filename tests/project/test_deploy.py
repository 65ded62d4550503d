"""deploy/ agrees with the program: flags, variables, ports and probes are the server's; stops are patient."""

from __future__ import annotations

import configparser
import fnmatch
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

from omniserve import cli
from omniserve.batch.runner import STOP_TIMEOUT_S
from omniserve.engine.client import CLOSE_TIMEOUT_S
from omniserve.server.app import make_app
from omniserve.server.dashboard.watch import Watch
from omniserve.server.endpoints import make_endpoints
from omniserve.server.engine_keeper import EngineKeeper
from omniserve.server.flags import ENV_PREFIX, Settings, all_settings, read_settings
from omniserve.server.run import CLOSE_S
from omniserve.server.settings import ServerConfig

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
UNIT = DEPLOY / "systemd" / "omniserve.service"
EXAMPLE = DEPLOY / "omniserve.yaml"
# Of variables that are no settings of the server.
OTHER_VARIABLES = {"OMNISERVE_CACHE"}
# What a stop takes after the grace time, at most: connections, results of batches, engine.
CLOSING_S = CLOSE_S + STOP_TIMEOUT_S + CLOSE_TIMEOUT_S


def read(*arguments: str, **variables: str) -> Settings:
    """Settings of a command line, as `omniserve` reads it."""
    return read_settings(cli._parser().parse_args(arguments), variables)


def is_variable(name: str) -> bool:
    return name in OTHER_VARIABLES | {setting.variable for setting in all_settings()}


def server_paths() -> set[str]:
    config = ServerConfig()
    settings = read("serve")

    def never() -> Any:
        raise AssertionError

    endpoints = make_endpoints(config, settings.engine, EngineKeeper(never), ["m"])
    watch = Watch(endpoints, settings.engine.classes, "m", None)
    return set(make_app(config, endpoints, ["m"], None, watch).openapi()["paths"])


# ---------------------------------------------------------------- example of a configuration


def test_the_example_of_a_configuration_is_read() -> None:
    settings = read("serve", "--config", str(EXAMPLE))
    assert settings.server.state_dir == Path("/var/lib/omniserve")
    assert settings.server.is_loopback, "nobody opens a server to others by copying a file"
    assert settings.engine.classes[0].slo is not None


def test_what_is_commented_out_in_the_example_can_be_used_too(tmp_path: Path) -> None:
    text = EXAMPLE.read_text()
    opened = re.sub(r"^# ((?:  )*(?:- )?[a-z-]+: ?.*)$", r"\1", text, flags=re.MULTILINE)
    assert opened.count("\n#") < text.count("\n#") - 15, "they were opened"
    file = tmp_path / "all.yaml"
    file.write_text(opened)
    settings = read("serve", "--config", str(file))
    assert [key.owner for key in settings.server.api_keys] == ["team", "team", None]
    assert settings.engine.host_mlock is True


# ---------------------------------------------------------------- image


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile, with lines joined and comments gone: (name, rest)."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]  # type: ignore[misc]


def last(name: str) -> str:
    return [rest for kind, rest in instructions() if kind == name][-1]


def image_variables() -> dict[str, str]:
    return dict(word.split("=", 1) for word in last("ENV").split())


def is_sent(path: str) -> bool:
    """Whether .dockerignore lets a file of the checkout into the build: its last matching line decides."""
    decided = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip().removeprefix("!")
        if not pattern or line.startswith("#"):
            continue
        names = [path, *map(str, PurePosixPath(path).parents)]
        patterns = [pattern, pattern.removeprefix("**/")] if pattern.startswith("**/") else [pattern]
        bases = [*names, PurePosixPath(path).name] if pattern.startswith("**/") else names
        if any(fnmatch.fnmatchcase(name, one) for name in bases for one in patterns):
            decided = line.startswith("!")
    return decided


def test_the_image_is_sent_what_it_copies_and_nothing_that_was_built() -> None:
    copied = []
    for kind, rest in instructions():
        if kind == "COPY" and "--from=" not in rest:
            copied += rest.split()[:-1]
    assert {"pyproject.toml", "src", "CMakeLists.txt"} <= set(copied)
    for source in copied:
        path = ROOT / source
        assert path.exists(), source
        files = [path] if path.is_file() else [f for f in path.rglob("*.py") if "__pycache__" not in f.parts]
        assert files
        assert all(is_sent(file.relative_to(ROOT).as_posix()) for file in files), source
    for name in (
        ".git/HEAD",
        ".venv/bin/python",
        "src/omniserve/_native.so",
        "tests/conftest.py",
        "dist/a.whl",
    ):
        assert not is_sent(name), name


def test_the_image_runs_as_nobody_special_and_keeps_everything_in_one_volume() -> None:
    user, variables = last("USER"), image_variables()
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "a number: Kubernetes can see that it is not root"
    assert f"--uid {user.split(':')[0]} " in last("RUN") + str(instructions())
    (volume,) = [rest for kind, rest in instructions() if kind == "VOLUME"]
    for name in ("OMNISERVE_STATE_DIR", "OMNISERVE_CACHE", "HF_HOME"):
        assert Path(variables[name]).is_relative_to(volume)
    assert variables["OMNISERVE_STATE_DIR"] != volume, "a mount point may belong to somebody else"
    assert last("STOPSIGNAL") == "SIGTERM"


def test_the_images_variables_are_settings() -> None:
    variables = {name: value for name, value in image_variables().items() if name.startswith(ENV_PREFIX)}
    assert all(map(is_variable, variables))
    command = json.loads(last("ENTRYPOINT")) + json.loads(last("CMD"))
    assert command[-2:] == ["omniserve", "serve"]
    server = read("serve", **variables).server
    assert str(server.port) == last("EXPOSE")
    assert server.host == "0.0.0.0", "a container's loopback is its own"


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A server that answers /health so, and anything else with 404; its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_the_images_health_check_tells_a_well_server_from_an_ill_or_absent_one() -> None:
    command = json.loads(last("HEALTHCHECK").partition(" CMD ")[2])

    def is_well(port: int) -> bool:
        environment = os.environ | {"OMNISERVE_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
        words = [sys.executable, *command[1:]]
        return subprocess.run(words, env=environment, stderr=subprocess.DEVNULL).returncode == 0

    assert command[0] == "python"
    assert "/health" in server_paths()
    with answering(200) as port:
        assert is_well(port)
    assert not is_well(port), "nobody listens there now"
    with answering(503) as port:
        assert not is_well(port)


# ---------------------------------------------------------------- systemd


@pytest.fixture
def service() -> dict[str, str]:
    """The unit's section Service; of keys that are given twice the last."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(UNIT)
    return dict(parser["Service"])


def test_the_unit_starts_a_server_of_the_example_without_keys_on_its_command_line(
    service: dict[str, str],
) -> None:
    program, *arguments = service["ExecStart"].split()
    assert Path(program).name == "omniserve"
    assert "key" not in " ".join(arguments)
    source = service["LoadCredential"].partition(":")[0]
    folder = "${CREDENTIALS_DIRECTORY}/"
    assert arguments[-1] == folder + source
    read(*[a.replace(folder + source, str(EXAMPLE)) for a in arguments])
    assert service["EnvironmentFile"].startswith("-"), "a server without keys is one too"
    assert "OMNISERVE_CACHE=" in service["Environment"]


def test_the_unit_waits_longer_than_a_stop_takes(service: dict[str, str]) -> None:
    grace_s = read("serve", "--config", str(EXAMPLE)).server.grace_s
    assert float(service["TimeoutStopSec"]) > grace_s + CLOSING_S
    assert service["KillMode"] == "mixed", "SIGTERM is for the server, which ends its engine"
    assert service["Restart"] == "on-failure"


def test_the_units_state_directory_is_that_of_the_example(service: dict[str, str]) -> None:
    state_dir = read("serve", "--config", str(EXAMPLE)).server.state_dir
    assert Path("/var/lib") / service["StateDirectory"] == state_dir
    assert service["StateDirectoryMode"] == "0700"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name  # its program need not be installed here
    copy.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text(), flags=re.MULTILINE))
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert UNIT.name not in done.stderr, done.stderr


# ---------------------------------------------------------------- Kubernetes


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    """By kind; there is one of each."""
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "omniserve.yaml").read_text()))
    found = {document["kind"]: document for document in documents}
    assert len(found) == len(documents)
    return found


@pytest.fixture(scope="module")
def pod(objects: dict[str, Any]) -> dict[str, Any]:
    return dict(objects["Deployment"]["spec"]["template"]["spec"])


@pytest.fixture(scope="module")
def container(pod: dict[str, Any]) -> dict[str, Any]:
    (one,) = pod["containers"]
    return dict(one)


@pytest.fixture(scope="module")
def pod_settings(container: dict[str, Any]) -> Settings:
    """What the server in the pod reads: the image's variables, the pod's, its arguments."""
    secrets = {entry["name"]: f"secret-{i}" for i, entry in enumerate(container["env"])}
    assert all(map(is_variable, secrets))
    variables = {n: v for n, v in image_variables().items() if n.startswith(ENV_PREFIX)}
    return read(*container["args"], **variables | secrets)


def test_there_is_one_writer_of_a_volume_at_a_time(objects: dict[str, Any]) -> None:
    spec = objects["Deployment"]["spec"]
    assert spec["replicas"] == 1
    assert spec["strategy"] == {"type": "Recreate"}
    assert objects["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteOncePod"]


def test_ports_probes_and_annotations_are_the_servers(
    objects: dict[str, Any], container: dict[str, Any], pod_settings: Settings
) -> None:
    port = pod_settings.server.port
    assert container["ports"] == [{"name": "http", "containerPort": port}]
    probes = {
        name: container[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")
    }
    assert {probe["port"] for probe in probes.values()} == {"http"}
    assert [probe["path"] for probe in probes.values()] == ["/health", "/health", "/ready"]
    annotations = objects["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(port)
    assert {probe["path"] for probe in probes.values()} | {
        annotations["prometheus.io/path"]
    } <= server_paths()
    (of_service,) = objects["Service"]["spec"]["ports"]
    assert of_service["targetPort"] == "http"


def test_the_pod_is_reached_by_others_only_with_keys(
    container: dict[str, Any], pod_settings: Settings
) -> None:
    assert pod_settings.server.host == "0.0.0.0"
    assert len(pod_settings.server.api_keys) == 1
    assert pod_settings.server.admin_key
    assert all("secretKeyRef" in entry["valueFrom"] for entry in container["env"])


def test_the_pod_is_given_longer_than_a_stop_takes(
    pod: dict[str, Any], container: dict[str, Any], pod_settings: Settings
) -> None:
    command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    needed_s = float(seconds) + pod_settings.server.grace_s + CLOSING_S
    assert pod["terminationGracePeriodSeconds"] > needed_s


def test_what_the_pod_writes_lies_in_its_volume_and_it_may_write_there(
    objects: dict[str, Any], pod: dict[str, Any], container: dict[str, Any], pod_settings: Settings
) -> None:
    mounts = {mount["name"]: Path(mount["mountPath"]) for mount in container["volumeMounts"]}
    assert mounts["state"] == Path(last("VOLUME"))
    assert pod_settings.server.state_dir is not None
    assert pod_settings.server.state_dir.is_relative_to(mounts["state"])
    (claim,) = [v["persistentVolumeClaim"] for v in pod["volumes"] if v["name"] == "state"]
    assert claim["claimName"] == objects["PersistentVolumeClaim"]["metadata"]["name"]
    user = int(last("USER").split(":")[0])
    security = pod["securityContext"]
    assert (security["runAsUser"], security["fsGroup"], security["runAsNonRoot"]) == (user, user, True)


def test_labels_select_the_pod(objects: dict[str, Any]) -> None:
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert objects["Service"]["spec"]["selector"].items() <= labels.items()
    assert objects["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_the_pod_asks_for_whole_cpus_of_its_own(container: dict[str, Any]) -> None:
    resources = container["resources"]
    assert resources["requests"] == resources["limits"]
    assert int(resources["limits"]["cpu"]) >= 2
