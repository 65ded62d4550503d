"""Llumnix (OSDI 2024, arXiv 2406.03243), one instance of it: memory headroom for latency-sensitive requests.

Models its priorities inside one engine: a share of the device's KV memory counts as used as far as
best-effort requests are concerned, so that they start only while that much stays free, and latency-sensitive
ones find room without evicting anybody. Scheduling is otherwise class-blind: requests that run go on, then
waiting ones start, latency-sensitive first.
Leaves out dispatch among instances and live migration, which need more than one, and the CPU instances to
which the paper's set-up sends what does not fit. Tunables: `watermark` (the headroom),
`max_num_batched_tokens`.
"""

from omniserve.policy.budget import Rules

RULES = Rules("llumnix", stages=("running", "waiting"), uses_host=False, start_evicts=False)
