"""Names of the types that weights, activations and KV may have."""

from __future__ import annotations

from typing import Literal

import torch

FloatName = Literal["float32", "bfloat16", "float16"]

DTYPES: dict[FloatName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> FloatName:
    """The name that settings and the native part use. KeyError for any other type."""
    return _NAMES[dtype]
