"""From what a user writes after `--model` to a local folder. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from omniserve.errors import ModelError
from omniserve.model import smollm2
from omniserve.model.gguf import ensure_gguf
from omniserve.model.hub import ensure_snapshot, looks_like_a_name

# Short name -> function that makes sure the model is in the cache and returns its folder.
NAMED_MODELS: Mapping[str, Callable[[], Path]] = {smollm2.NAME: smollm2.ensure}


def ensure_model(name_or_path: str | Path, revision: str | None = None, with_weights: bool = True) -> Path:
    """The folder of a model, made ready when it is not there.

    A short name; a local folder with config.json and *.safetensors as `save_pretrained` writes it; a GGUF
    file; or a Hugging Face name, of which `revision` is fetched, without weight files unless `with_weights`.
    Raises ModelError for anything else, and when the model cannot be made ready.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    is_hub_name = name not in NAMED_MODELS and not path.exists() and looks_like_a_name(name)
    if revision is not None and not is_hub_name:
        raise ModelError(
            f"revision {revision!r}: only Hugging Face names have revisions, and {name!r} is none"
        )
    if name in NAMED_MODELS:
        return NAMED_MODELS[name]()
    if path.is_dir():
        folder = path.resolve()
    elif path.suffix == ".gguf" and path.is_file():
        return ensure_gguf(path)
    elif is_hub_name and path.suffix != ".gguf":
        try:
            folder = ensure_snapshot(name, revision, with_weights)
        except ModelError as error:
            raise ModelError(f"{error}; names known without the hub: {', '.join(NAMED_MODELS)}") from error
    else:
        raise ModelError(
            f"model {name!r} is neither a local folder, nor a GGUF file, nor a Hugging Face name, nor a known"
            f" name; known names: {', '.join(NAMED_MODELS)}"
        )
    if not (folder / "config.json").is_file():
        raise ModelError(f"model folder {folder} holds no config.json")
    return folder
