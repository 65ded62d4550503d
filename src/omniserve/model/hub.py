"""Hugging Face names: a snapshot of the repository in the hub's own cache.

HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN mean what they mean to huggingface_hub. Only
configuration, tokenizer and safetensors files are fetched; code never is, and none is ever run.
"""

from __future__ import annotations

import re
from pathlib import Path

from omniserve.errors import ModelError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SMALL_FILES = ["*.json", "*.jinja"]
_WEIGHTS = ["*.safetensors"]
# Folders hold other formats, "consolidated" files the same weights again.
_NEVER = ["*/*", "consolidated*"]


def looks_like_a_name(model: str) -> bool:
    """Whether `model` could name a repository: "name" or "organisation/name"."""
    return _NAME.fullmatch(model) is not None


def ensure_snapshot(name: str, revision: str | None, with_weights: bool) -> Path:
    """The folder of repository `name` at `revision` in the hub's cache, fetched when it is not there.

    Raises ModelError saying why it cannot be had and what to do.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = f"model {name!r}" + (f" at revision {revision!r}" if revision else "")
    patterns = _SMALL_FILES + (_WEIGHTS if with_weights else [])
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=_NEVER)
    except GatedRepoError as error:
        raise ModelError(f"{what}: access must be granted on its page first, and HF_TOKEN set") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{what}: there is no such revision") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{what}: there is no such repository, or HF_TOKEN may not read it") from error
    except HFValidationError as error:
        raise ModelError(f"{what}: {error}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ModelError(
            f"{what}: not in the cache, and the hub cannot be reached (or HF_HUB_OFFLINE is set); fetch it"
            f" where there is a network with `omniserve model fetch {name}`, or give a local folder"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(f"{what}: download failed: {error}") from error
    return Path(folder)
