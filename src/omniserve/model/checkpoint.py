"""Where tensors come from: safetensors files, a GGUF file, or nowhere (random ones of the right shape).

A source gives tensors by their transformers name, lazily: nothing is read before rows are asked for.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from omniserve.errors import ModelError
from omniserve.model.families import ModelConfig
from omniserve.model.gguf import GGUF_POINTER, GgufTensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Standard deviation of random weights.
_DUMMY_STD = 0.02
_DUMMY_BLOCK_ROWS = 256


class LazyTensor(Protocol):
    """A tensor of one or two dimensions that is not in memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, rows: slice, columns: slice) -> Tensor:
        """Those rows and columns (a vector has no columns); start and stop are given. New memory."""


class TensorSource(Protocol):
    """Tensors by name. A context manager that closes its files."""

    @property
    def where(self) -> str:
        """What errors call it."""

    def names(self) -> Iterator[str]: ...

    def __contains__(self, name: str) -> bool: ...

    def open(self, name: str) -> LazyTensor: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def open_checkpoint(path: Path, config: ModelConfig) -> TensorSource:
    """The tensors of model folder `path`: of its GGUF file, where it stands for one, or its safetensors.

    Raises ModelError naming the file that is missing.
    """
    if (path / GGUF_POINTER).is_file():
        return GgufTensors(path, config)
    return SafetensorsFiles(path)


class SafetensorsFiles:
    """One safetensors file, or several with an index."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self._path = path
        self._stack = ExitStack()
        self._owner: dict[str, Any] = {}

    def __enter__(self) -> Self:
        try:
            for file in _safetensors_files(self._path):
                self._add(file)
        except BaseException:
            self._stack.close()
            raise
        return self

    def _add(self, file: Path) -> None:
        try:
            opened = self._stack.enter_context(safe_open(file, framework="pt", device="cpu"))
            self._owner.update(dict.fromkeys(opened.keys(), opened))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file}: weights cannot be read: {error}") from error

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def names(self) -> Iterator[str]:
        return iter(self._owner)

    def __contains__(self, name: str) -> bool:
        return name in self._owner

    def open(self, name: str) -> LazyTensor:
        return _Slice(self._owner[name].get_slice(name))


class _Slice:
    def __init__(self, lazy: Any) -> None:
        self._lazy = lazy
        self.shape: tuple[int, ...] = tuple(lazy.get_shape())

    def read(self, rows: slice, columns: slice) -> Tensor:
        found: Tensor = self._lazy[rows] if len(self.shape) == 1 else self._lazy[rows, columns]
        return found


def _safetensors_files(path: Path) -> list[Path]:
    index = path / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index}: not a safetensors index: {error!r}") from error
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise ModelError(
                f"{index}: {len(missing)} of {len(names)} files it names are not there: {missing[0]}"
            )
        return [path / name for name in names]
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    pickled = sorted(file.name for file in path.glob("*.bin"))
    hint = f"; {pickled[0]} is a pickle, which is never loaded: convert it to safetensors" if pickled else ""
    raise ModelError(f"{path}: neither {SINGLE} nor {INDEX} found{hint}")


class DummyTensors:
    """Random weights: norms 1, biases 0, matrices N(0, 0.02^2). A tensor is the same in every process."""

    def __init__(self, names: Sequence[str], shape_of: Callable[[str], tuple[int, ...]]) -> None:
        self.where = "load_format dummy"
        self._names = frozenset(names)
        self._shape_of = shape_of

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def names(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def open(self, name: str) -> LazyTensor:
        return _RandomTensor(name, self._shape_of(name))


class _RandomTensor:
    """Blocks of rows, each with a seed of its own, so that any part can be had without the rest."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._name = name

    def read(self, rows: slice, columns: slice) -> Tensor:
        if len(self.shape) == 1:
            return torch.full((rows.stop - rows.start,), 0.0 if self._name.endswith(".bias") else 1.0)
        first = rows.start // _DUMMY_BLOCK_ROWS
        blocks = [self._block(block) for block in range(first, -(-rows.stop // _DUMMY_BLOCK_ROWS))]
        offset = first * _DUMMY_BLOCK_ROWS
        return torch.cat(blocks)[rows.start - offset : rows.stop - offset, columns]

    def _block(self, block: int) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._name}/{block}".encode()))
        rows = min(_DUMMY_BLOCK_ROWS, self.shape[0] - block * _DUMMY_BLOCK_ROWS)
        return torch.randn(rows, self.shape[1], generator=generator) * _DUMMY_STD
