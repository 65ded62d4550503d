"""Decisions, as pure functions of state, time and cost. Nothing here imports torch, reads a clock or logs.

pages.py       ids of KV pages, who owns them, and by which hash they are known
prefix.py      when pages become known by their hash
plan.py        what one scheduler step decides (plans) and what the engine carries out (steps, results)
request.py     one request, its residence, and the limits everything keeps to
pool_view.py   a pool as a plan in the making sees it
books.py       what must hold of a state at any time
ledger.py      who is in which phase and holds what, change by change
state.py       when those changes happen: arrivals, plans, results, news of the host
lengths.py     how long texts of a class have been
scheduler.py   schedule(state, now, policy) -> plan
draft.py       the plan in the making
residence.py   who makes room, who moves, who comes back
host_side.py   lanes that start or come back, and copies
lanes.py       which lanes enter, which pass runs next
budget.py      the seam: what a plan may cost, by constants or by targets
slo.py         budgets from targets: slack, best-effort limit, lane caps
terms.py       the constants of an engine with targets
slack.py       when tokens are due
division.py    who gets the slack that is left
forecast.py    when pending prompts will end
admission.py   whether a newcomer can have its targets
explanation.py why a plan is as it is
latency.py     what work is, and what a prediction of its time must answer
latency_model.py
               the prediction: a fit, and what was learned since
staircase.py   times of dense work by rows, and where to measure them
correction.py  following the machine; margins from past errors
hardware_profiles.py
               fits of others' measurements (hardware_profiles.json)
baselines/     the policies that omniserve is compared with
"""
