"""A GGUF file gives the logits of the weights in it; what the file says and nobody heeds is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file, save_file

from model.reference import decoder_logits
from omniserve.errors import ModelError
from omniserve.model import gguf
from omniserve.model.families import read_model_config
from omniserve.model.loading import load_decoder
from omniserve.model.rope import RopeScaling, rope_table
from omniserve.model.sources import ensure_model
from omniserve.model.tokenizer import Tokenizer

TinyLlama = Callable[..., Path]
PROMPT = list(range(20))
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "attention_bias": True,
    "hidden_size": 256,
    "head_dim": 64,
}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
Q = GGMLQuantizationType


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNISERVE_CACHE", str(tmp_path / "cache"))


def write_gguf(
    file: Path,
    model: Path,
    quantisation: Q = Q.F32,
    fields: dict[str, Any] | None = None,
    tensors: dict[str, npt.NDArray[np.float32]] | None = None,
    with_tokenizer: bool = True,
) -> Path:
    """Write the transformers folder `model` as llama.cpp's converter would; matrices in `quantisation`.

    `fields` replace or add, None removes.
    """
    config = json.loads((model / "config.json").read_text())
    arch = config["model_type"]
    values: dict[str, Any] = {
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": config["hidden_size"],
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.attention.head_count": config["num_attention_heads"],
        f"{arch}.attention.head_count_kv": config["num_key_value_heads"],
        f"{arch}.attention.key_length": config["head_dim"],
        f"{arch}.attention.value_length": config["head_dim"],
        f"{arch}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{arch}.rope.freq_base": config["rope_theta"],
        "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
    }
    if arch == "llama":
        values["llama.rope.dimension_count"] = config["head_dim"]
    values |= fields or {}
    writer = GGUFWriter(file, str(values.pop("general.architecture", arch)))
    for name, value in values.items():
        _add_field(writer, name, value)
    if with_tokenizer:
        _add_tokenizer(writer, model)
    for name, tensor in (load_file(model / "model.safetensors") | (tensors or {})).items():
        _add_tensor(writer, name, tensor, config, quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_field(writer: GGUFWriter, name: str, value: Any) -> None:
    match value:
        case None:
            pass
        case str():
            writer.add_string(name, value)
        case float():
            writer.add_float32(name, value)
        case list():
            writer.add_array(name, value)
        case _:
            writer.add_uint32(name, value)


def _add_tokenizer(writer: GGUFWriter, model: Path) -> None:
    """As it is in the folder: bytes and two control tokens."""
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    texts = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types([3 if text in ("<bos>", "<eos>") else 1 for text in texts])
    writer.add_token_merges(["w 1", "w 2"])
    writer.add_chat_template("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}")


def _add_tensor(
    writer: GGUFWriter,
    name: str,
    tensor: npt.NDArray[np.float32],
    config: dict[str, Any],
    quantisation: Q,
) -> None:
    to_gguf = {v: k for k, v in (gguf._LAYER_NAMES | gguf._GLOBAL_NAMES).items()}
    prefix, stem, suffix = "", name.rpartition(".")[0], name.rpartition(".")[2]
    if stem.startswith("model.layers."):
        layer, stem = stem.removeprefix("model.layers.").split(".", 1)
        prefix = f"blk.{layer}."
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(stem.split(".")[-1])
        if heads is not None and config["model_type"] == "llama":
            # llama.cpp's order: neighbours are a pair.
            halves = tensor.reshape(config[heads], 2, -1, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
    target = name if stem not in to_gguf else f"{prefix}{to_gguf[stem]}.{suffix}"
    kind = quantisation if tensor.ndim == 2 else Q.F32
    writer.add_tensor(target, quantize(np.ascontiguousarray(tensor), kind), raw_dtype=kind)


@pytest.mark.parametrize(
    "config",
    [{}, {"tie_word_embeddings": True, "attention_bias": True}, QWEN2, QWEN3],
    ids=["llama", "llama, tied, biases", "qwen2", "qwen3"],
)
def test_unquantised_weights_give_the_logits_of_the_folder_they_came_from(
    tiny_llama: TinyLlama, tmp_path: Path, config: dict[str, Any]
) -> None:
    model = tiny_llama(**config)
    folder = ensure_model(write_gguf(tmp_path / "model.gguf", model))
    theirs, ours = read_model_config(model), read_model_config(folder)
    assert ours == theirs
    assert torch.equal(
        decoder_logits(load_decoder(folder), PROMPT), decoder_logits(load_decoder(model), PROMPT)
    )


@pytest.mark.parametrize("quantisation", [Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q5_1], ids=lambda q: q.name)
def test_quantised_weights_give_the_logits_of_their_values(
    tiny_llama: TinyLlama, tmp_path: Path, quantisation: Q
) -> None:
    model = tiny_llama()
    folder = ensure_model(write_gguf(tmp_path / "model.gguf", model, quantisation))
    rounded = Path(shutil.copytree(model, tmp_path / "rounded"))
    tensors = {
        name: dequantize(quantize(tensor, quantisation), quantisation) if tensor.ndim == 2 else tensor
        for name, tensor in load_file(model / "model.safetensors").items()
    }
    save_file(tensors, rounded / "model.safetensors")
    expected = decoder_logits(load_decoder(rounded), PROMPT)
    assert torch.equal(decoder_logits(load_decoder(folder), PROMPT), expected)
    assert not torch.equal(expected, decoder_logits(load_decoder(model), PROMPT))


@pytest.mark.parametrize("config", [{}, QWEN2], ids=["llama", "qwen2"])
def test_logits_equal_those_of_transformers_for_the_same_file(
    tiny_llama: TinyLlama, tmp_path: Path, config: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    file = write_gguf(tmp_path / "model.gguf", tiny_llama(**config), Q.Q8_0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    with torch.inference_mode():
        expected = model.eval()(torch.tensor([PROMPT])).logits[0]
    got = decoder_logits(load_decoder(ensure_model(file)), PROMPT)
    torch.testing.assert_close(got, expected, rtol=0, atol=3e-5 * float(expected.abs().max()))


def test_the_tokenizer_of_the_file_is_that_of_the_folder(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    model = tiny_llama()
    ours = Tokenizer(ensure_model(write_gguf(tmp_path / "model.gguf", model)))
    theirs = Tokenizer(model)
    for text in ("Hello, world!", "é 漢字 🙂", "  two  spaces <eos>"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    assert ours.eos_token_ids == theirs.eos_token_ids
    assert ours.apply_chat_template([{"role": "user", "content": "hi"}]) == "[user] hi"


def test_tokenizer_files_beside_the_file_come_first(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    model = tiny_llama()
    file = write_gguf(tmp_path / "model.gguf", model, with_tokenizer=False)
    with pytest.raises(ModelError, match=r"cannot be converted.*put the model's tokenizer\.json"):
        ensure_model(file)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model / name, tmp_path / name)
    folder = ensure_model(file)
    assert (folder / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert Tokenizer(folder).has_chat_template


def test_weights_stay_in_the_file_and_a_changed_file_is_read_anew(
    tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "model.gguf", tiny_llama())
    folder = ensure_model(file)
    made = (folder / "config.json").stat().st_mtime_ns
    assert not list(folder.glob("*.safetensors"))
    assert ensure_model(file) == folder
    assert (folder / "config.json").stat().st_mtime_ns == made
    write_gguf(file, tiny_llama(), fields={"llama.context_length": 128})
    assert read_model_config(ensure_model(file)).max_position_embeddings == 128


def test_two_stop_tokens_of_a_chat_model_are_both_heeded(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", tiny_llama(), fields={"tokenizer.ggml.eot_token_id": 256})
    assert read_model_config(ensure_model(file)).eos_token_ids == (257, 256)


def test_rope_divisors_of_the_file_are_llama3_scaling(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    llama3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    plain, scaled = (rope_table(64, 5e5, scaling, 2)[:, 1, 0, 0] for scaling in (None, llama3))
    angles = [torch.atan2(-table[1], table[0]) for table in (plain, scaled)]  # of position 1: frequencies
    divisors = (angles[0] / angles[1]).numpy().astype(np.float32)
    file = write_gguf(
        tmp_path / "m.gguf",
        tiny_llama(),
        fields={"llama.rope.freq_base": 5e5},
        tensors={"rope_freqs.weight": divisors},
    )
    folder = ensure_model(file)
    scaling = read_model_config(folder).rope_scaling
    torch.testing.assert_close(
        rope_table(64, 5e5, scaling, 300), rope_table(64, 5e5, llama3, 300), rtol=0, atol=1e-4
    )
    load_decoder(folder)  # the divisors are no unexpected tensor


def test_linear_and_yarn_scaling_are_read(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    scaling = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    scaling["llama.rope.scaling.original_context_length"] = 1024
    file = write_gguf(tmp_path / "yarn.gguf", tiny_llama(), fields=scaling)
    found = read_model_config(ensure_model(file)).rope_scaling
    assert found is not None
    assert (found.kind, found.factor, found.original_max_position_embeddings) == ("yarn", 4.0, 1024)
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    file = write_gguf(tmp_path / "linear.gguf", tiny_llama(), fields=scaling)
    assert read_model_config(ensure_model(file)).rope_scaling == RopeScaling("linear", 2.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"general.architecture": "gemma2"}, "GGUF architecture 'gemma2' is not supported; supported: llama"),
        ({"llama.expert_count": 8}, "expert_count 8: mixtures of experts are loaded from safetensors only"),
        (
            {"llama.attention.sliding_window": 4096},
            r"field llama\.attention\.sliding_window 4096 is not supported",
        ),
        ({"llama.attn_logit_softcapping": 50.0}, r"llama\.attn_logit_softcapping 50\.0 is not supported"),
        ({"llama.rope.dimension_count": 32}, r"rope\.dimension_count 32 differs from the head size 64"),
        ({"llama.rope.scaling.type": "longrope"}, "rope scaling 'longrope' is not supported"),
        ({"split.count": 2}, "split into several files"),
        ({"llama.block_count": None}, r"lacks the field 'llama\.block_count'"),
        ({"llama.attention.head_count_kv": [2, 2, 1]}, "unusable field"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tiny_llama: TinyLlama, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    file = write_gguf(tmp_path / "m.gguf", tiny_llama(), fields=fields)
    with pytest.raises(ModelError, match=message):
        ensure_model(file)


def test_an_unknown_tensor_and_a_file_that_is_no_gguf_are_refused(
    tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    extra = {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}
    folder = ensure_model(write_gguf(tmp_path / "m.gguf", tiny_llama(), tensors=extra))
    with pytest.raises(ModelError, match=r"'blk\.0\.attn_sinks\.weight' has no place"):
        load_decoder(folder)
    (tmp_path / "no.gguf").write_bytes(b"GGUFGGUF" * 100)
    with pytest.raises(ModelError, match=r"no\.gguf: cannot be read as GGUF"):
        ensure_model(tmp_path / "no.gguf")
