"""Durable batches: files and lines that survive any crash, run line by line through a `LineRunner`.

Nothing here knows HTTP. The promises, the write boundaries and the recovery from a crash at each stand
in docs/batches.md; `store.py` keeps them.
"""
