"""Sarathi-Serve (OSDI 2024, arXiv 2403.02310), with latency-sensitive work first: chunked prefill on the
device only.

Models its batch: every decode has a row in every iteration (no decode is stalled by a prefill), chunks of
prompts fill a fixed token budget, prompts already begun first. Latency-sensitive decodes and chunks come
before best-effort ones, which is the paper's "Sarathi, GPU only, best-effort queued": a bound for attainment.
Best-effort requests give up their pages to latency-sensitive ones and compute again later.
Leaves out pipeline parallelism and the tile-aligned choice of the budget. Tunables: `max_num_batched_tokens`,
`watermark`.
"""

from omniserve.policy.budget import Rules

RULES = Rules("sarathi", stages=("ls_decode", "ls_prefill", "be_decode", "be_prefill"), uses_host=False)
