"""Names and shapes of all tensors that a checkpoint of one configuration must hold. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator

from omniserve.model.families import ModelConfig

Shape = tuple[int, ...]


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Name -> shape, in the order of the layers. Of a tied head only the embedding is expected."""
    f, hidden = config.family, config.hidden_size
    tensors: dict[str, Shape] = {f.embedding: (config.vocab_size, hidden), f.final_norm: (hidden,)}
    if not config.tie_word_embeddings:
        tensors[f.lm_head] = (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        prefix = f.layer_prefix.format(layer=layer)
        tensors |= {prefix + name: shape for name, shape in _attention(config)}
        tensors |= {prefix + name: shape for name, shape in _mlp(config, layer)}
    return tensors


def _attention(c: ModelConfig) -> Iterator[tuple[str, Shape]]:
    f, hidden, q, kv = c.family, c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    yield f.input_norm, (hidden,)
    yield f.post_norm, (hidden,)
    for name, rows in ((f.q, q), (f.k, kv), (f.v, kv)):
        yield from _linear(name, rows, hidden, c.qkv_bias)
    yield from _linear(f.o, hidden, q, c.o_bias)
    if f.has_qk_norm:
        yield f.q_norm, (c.head_dim,)
        yield f.k_norm, (c.head_dim,)


def _mlp(c: ModelConfig, layer: int) -> Iterator[tuple[str, Shape]]:
    f = c.family
    if c.experts is None or f.experts is None or layer not in c.experts.layers:
        yield from _gated("", (f.gate, f.up, f.down), c.hidden_size, c.intermediate_size, c.mlp_bias)
        return
    names, experts = f.experts, c.experts
    yield names.router, (experts.count, c.hidden_size)
    for expert in range(experts.count):
        prefix = names.expert.format(expert=expert)
        projections = (names.gate, names.up, names.down)
        yield from _gated(prefix, projections, c.hidden_size, experts.intermediate_size, c.mlp_bias)


def _gated(
    prefix: str, names: tuple[str, str, str], hidden: int, size: int, has_bias: bool
) -> Iterator[tuple[str, Shape]]:
    gate, up, down = names
    yield from _linear(prefix + gate, size, hidden, has_bias)
    yield from _linear(prefix + up, size, hidden, has_bias)
    yield from _linear(prefix + down, hidden, size, has_bias)


def _linear(name: str, rows: int, columns: int, has_bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (rows, columns)
    if has_bias:
        yield f"{name}.bias", (rows,)
