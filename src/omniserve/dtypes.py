"""Names of the types that weights, activations and KV may have."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """The name that settings and the native part use: "float32", "bfloat16" or "float16"."""
    return str(dtype).removeprefix("torch.")
