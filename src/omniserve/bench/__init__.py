"""Benchmarks: commands that anyone can run and that write what they measured to a file.

core.py   start-up, tokens/s beside transformers, lane tokens/s, cost of lane rows in a walk
host.py   host attention beside the memory's streaming rate and torch; host_lanes.py through host workers,
          host_report.py the command
"""
