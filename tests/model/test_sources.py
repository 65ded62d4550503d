"""What may stand after --model: hub names through the hub's cache, folders, files; errors say what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omniserve.errors import ModelError
from omniserve.model import hub
from omniserve.model.sources import ensure_model

TinyLlama = Callable[..., Path]
COMMITS = {"main": "a" * 40, "v2": "b" * 40}
NAME = "some-org/tiny-model"


@pytest.fixture
def hub_home(tiny_llama: TinyLlama, tmp_path: Path) -> Path:
    """An HF_HOME that holds two revisions of one repository, as huggingface_hub lays them out."""
    repository = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    for seed, (revision, commit) in enumerate(COMMITS.items()):
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(tiny_llama(seed), repository / "snapshots" / commit)
    return tmp_path


def fetch(home: Path, *arguments: str, offline: bool = True) -> subprocess.CompletedProcess[str]:
    """`omniserve model fetch` in a process of its own: the hub reads its environment when it is imported."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1" if offline else "0"}
    if not offline:
        environment["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody listens there
    command = [sys.executable, "-m", "omniserve.cli", "model", "fetch", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_hub_name_is_found_in_the_cache_of_hf_home_without_a_network(hub_home: Path) -> None:
    done = fetch(hub_home, NAME)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.strip()).name == COMMITS["main"]


def test_a_revision_chooses_its_snapshot(hub_home: Path) -> None:
    assert Path(fetch(hub_home, NAME, "--revision", "v2").stdout.strip()).name == COMMITS["v2"]
    by_commit = fetch(hub_home, NAME, "--revision", COMMITS["v2"])
    assert Path(by_commit.stdout.strip()).name == COMMITS["v2"]


def test_a_name_that_is_not_cached_says_so_and_what_to_do(hub_home: Path) -> None:
    done = fetch(hub_home, "some-org/absent")
    assert done.returncode == 1
    assert done.stderr.startswith("omniserve: model 'some-org/absent': not in the cache, and the hub cannot")
    assert "omniserve model fetch some-org/absent" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_cached_name_is_served_while_the_hub_is_away(hub_home: Path) -> None:
    done = fetch(hub_home, NAME, offline=False)
    assert Path(done.stdout.strip().splitlines()[-1]).name == COMMITS["main"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tiny_llama: TinyLlama) -> list[dict[str, Any]]:
    """What the hub's download was asked for; it answers with a tiny model."""
    calls: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        calls.append({"name": name, **options})
        return str(tiny_llama())

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return calls


def test_code_pickles_and_second_copies_are_never_fetched(
    asked: list[dict[str, Any]], tiny_llama: TinyLlama
) -> None:
    from huggingface_hub.utils import filter_repo_objects

    assert ensure_model(NAME, revision="v2") == tiny_llama()
    (call,) = asked
    assert (call["name"], call["revision"]) == (NAME, "v2")
    wanted = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "chat_template.jinja"]
    refused = ["modeling_llama.py", "pytorch_model.bin", "consolidated.safetensors", "original/params.json"]
    patterns = {key: call[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(wanted + refused, **patterns)) == wanted


def test_without_weights_no_weight_file_is_fetched(asked: list[dict[str, Any]]) -> None:
    ensure_model(NAME, with_weights=False)
    assert not any("safetensors" in pattern for pattern in asked[0]["allow_patterns"])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("RepositoryNotFoundError", "there is no such repository, or HF_TOKEN may not read it"),
        ("GatedRepoError", "access must be granted on its page first"),
        ("RevisionNotFoundError", "at revision 'v9': there is no such revision"),
        ("HfHubHTTPError", "download failed: the server said no"),
        ("LocalEntryNotFoundError", "not in the cache"),
    ],
)
def test_what_the_hub_answers_becomes_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, kind: str, message: str
) -> None:
    import httpx2 as httpx
    from huggingface_hub import errors

    def download(name: str, **options: Any) -> str:
        error_type = getattr(errors, kind)
        if kind == "LocalEntryNotFoundError":
            raise error_type("nothing here")
        raise error_type(
            "the server said no", response=httpx.Response(404, request=httpx.Request("GET", "x:"))
        )

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ModelError, match=message):
        ensure_model(NAME, revision="v9")


@pytest.mark.parametrize("name", ["gpt2", "some-org/model", "a/b.c-d_1"])
def test_names_are_told_from_paths(name: str) -> None:
    assert hub.looks_like_a_name(name)
    for path in (f"./{name}", f"/{name}", f"{name}/deeper/still", f"~/{name}", f"{name}/"):
        assert not hub.looks_like_a_name(path)


def test_a_revision_of_something_without_revisions_is_refused(tiny_llama: TinyLlama) -> None:
    for model in (tiny_llama(), "smollm2-135m"):
        with pytest.raises(ModelError, match="only Hugging Face names have revisions"):
            ensure_model(model, revision="main")


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    for model in (tmp_path / "weights.bin", tmp_path / "absent.gguf"):
        with pytest.raises(
            ModelError, match="neither a local folder, nor a GGUF file, nor a Hugging Face name"
        ):
            ensure_model(model)
