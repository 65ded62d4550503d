"""Benchmarks: commands that anyone can run and that write what they measured to a file.

core.py   start-up, lane tokens/s, cost of lane rows in a walk
host.py   host attention beside the memory's streaming rate and torch; host_lanes.py through host workers,
          host_report.py the command
peers.py  our engine beside transformers, vLLM and llama.cpp; peer_rounds.py takes the measurements,
          peer_engines.py is what each peer's process runs
"""
