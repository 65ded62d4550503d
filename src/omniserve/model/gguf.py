"""GGUF files: configuration and tokenizer become a transformers folder, once; weights stay in the file.

A folder in the cache stands for the file: config.json, tokenizer files, and gguf.json with the file's path.
Tensors are dequantised some rows at a time while they are loaded, so no float32 copy lies on the disk.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from omniserve.errors import ModelError
from omniserve.model.cache import cache_root, ensure_folder

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader, ReaderTensor

    from omniserve.model.families import ModelConfig

GGUF_POINTER = "gguf.json"
# Raised when what is written changes: old folders are then made anew.
_VERSION = "1"

ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Fields after "<architecture>." that say what the model computes, and are heeded below.
_HEEDED = (
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "block_count", "context_length", "embedding_length",
    "expert_count", "expert_used_count", "feed_forward_length", "rope.dimension_count", "rope.freq_base",
    "rope.scaling.factor", "rope.scaling.finetuned", "rope.scaling.original_context_length",
    "rope.scaling.type", "vocab_size",
)  # fmt: skip

# GGUF name -> transformers name, per layer ("blk.<layer>." -> "model.layers.<layer>.") and global.
_LAYER_NAMES: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GLOBAL_NAMES: Mapping[str, str] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
# Not a weight: one divisor per rotary frequency. It becomes a part of config.json.
_ROPE_DIVISORS = "rope_freqs.weight"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def transformers_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`. ModelError for unknown names."""
    *scope, kind, suffix = gguf_name.split(".")
    try:
        if scope[:1] == ["blk"]:
            return f"model.layers.{int(scope[1])}.{_LAYER_NAMES[kind]}.{suffix}"
        return f"{_GLOBAL_NAMES[kind]}.{suffix}"
    except (KeyError, ValueError, IndexError) as error:
        raise ModelError(
            f"GGUF tensor {gguf_name!r} has no place in a model of a supported family"
        ) from error


def rotary_order(num_rows: int, num_heads: int) -> npt.NDArray[np.intp]:
    """For each row of a q or k projection in transformers' order, its number in llama.cpp's.

    Rotary embedding turns pairs of rows of a head: llama.cpp pairs neighbours (2i, 2i+1), transformers pairs
    halves (i, i + hd/2). Hence [heads, hd/2, 2] -> [heads, 2, hd/2].
    """
    pairs = np.arange(num_rows).reshape(num_heads, num_rows // num_heads // 2, 2)
    return pairs.swapaxes(1, 2).reshape(num_rows)


def field(reader: GGUFReader, name: str, default: Any = None) -> Any:
    """A field's content. Raises ModelError when it is not there and there is no default."""
    found = reader.get_field(name)
    if found is not None:
        return found.contents()
    if default is None:
        raise ModelError(f"GGUF file lacks the field {name!r}")
    return default


def open_reader(file: Path) -> GGUFReader:
    """A reader of `file`, which maps it. Raises ModelError when it is no GGUF file."""
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ModelError(f"{file}: cannot be read as GGUF: {error}") from error


# ---------------------------------------------------------------- the folder that stands for a file


def ensure_gguf(file: Path) -> Path:
    """The folder in the cache that stands for GGUF `file`, made when it is absent or the file has changed."""
    file = file.resolve()
    status = file.stat()
    source = {
        "gguf": str(file),
        "size": str(status.st_size),
        "mtime_ns": str(status.st_mtime_ns),
        "version": _VERSION,
    }
    digest = hashlib.sha256(str(file).encode()).hexdigest()[:12]
    folder = cache_root() / "models" / f"gguf-{file.stem}-{digest}"
    return ensure_folder(folder, source, lambda new: _write_folder(file, new))


def _write_folder(file: Path, folder: Path) -> None:
    reader = open_reader(file)
    try:
        config = gguf_config(reader, file.name)
    except (TypeError, ValueError) as error:  # a list where one number is meant
        raise ModelError(f"{file}: unusable field: {error}") from error
    _write_json(folder / "config.json", config)
    _write_json(folder / GGUF_POINTER, {"path": str(file)})
    _write_tokenizer(reader, file, folder)


def gguf_config(reader: GGUFReader, name: str) -> dict[str, Any]:
    """config.json for the model in the file. Raises ModelError naming what is not supported."""
    kind = field(reader, "general.architecture")
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"{name}: GGUF architecture {kind!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    if int(field(reader, "split.count", 1)) > 1:
        raise ModelError(f"{name}: a GGUF split into several files is not supported; merge it first")
    _refuse_unheeded(reader, kind, name)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise ModelError(f"{name}: GGUF tensor 'token_embd.weight' is missing")
    hidden, vocab = (int(size) for size in tensors["token_embd.weight"].shape)
    heads = int(field(reader, f"{kind}.attention.head_count"))
    head_dim = int(field(reader, f"{kind}.attention.key_length", hidden // heads))
    _check_head_dim(reader, kind, head_dim, name)
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": int(field(reader, f"{kind}.feed_forward_length")),
        "num_hidden_layers": int(field(reader, f"{kind}.block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(field(reader, f"{kind}.attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "max_position_embeddings": int(field(reader, f"{kind}.context_length")),
        # Kept as float32 in the file; written as the shortest decimal that gives the same float32 (1e-05).
        "rms_norm_eps": float(str(np.float32(field(reader, f"{kind}.attention.layer_norm_rms_epsilon")))),
        "rope_theta": float(field(reader, f"{kind}.rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(reader, kind, tensors.get(_ROPE_DIVISORS), name),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": _token_id(reader, "bos"),
        "eos_token_id": [i for i in (_token_id(reader, end) for end in ("eos", "eot")) if i is not None],
    }


def _refuse_unheeded(reader: GGUFReader, kind: str, name: str) -> None:
    """Every field of the architecture is heeded, or is empty, or is refused by name."""
    if experts := int(field(reader, f"{kind}.expert_count", 0)):
        raise ModelError(
            f"{name}: {kind}.expert_count {experts}: mixtures of experts are loaded from safetensors only"
        )
    for full_name in reader.fields:
        scope, _, rest = full_name.partition(".")
        if scope == kind and rest not in _HEEDED and field(reader, full_name):
            raise ModelError(f"{name}: GGUF field {full_name} {field(reader, full_name)!r} is not supported")


def _check_head_dim(reader: GGUFReader, kind: str, head_dim: int, name: str) -> None:
    for other in ("attention.value_length", "rope.dimension_count"):
        found = int(field(reader, f"{kind}.{other}", head_dim))
        if found != head_dim:
            raise ModelError(
                f"{name}: GGUF field {kind}.{other} {found} differs from the head size {head_dim}"
            )


def _rope_scaling(
    reader: GGUFReader, kind: str, divisors: ReaderTensor | None, name: str
) -> dict[str, Any] | None:
    scaling = field(reader, f"{kind}.rope.scaling.type", "none")
    if scaling == "none":
        if divisors is None:
            return None
        return {"rope_type": "divisors", "divisors": [float(d) for d in divisors.data]}
    if divisors is not None or scaling not in ("linear", "yarn"):
        raise ModelError(
            f"{name}: GGUF rope scaling {scaling!r} is not supported; supported: none, linear, yarn"
        )
    rope = {"rope_type": scaling, "factor": float(field(reader, f"{kind}.rope.scaling.factor"))}
    if scaling == "yarn":
        original = int(field(reader, f"{kind}.rope.scaling.original_context_length"))
        rope["original_max_position_embeddings"] = original
    return rope


def _token_id(reader: GGUFReader, token: str) -> int | None:
    found = reader.get_field(f"tokenizer.ggml.{token}_token_id")
    return None if found is None else int(found.contents())


def _write_tokenizer(reader: GGUFReader, file: Path, folder: Path) -> None:
    """The tokenizer files that lie beside the GGUF file; else transformers makes them from its fields."""
    if (file.parent / "tokenizer.json").is_file():
        for name in _TOKENIZER_FILES:
            if (file.parent / name).is_file():
                shutil.copyfile(file.parent / name, folder / name)
        return
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(file.parent), gguf_file=file.name, local_files_only=True, trust_remote_code=False
        )
        tokenizer.save_pretrained(str(folder))
    except Exception as error:  # a converter of another project: it raises what it likes
        raise ModelError(
            f"{file}: its tokenizer cannot be converted: {error};"
            " put the model's tokenizer.json (and tokenizer_config.json) beside the file"
        ) from error
    template = reader.get_field("tokenizer.chat_template")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template.contents(), encoding="utf-8")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- its tensors


class GgufTensors:
    """The tensors of the GGUF file that folder `path` stands for, under their transformers names."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self._file = Path(json.loads((path / GGUF_POINTER).read_text(encoding="utf-8"))["path"])
        self._config = config
        self.where = str(self._file)
        self._tensors: dict[str, ReaderTensor] = {}

    def __enter__(self) -> Self:
        for tensor in open_reader(self._file).tensors:
            if tensor.name != _ROPE_DIVISORS:
                self._tensors[transformers_name(tensor.name)] = tensor
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.clear()

    def names(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def open(self, name: str) -> _GgufTensor:
        tensor, family = self._tensors[name], self._config.family
        shape = tuple(int(size) for size in reversed(tensor.shape))
        order = None
        if family.name == "llama" and name.startswith("model.layers."):
            for projection, heads in (
                (family.q, self._config.num_heads),
                (family.k, self._config.num_kv_heads),
            ):
                if f".{projection}." in name:
                    order = rotary_order(shape[0], heads)
        return _GgufTensor(self.where, tensor, shape, order)


class _GgufTensor:
    """Rows of a quantised matrix are dequantised when they are read."""

    def __init__(
        self, where: str, tensor: ReaderTensor, shape: tuple[int, ...], order: npt.NDArray[np.intp] | None
    ) -> None:
        self.shape = shape
        self._where = where
        self._tensor = tensor
        self._order = order

    def read(self, rows: slice, columns: slice) -> torch.Tensor:
        import torch
        from gguf.quants import dequantize

        data = self._tensor.data
        kept = data[rows] if self._order is None else data[self._order[rows]]
        try:
            values = dequantize(kept, self._tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            kind = self._tensor.tensor_type.name
            raise ModelError(f"{self._where}: tensor {self._tensor.name} of type {kind}: {error}") from error
        values = values if len(self.shape) == 1 else values[:, columns]
        return torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
