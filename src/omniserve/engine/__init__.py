"""The engine: scheduler steps carried out on a device and a host, and the ways to call it.

loop.py       Engine: commands -> schedule -> launch -> collect -> apply, one step at a time
executor.py   the seam to a device; cpu_executor.py: walks and passes on CPU threads
page_hashes.py  hashes of full pages, for the prefix cache
records.py    requests' tokens and sampling; lane state in slot-indexed arrays
build.py      from settings and a checkpoint to an Engine
process.py    the engine process: a loop around Engine, fed through a socket
messages.py   what travels through that socket
async_llm.py  AsyncLLM: the engine process from asyncio
llm.py        LLM: the same, blocking
"""
