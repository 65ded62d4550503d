"""The plain ways to run a model that the tests compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omniserve.model.decoder import Decoder


def transformers_model(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own model of folder `path`."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


def causal_attention(decoder: Decoder, q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
    """Dense causal attention of one whole sequence: q [n, h hd], k and v [n, kvh hd] -> [n, h hd].

    A row looks at the last `window` tokens, its own included; 0: at all.
    """
    group = decoder.num_heads // decoder.num_kv_heads
    q, k, v = (t.unflatten(1, (-1, decoder.head_dim)).transpose(0, 1) for t in (q, k, v))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = (q @ k.transpose(1, 2)) * decoder.head_dim**-0.5
    scores += torch.full_like(scores[0], float("-inf")).triu(1)
    if window:
        scores += torch.full_like(scores[0], float("-inf")).tril(-window)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(0, 1).flatten(1)


@torch.inference_mode()
def decoder_logits(decoder: Decoder, ids: list[int]) -> Tensor:
    """Logits [n, vocab] at every position of one sequence."""
    positions = torch.arange(len(ids))
    x = decoder.embed(torch.tensor(ids))
    for layer in range(decoder.num_layers):
        q, k, v = decoder.pre_attention(layer, x, positions)
        x = decoder.post_attention(
            layer, causal_attention(decoder, q, k, v, decoder.config.window_of(layer)), x
        )
    return decoder.logits(x)


def greedy(decoder: Decoder, ids: list[int], num_tokens: int) -> list[int]:
    """The next `num_tokens` tokens, everything computed anew for each."""
    ids = list(ids)
    for _ in range(num_tokens):
        ids.append(int(decoder_logits(decoder, ids)[-1].argmax()))
    return ids[-num_tokens:]
