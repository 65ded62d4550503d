"""Latency-sensitive work alone: the measure of what chat loses to batch.

Models an engine of its own for chat: all decodes, then prefill chunks under a token budget, on the device
only. Best-effort requests are refused when they arrive. Leaves nothing out. Tunable:
`max_num_batched_tokens`.
"""

from omniserve.policy.budget import Rules

RULES = Rules("ls_only", stages=("ls_decode", "ls_prefill"), uses_host=False, takes_best_effort=False)
