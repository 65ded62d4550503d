"""From what a user writes after `--model` to a local folder. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from omniserve.errors import ModelError
from omniserve.model import smollm2

# Short name -> function that makes sure the model is in the cache and returns its folder.
NAMED_MODELS: Mapping[str, Callable[[], Path]] = {smollm2.NAME: smollm2.ensure}


def ensure_model(name_or_path: str | Path) -> Path:
    """The folder of a model: a short name (made ready in the cache when it is not there), or a local folder
    with config.json and *.safetensors as `save_pretrained` writes it.

    Raises ModelError for anything else, and when the model cannot be made ready.
    """
    make = NAMED_MODELS.get(str(name_or_path))
    if make is not None:
        return make()
    path = Path(name_or_path).expanduser()
    if not path.is_dir():
        raise ModelError(
            f"model {str(name_or_path)!r} is neither a local folder nor a known name;"
            f" known names: {', '.join(NAMED_MODELS)}"
        )
    if not (path / "config.json").is_file():
        raise ModelError(f"model folder {path} holds no config.json")
    return path.resolve()
