"""Every policy by name: omniserve, and what it is compared with.

They share state, budgets and planner; each module's docstring says what it models, what it leaves out and
what can be tuned.
"""

from __future__ import annotations

from omniserve.policy.baselines import llumnix, ls_only, paper, sarathi, vllm_priority
from omniserve.policy.budget import OMNISERVE, FixedBudget, Policy, Rules
from omniserve.policy.latency import Prediction
from omniserve.policy.slo import SloPolicy
from omniserve.policy.terms import Terms

RULES: dict[str, Rules] = {
    rules.name: rules
    for rules in (
        OMNISERVE,
        paper.RULES,
        ls_only.RULES,
        sarathi.RULES,
        vllm_priority.RULES,
        llumnix.RULES,
    )
}
# Known names that the engine does not run, and why.
REFUSED = {
    "neo": "its two sub-batches take turns and the device waits for the host at every layer, which this "
    "engine never does; reentry='wait' shows that rule alone"
}


# Those whose budgets come from a latency model once targets are set.
PREDICTING = (OMNISERVE.name, paper.RULES.name)


def make_policy(name: str, fixed: FixedBudget, model: Prediction | None, terms: Terms | None) -> Policy:
    """The policy called `name`: with targets (`terms`) and a calibrated `model`, budgets come from these
    where the policy can use them; otherwise from `fixed`, its rules replaced by the policy's own.
    """
    if model is not None and terms is not None and name in PREDICTING:
        return SloPolicy(model, terms) if name == OMNISERVE.name else paper.PaperPolicy(model, terms)
    return fixed.under(RULES[name])
