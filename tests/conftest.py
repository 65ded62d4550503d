"""Fixtures shared by all tests: the default model, and random tiny Llamas made without transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# A new find must not fail somebody's unrelated change: where CI is set the examples are the same every time.
# No deadline anywhere: how long an example takes says how busy the machine is.
hypothesis.settings.register_profile("free", deadline=None)
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "free")

# A name that nobody knows must not be asked for on the network. Read by huggingface_hub when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

pytest_plugins = ["engine.tally"]

TinyLlama = Callable[..., Path]

# The default shape: small, grouped queries, a head size that every kernel path takes.
TINY_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
    "dtype": "float32",
}


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Folder of SmolLM2-135M-Instruct, fetched and converted the first time (93 MB)."""
    from omniserve.model.sources import ensure_model

    return ensure_model("smollm2-135m")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    """`tiny_llama(seed=0, **config)` -> folder of a random Llama with tokenizer; one folder per argument set.

    Any entry of TINY_CONFIG can be set. Weights are scaled so that greedy text does not settle on few tokens
    (tests/model/test_parity.py holds that to at least 20 distinct ones in 32).
    """
    made: dict[str, Path] = {}

    def make(seed: int = 0, **config: Any) -> Path:
        key = json.dumps([seed, config], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("tiny-llama")
            write_tiny_llama(folder, seed, TINY_CONFIG | config)
            made[key] = folder
        return made[key]

    return make


def write_tiny_llama(folder: Path, seed: int, config: dict[str, Any]) -> None:
    """A transformers folder with float32 weights drawn from N(0, std^2): see `_std`."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator) * _std(name, shape) + ("norm" in name)
        for name, shape in _shapes(config)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    _write_byte_tokenizer(folder, config)


_GAINS = {"q_proj": 1.5, "k_proj": 1.5, "o_proj": 3.0, "down_proj": 6.0, "w2": 6.0}


def _std(name: str, shape: tuple[int, ...]) -> float:
    """Queries and keys are large, so that attention is peaked and the text depends on it; what the layers add
    outweighs the embedding, so that the model does not repeat the token it was given; norms stay near 1."""
    if "norm" in name or name.endswith(".bias"):
        return 0.1
    if "embed" in name or "lm_head" in name:
        return 0.3
    return _GAINS.get(name.split(".")[-2], 1.0) / shape[-1] ** 0.5


def _shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = config["hidden_size"]
    family = config["model_type"]
    has_qkv_bias = config["attention_bias"] or family == "qwen2"
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        attention = dict.fromkeys(("k_proj", "v_proj"), (kv, hidden))
        attention |= {"q_proj": (q, hidden), "o_proj": (hidden, q)}
        for name, shape in attention.items():
            yield f"{prefix}self_attn.{name}.weight", shape
            if has_qkv_bias and (name != "o_proj" or family != "qwen2"):
                yield f"{prefix}self_attn.{name}.bias", shape[:1]
        if family.startswith("qwen3"):
            yield f"{prefix}self_attn.q_norm.weight", (config["head_dim"],)
            yield f"{prefix}self_attn.k_norm.weight", (config["head_dim"],)
        for name, shape in _mlp_shapes(config, layer):
            yield f"{prefix}{name}.weight", shape
            if config["mlp_bias"]:
                yield f"{prefix}{name}.bias", shape[:1]
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def _mlp_shapes(config: dict[str, Any], layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Of one gated MLP, or of a router and experts, under the names of their family on the hub."""
    hidden, inner, family = config["hidden_size"], config["intermediate_size"], config["model_type"]
    block, names, count = "mlp.", ("gate_proj", "up_proj", "down_proj"), 0
    if family == "mixtral":
        block, names, count = "block_sparse_moe.", ("w1", "w3", "w2"), config["num_local_experts"]
    elif family == "qwen3_moe" and layer not in config["mlp_only_layers"]:
        inner, count = config["moe_intermediate_size"], config["num_experts"]
    if count:
        yield block + "gate", (count, hidden)
    for prefix in [f"{block}experts.{expert}." for expert in range(count)] or [block]:
        for name, shape in zip(names, ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True):
            yield prefix + name, shape


def _write_byte_tokenizer(folder: Path, config: dict[str, Any]) -> None:
    """Tokens 0..255 are bytes, then <bos>, <eos>; ids above decode to words that encoding never gives."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"w{i}" for i in range(config["vocab_size"])]
    tokens = [*alphabet, "<bos>", "<eos>", *words][: config["vocab_size"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<bos>", "<eos>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
