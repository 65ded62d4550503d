"""The decoder computes what transformers computes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.reference import causal_attention, decoder_logits, greedy, transformers_model
from omniserve.errors import ModelError
from omniserve.model.decoder import Decoder, Shard
from omniserve.model.loading import load_decoder

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "attention_bias": True, "head_dim": 64}
QWEN2 |= {"hidden_size": 256}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
MIXTRAL = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
MIXTRAL |= {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 96}
QWEN3_MOE = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "mlp_only_layers": []}
QWEN3_MOE |= {"num_experts": 9, "num_experts_per_tok": 4, "moe_intermediate_size": 64}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "one group of 8": {"num_attention_heads": 8, "num_key_value_heads": 1},
    "groups of 3": {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 144},
    "no groups": {"num_key_value_heads": 4},
    "head size 80": {"head_dim": 80},
    "head size 128": {"head_dim": 128},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3 rope": {"rope_scaling": LLAMA3_SCALING, "rope_theta": 500000.0},
    "high theta, large eps": {"rope_theta": 1e6, "rms_norm_eps": 1e-2},
    "dynamic rope": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "yarn rope": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    },
    "yarn rope, every entry": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "truncate": False,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
        }
    },
    "longrope": {
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0 + i / 16 for i in range(32)],
            "long_factor": [2.0 + i / 4 for i in range(32)],
            "original_max_position_embeddings": 512,
        }
    },
    "mistral": MISTRAL | {"sliding_window": 24},
    "mistral without a window": MISTRAL | {"sliding_window": None},
    "mistral, head size derived": MISTRAL | {"head_dim": 64, "hidden_size": 256, "sliding_window": 7},
    "qwen2": QWEN2,
    "qwen2, tied, a window in some layers": QWEN2
    | {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    "qwen3": QWEN3,
    "qwen3, biases, a window in one layer": QWEN3
    | {
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 24,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "mixtral": MIXTRAL,
    "mixtral, a window": MIXTRAL | {"sliding_window": 24, "num_experts_per_tok": 1},
    "qwen3 moe": QWEN3_MOE,
    "qwen3 moe, normalised, a dense layer": QWEN3_MOE | {"norm_topk_prob": True, "mlp_only_layers": [1]},
}
PROMPT = [(7 * i * i + 3 * i + 11) % 256 for i in range(150)]

TinyLlama = Callable[..., Path]


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_logits_equal_those_of_transformers(tiny_llama: TinyLlama, variant: str) -> None:
    path = tiny_llama(**VARIANTS[variant])
    with torch.inference_mode():
        expected = transformers_model(path)(torch.tensor([PROMPT])).logits[0]
    got = decoder_logits(load_decoder(path), PROMPT)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=3e-5 * float(expected.abs().max()))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("variant", ["plain", "biases", "groups of 3", "qwen3", "mixtral", "qwen3 moe"])
def test_bfloat16_is_as_near_to_float32_as_transformers_is(tiny_llama: TinyLlama, variant: str) -> None:
    path = tiny_llama(**VARIANTS[variant])
    wide, narrow = transformers_model(path), transformers_model(path, torch.bfloat16)
    decoder = load_decoder(path, torch.bfloat16)
    ours, theirs = 0.0, 0.0
    # One prompt says little of a mixture: a router that nearly ties sends a row elsewhere.
    for seed in range(8):
        ids = torch.randint(0, decoder.config.vocab_size, (len(PROMPT),), generator=seeded(seed))
        with torch.inference_mode():
            exact, rounded = wide(ids[None]).logits[0], narrow(ids[None]).logits[0].float()
        ours += float((decoder_logits(decoder, ids.tolist()) - exact).abs().mean())
        theirs += float((rounded - exact).abs().mean())
    assert ours < 1.3 * theirs


@pytest.mark.parametrize(
    "text", ["The capital of France is", "def f(x):\n    return x + 1234\n", "é 漢字 🙂"]
)
def test_smollm2_logits_equal_those_of_transformers(
    smollm2_path: Path, smollm2_reference: Any, smollm2_decoder: Decoder, text: str
) -> None:
    from omniserve.model.tokenizer import Tokenizer

    ids = Tokenizer(smollm2_path).encode(text)
    with torch.inference_mode():
        expected = smollm2_reference(torch.tensor([ids])).logits[0]
    got = decoder_logits(smollm2_decoder, ids)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert got.argmax(-1).tolist() == expected.argmax(-1).tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_text_of_tiny_models_is_diverse(tiny_llama: TinyLlama, variant: str) -> None:
    decoder = load_decoder(tiny_llama(**VARIANTS[variant]))
    assert len(set(greedy(decoder, PROMPT[:10], 32))) >= 20


@pytest.mark.parametrize("variant", ["plain", "biases", "qwen3", "mixtral", "qwen3 moe"])
def test_rows_do_not_depend_on_the_rows_beside_them(tiny_llama: TinyLlama, variant: str) -> None:
    decoder = load_decoder(tiny_llama(**VARIANTS[variant]))
    x = torch.randn(17, decoder.config.hidden_size, generator=torch.Generator().manual_seed(1))
    attn = torch.randn(17, decoder.num_heads * decoder.head_dim, generator=torch.Generator().manual_seed(2))
    positions = torch.arange(100, 117)
    whole = [*decoder.pre_attention(1, x, positions), decoder.post_attention(1, attn, x), decoder.logits(x)]
    for row in (slice(0, 1), slice(5, 9), slice(16, 17)):
        part = [
            *decoder.pre_attention(1, x[row], positions[row]),
            decoder.post_attention(1, attn[row], x[row]),
            decoder.logits(x[row]),
        ]
        for one, all_ in zip(part, whole, strict=True):
            assert torch.equal(one, all_[row])


def test_views_of_larger_buffers_are_read_and_never_written(tiny_llama: TinyLlama) -> None:
    decoder = load_decoder(tiny_llama())
    hidden, width = decoder.config.hidden_size, decoder.num_heads * decoder.head_dim
    buffer, results = torch.randn(8, hidden), torch.randn(8, width + 5)
    before = buffer.clone(), results.clone()
    x, attn, positions = buffer[2:6], results[2:6, 5:], torch.arange(4)
    q, _, _ = decoder.pre_attention(0, x, positions)
    expected = decoder.post_attention(0, attn.contiguous(), x.contiguous())
    assert torch.equal(decoder.post_attention(0, attn, x), expected)
    assert torch.equal(q, decoder.pre_attention(0, x.contiguous(), positions)[0])
    assert torch.equal(buffer, before[0])
    assert torch.equal(results, before[1])


@pytest.mark.parametrize("variant", ["plain", "biases", "qwen2", "qwen3", "mixtral"])
def test_two_shards_equal_the_whole_model(tiny_llama: TinyLlama, variant: str) -> None:
    path = tiny_llama(**VARIANTS[variant])
    expected = decoder_logits(load_decoder(path), PROMPT[:20])
    reduce = SummingAllReduce(size=2)
    results: dict[int, Tensor] = {}

    def run(rank: int) -> None:
        shard = Shard(rank, 2)
        decoder = load_decoder(path, shard=shard, all_reduce=lambda x: reduce(rank, x))
        results[rank] = decoder_logits(decoder, PROMPT[:20])

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [0, 1]
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], expected, rtol=0, atol=3e-5 * float(expected.abs().max()))


def test_a_shard_that_does_not_divide_the_heads_is_refused(tiny_llama: TinyLlama) -> None:
    with pytest.raises(ModelError, match="num_key_value_heads 2 cannot be divided by 4"):
        load_decoder(tiny_llama(), shard=Shard(0, 4))
    with pytest.raises(ModelError, match=r"rank 2 is not within 0\.\.1"):
        Shard(2, 2)


class SummingAllReduce:
    """Sums what `size` threads bring; each gets a copy of its own."""

    def __init__(self, size: int) -> None:
        self._parts: list[Tensor | None] = [None] * size
        self._barrier = threading.Barrier(size, timeout=60)

    def __call__(self, rank: int, x: Tensor) -> Tensor:
        self._parts[rank] = x
        self._barrier.wait()
        total = torch.stack([part for part in self._parts if part is not None]).sum(0)
        self._barrier.wait()
        return total


@pytest.fixture(scope="module")
def smollm2_reference(smollm2_path: Path) -> Any:
    return transformers_model(smollm2_path)


@pytest.fixture(scope="module")
def smollm2_decoder(smollm2_path: Path) -> Decoder:
    return load_decoder(smollm2_path, max_model_len=2048)


def test_the_reference_attention_is_causal(tiny_llama: TinyLlama) -> None:
    decoder = load_decoder(tiny_llama())
    q, k, v = (torch.randn(6, heads * decoder.head_dim) for heads in (4, 2, 2))
    whole = causal_attention(decoder, q, k, v)
    part = causal_attention(decoder, q[:4], k[:4], v[:4])
    torch.testing.assert_close(whole[:4], part)
