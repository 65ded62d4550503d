"""The benchmark of acceptance measures what it says, and accepting holds only pieces of a file in memory."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from pathlib import Path

from omniserve.bench import batch_accept

NUM_LINES, LINE_BYTES = 1500, 20_000


def test_accepting_a_file_buffers_pieces_of_it(tmp_path: Path) -> None:
    source = tmp_path / "input.jsonl"
    file_bytes = batch_accept.write_input(source, NUM_LINES, LINE_BYTES)
    tracemalloc.start()
    try:
        figures = asyncio.run(batch_accept.accept(tmp_path, source))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (figures["num_lines"], figures["file_bytes"]) == (NUM_LINES, file_bytes)
    assert peak_bytes < 8 * 1024**2 < file_bytes / 3


def test_the_command_writes_its_figures(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    batch_accept.main(["--lines", "10", "--line-bytes", "300", "--json", str(path)])
    found = json.loads(path.read_text())
    assert found["num_lines"] == 10
    assert found["accept_s"] > 0
    assert found["memory_growth_bytes"] >= 0
