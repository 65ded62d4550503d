"""load_format dummy: random weights of a model's shape, without weight files and without a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TINY_CONFIG
from model.reference import decoder_logits
from omniserve import LLM, ConfigError, ModelError, RequestError, SamplingParams
from omniserve.model import loading
from omniserve.model.decoder import Shard
from omniserve.model.loading import load_decoder

PROMPT = list(range(20))
MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}


class Unpacked:
    """A projection that keeps its weights as they came."""

    num_bytes = 0

    def __init__(self, *weights: torch.Tensor) -> None:
        self.weights = weights


def weights_of(linear: object) -> tuple[torch.Tensor, ...]:
    assert isinstance(linear, Unpacked)
    return linear.weights


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder with config.json alone."""
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG))
    return tmp_path


@pytest.mark.parametrize("entries", [{}, {"attention_bias": True, "mlp_bias": True}, MOE])
def test_a_configuration_is_enough_and_the_weights_are_the_same_each_time(
    bare: Path, entries: dict[str, Any]
) -> None:
    (bare / "config.json").write_text(json.dumps(TINY_CONFIG | entries))
    logits = [decoder_logits(load_decoder(bare, load_format="dummy"), PROMPT) for _ in range(2)]
    assert torch.equal(logits[0], logits[1])
    assert logits[0].isfinite().all()
    assert logits[0].std() > 0


def test_shards_hold_slices_of_the_same_weights(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "make_linear", lambda weight, *_: Unpacked(weight))
    monkeypatch.setattr(loading, "make_gated", lambda gate, up, *_: Unpacked(gate, up))
    whole = load_decoder(bare, load_format="dummy")
    parts = [load_decoder(bare, shard=Shard(rank, 2), load_format="dummy") for rank in range(2)]
    for layer in range(whole.num_layers):
        columns = torch.cat([weights_of(part._layers[layer].o)[0] for part in parts], dim=1)
        assert torch.equal(columns, weights_of(whole._layers[layer].o)[0])
        gated = [weights_of(decoder._layers[layer].mlp.gate_up) for decoder in (whole, *parts)]
        for expected, *rows in zip(*gated, strict=True):  # the gate, then what it multiplies
            assert torch.equal(torch.cat(rows), expected)


def test_without_load_format_dummy_absent_weights_and_tokenizer_are_errors(bare: Path) -> None:
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        load_decoder(bare)
    with pytest.raises(ModelError, match=r"tokenizer\.json: cannot be read"):
        LLM(str(bare), host_offload="never")


@pytest.mark.slow
def test_a_model_without_tokenizer_serves_token_ids_on_both_paths(bare: Path) -> None:
    with LLM(str(bare), load_format="dummy", host_offload="always", dtype="float16") as llm:
        params = SamplingParams(max_tokens=6, ignore_eos=True)
        chat, batch = llm.generate([PROMPT, PROMPT], params, ["latency_sensitive", "best_effort"])
        assert len(chat.token_ids) == len(batch.token_ids) == 6
        assert (chat.text, batch.metrics.num_lane_tokens) == ("", 5)
        with pytest.raises(RequestError, match="no tokenizer; send token ids"):
            llm.generate("hello")


def test_an_unknown_load_format_or_dtype_is_refused(bare: Path) -> None:
    with pytest.raises(ConfigError, match="load_format: 'fast' is none of auto, dummy"):
        LLM(str(bare), load_format="fast")
    with pytest.raises(ConfigError, match="dtype: 'int8' is none of auto, float32, bfloat16, float16"):
        LLM(str(bare), dtype="int8")
