"""Decisions, as pure functions of state, time and cost. Nothing here imports torch, reads a clock or logs.

pages.py      ids of KV pages, who owns them, and by which hash they are known
prefix.py     when pages become known by their hash
plan.py       what one scheduler step decides (plans) and what the engine carries out (steps, results)
request.py    one request, its residence, and the limits everything keeps to
pool_view.py  a pool as a plan in the making sees it
books.py      what must hold of a state at any time
state.py      all requests and both pools, and the only code that changes them
scheduler.py  schedule(state, now, cost) -> plan
residence.py  who makes room, who moves, who comes back
lanes.py      which lanes enter, which pass runs next
latency.py    the cost model seam
"""
