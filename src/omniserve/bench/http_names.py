"""What the flags of `omniserve bench` may say. Light, so that the command line stays quick."""

from __future__ import annotations

from typing import Literal, get_args

Backend = Literal["omniserve", "vllm", "sglang", "openai"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
# Those that take `ignore_eos` and `min_tokens`, so that an answer has the length planned.
FIXES_LENGTHS: tuple[Backend, ...] = ("omniserve", "vllm", "sglang")

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

# Datasets with arrival times of their own, and the trace that stands for one when no file is named.
TRACES = {"azure": "splitwise_conv", "burstgpt": None, "mooncake": None}
DATASETS = ("random", "sharegpt", *TRACES)

METRICS = ("ttft", "tpot", "itl", "e2el")
NO_TOKENIZER = "none"
