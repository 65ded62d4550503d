"""Benchmarks: commands that anyone can run and that write what they measured to a file.

core.py   start-up, lane tokens/s, cost of lane rows in a walk
host.py   host attention beside the memory's streaming rate and torch; host_lanes.py through host workers,
          host_report.py the command
peers.py  our engine beside transformers, vLLM and llama.cpp; peer_rounds.py takes the measurements,
          peer_engines.py is what each peer's process runs
dense.py  a walk's dense work by number of rows and type of weights
policy.py     what a plan and an admission cost
prediction.py predicted beside measured walks
slo.py    targets kept and batch tokens made, beside baselines; slo_*.py its parts: variants (who competes),
          setup, run (one engine, one load), mixed, overload, placement (scenarios), verdict, tables, plot
load.py   the load generator: several classes at once over any target; workloads.py what is sent and when,
          traces/ recorded requests, attainment.py what was achieved
http_*.py `omniserve bench`, the load generator against an OpenAI-compatible server: names (what flags may
          say), setup (is it there), load (flags to load), api (what is asked, how it says no), target
          (streamed answers, with sse.py), batch, progress, report, plot, run; prompts.py and sharegpt.py
          what is sent
"""
