"""Traces are read in their publishers' formats; an error says where and what."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from omniserve.bench.traces import SHIPPED, read_trace
from omniserve.bench.workloads import Arrival
from omniserve.errors import ConfigError

SPLITWISE = "arrived_at,num_prefill_tokens,num_decode_tokens\n0.5,374,44\n4.75,396,109\n"
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:17:03.9799600,4808,10\n"
    "2023-11-16 18:17:04.0799600,110,27\n"
)
AZURE_2024 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-10 00:00:00.009930+00:00,2162,5\n"
    "2024-05-10 00:00:01.017335+00:00,2399,6\n"
)
BURSTGPT = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,1,2.5,ChatGPT,472,18,490,Conversation log\n"
    "45,,0.1,GPT-4,1087,0,1087,API log\n"
    "118,,7,GPT-4,417,276,693,API log\n"
)
MOONCAKE = (
    '{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}\n'
    '{"timestamp": 3052, "input_length": 7319, "output_length": 490, "hash_ids": [0, 14]}\n'
)


def read(tmp_path: Path, text: str) -> list[Arrival]:
    path = tmp_path / "trace"
    path.write_text(text)
    return read_trace(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SPLITWISE, [(0.0, 374, 44), (4.25, 396, 109)]),
        (AZURE, [(0.0, 4808, 10), (0.1, 110, 27)]),
        (AZURE_2024, [(0.0, 2162, 5), (1.007405, 2399, 6)]),
        (BURSTGPT, [(0.0, 472, 18), (113.0, 417, 276)]),  # the failed request is left out
        (MOONCAKE, [(0.0, 6758, 500), (3.052, 7319, 490)]),
    ],
    ids=["splitwise", "azure", "azure-2024", "burstgpt", "mooncake"],
)
def test_each_format_is_read_and_counted_from_the_first_arrival(
    tmp_path: Path, text: str, expected: list[tuple[float, int, int]]
) -> None:
    found = read(tmp_path, text)
    assert [a.at_s for a in found] == pytest.approx([e[0] for e in expected], abs=2e-6)
    assert [(a.num_prompt, a.num_output) for a in found] == [e[1:] for e in expected]


def test_a_trace_out_of_order_is_put_in_order(tmp_path: Path) -> None:
    lines = SPLITWISE.splitlines()
    found = read(tmp_path, "\n".join([lines[0], lines[2], lines[1]]))
    assert found == read(tmp_path, SPLITWISE)


def test_compressed_files_and_byte_order_marks_are_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress(("\ufeff" + SPLITWISE).encode()))
    assert len(read_trace(path)) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SPLITWISE.replace("396", "many"), r"line 3, num_prefill_tokens: .* got 'many'"),
        (SPLITWISE.replace("109", "1.5"), r"line 3, num_decode_tokens: .* got '1.5'"),
        (SPLITWISE.replace("4.75", "nan"), r"line 3, arrived_at: must be a time, got 'nan'"),
        (SPLITWISE.replace("4.75,396,109", "4.75,396"), r"line 3, num_decode_tokens: .* got None"),
        (SPLITWISE.replace("374", "-374"), r"line 2, num_prefill_tokens: .* got '-374'"),
        (AZURE.replace("2023-11-16 18:17:04", "yesterday"), r"line 3, TIMESTAMP: must be a time"),
        (BURSTGPT.replace("472", ""), r"line 2, Request tokens: .* got ''"),
        (MOONCAKE.replace("7319", '"long"'), r"line 2, input_length: .* got 'long'"),
        (MOONCAKE.replace("6758", "true"), r"line 1, input_length: .* got True"),
        (MOONCAKE + "{broken\n", r"line 3: no JSON object"),
        (MOONCAKE + "[]\n", r"line 3: no JSON object"),
        ("when,how,much\n1,2,3\n", r"line 1: columns of no known format"),
        ("", r"line 1: columns of no known format"),
        (SPLITWISE.splitlines()[0] + "\n", r"holds no request"),
    ],
)
def test_wrong_input_is_refused_with_line_and_field(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)


@pytest.mark.parametrize(
    "content",
    [b"\x1f\x8b broken", gzip.compress(SPLITWISE.encode(), mtime=0)[:-12], b"no"],
    ids=["no stream", "cut off", "no archive"],
)
def test_a_broken_archive_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"trace\.csv\.gz: can not be read"):
        read_trace(path)


def test_a_missing_trace_is_refused_with_the_known_names() -> None:
    with pytest.raises(ConfigError, match="splitwise_conv"):
        read_trace("no-such-trace")


def test_the_traces_that_ship_hold_what_their_readme_says() -> None:
    assert [len(read_trace(name)) for name in SHIPPED] == [19366, 8819]
    assert read_trace("splitwise_conv")[1] == Arrival(4.314579, 396, 109)
