"""The host side: a process of its own that computes decode attention of lanes.

segment.py    the memory shared by engine and host, and the engine's port to it
supervisor.py starts the host process, notices its death, starts it again
topology.py   NUMA nodes and partitions of host memory
process.py    the host process itself: `python -m omniserve.host.process`
load.py       a host that is busy without lanes, while the profiler measures
others.py     what other processes do to the CPUs meanwhile
scripted.py   a host without threads whose every step a test decides
"""
