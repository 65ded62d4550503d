"""What the served model is called."""

from __future__ import annotations

from pathlib import Path

from omniserve.config import EngineConfig
from omniserve.server.settings import ServerConfig


def own_name(engine_config: EngineConfig) -> str:
    """The model's own name. Of one in a local folder: the folder's, not its place."""
    model = engine_config.model
    return Path(model).resolve().name if Path(model).exists() else model


def model_names(config: ServerConfig, engine_config: EngineConfig) -> tuple[str, ...]:
    """Names that clients may use, the first one for answers."""
    return config.served_model_name or (own_name(engine_config),)
