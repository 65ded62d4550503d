"""vLLM's scheduler (V1) with `--scheduling-policy priority`: a token budget, and preemption by recomputation.

Models: requests that run (decodes and begun prompts, of either class) go on first, in order of priority;
then waiting ones start in order of priority while tokens, rows and pages last. One that runs and finds no
page preempts the last in line, which computes everything again. A waiting request preempts nobody, however
urgent. Leaves out: pages taken chunk by chunk (here a prompt starts when all its pages are there),
asynchronous scheduling, the order in which running requests were admitted (here: priority, then arrival).
Tunables: `max_num_batched_tokens`, `max_num_seqs`.
"""

from omniserve.policy.budget import Rules

RULES = Rules(
    "vllm_priority",
    stages=("running", "waiting"),
    uses_host=False,
    start_evicts=False,
    keeps_headroom=False,
)
