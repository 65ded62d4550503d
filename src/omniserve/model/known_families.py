"""Model families as data: what each does differently from Llama, and how it names its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """How a family names a mixture of experts, and where its configuration says what it is like.

    `expert` is formatted with the number of the expert and put between the layer's prefix and gate, up, down.
    """

    router: str
    expert: str
    gate: str
    up: str
    down: str
    count_field: str
    size_field: str
    # Whether the weights of the chosen experts are scaled to sum to 1; None: norm_topk_prob says.
    is_normalised: bool | None


@dataclass(frozen=True, slots=True)
class Family:
    """What one family does differently from Llama. Projections get `.weight`, and `.bias` if they have one.

    `layer_prefix` is formatted with the layer number and put before every per-layer name.
    """

    name: str
    architecture: str
    # What the format takes an absent entry of config.json for.
    defaults: Mapping[str, Any] = field(default_factory=dict)
    # Biases of q, k, v and of o; None: attention_bias says.
    qkv_bias: bool | None = None
    o_bias: bool | None = None
    # Whether mlp_bias is an entry of the family.
    has_mlp_bias: bool = False
    # Whether heads of q and k are normalised before the rotary embedding.
    has_qk_norm: bool = False
    # Layers with a sliding window: none, all where sliding_window is set, all where use_sliding_window is
    # true as well, or those that layer_types or max_window_layers names.
    window_layers: Literal["none", "all", "if used", "named"] = "none"
    experts: ExpertNames | None = None

    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    lm_head: str = "lm_head.weight"
    layer_prefix: str = "model.layers.{layer}."
    input_norm: str = "input_layernorm.weight"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm.weight"
    k_norm: str = "self_attn.k_norm.weight"
    post_norm: str = "post_attention_layernorm.weight"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    # Tensors that old checkpoints carry and nobody needs.
    ignored_suffixes: tuple[str, ...] = ("rotary_emb.inv_freq",)


LLAMA = Family("llama", "LlamaForCausalLM", has_mlp_bias=True)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    qkv_bias=False,
    o_bias=False,
    window_layers="all",
)
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    defaults={"sliding_window": 4096, "max_window_layers": 28},
    qkv_bias=True,
    o_bias=False,
    window_layers="named",
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    defaults={"head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    has_qk_norm=True,
    window_layers="named",
)
MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    defaults={
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    qkv_bias=False,
    o_bias=False,
    window_layers="all",
    experts=ExpertNames(
        router="block_sparse_moe.gate.weight",
        expert="block_sparse_moe.experts.{expert}.",
        gate="w1",
        up="w3",
        down="w2",
        count_field="num_local_experts",
        size_field="intermediate_size",
        is_normalised=True,
    ),
)
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    defaults={
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    has_qk_norm=True,
    window_layers="if used",
    experts=ExpertNames(
        router="mlp.gate.weight",
        expert="mlp.experts.{expert}.",
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
        count_field="num_experts",
        size_field="moe_intermediate_size",
        is_normalised=None,
    ),
)

FAMILIES: Mapping[str, Family] = {
    family.architecture: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN3_MOE)
}
