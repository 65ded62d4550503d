"""Inputs of batches: what is accepted, what is refused and in which line. Never held whole."""

from __future__ import annotations

import codecs
import io
import json
import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch.stand import ENDPOINT, LIMITS, jsonl, line, lines
from omniserve.batch.limits import Limits
from omniserve.batch.line_runner import Request, decode_request
from omniserve.batch.lines import Validation, decode_line
from omniserve.batch.records import Line


def validated(data: bytes, limits: Limits = LIMITS, model: str | None = None) -> Validation:
    found = Validation(io.BytesIO(data), ENDPOINT, limits, lambda name: model in (None, name))
    while not found.advance():
        pass
    return found


def errors(
    data: bytes, limits: Limits = LIMITS, model: str | None = None
) -> list[tuple[str, int | None, str | None]]:
    return [(error.code, error.line, error.param) for error in validated(data, limits, model).errors]


def test_a_good_file_says_where_its_lines_are() -> None:
    data = lines(3) + b"\n" + jsonl([line(9)]).rstrip(b"\n")
    found = validated(data)
    assert not found.errors
    assert list(found.numbers) == [1, 2, 3, 5]  # the fourth is blank
    assert found.model == "m"
    parts = [data[begin : begin + size] for begin, size in zip(found.offsets, found.lengths, strict=True)]
    assert [decode_line(part).custom_id for part in parts] == ["line-1", "line-2", "line-3", "line-9"]


@pytest.mark.parametrize("first", [b"", b"\n"], ids=["before_the_first_line", "on_a_blank_line"])
def test_a_byte_order_mark_at_the_beginning_belongs_to_no_line(first: bytes) -> None:
    data = codecs.BOM_UTF8 + first + lines(2)
    found = validated(data)
    assert not found.errors
    parts = [data[begin : begin + size] for begin, size in zip(found.offsets, found.lengths, strict=True)]
    assert [decode_line(part).custom_id for part in parts] == ["line-1", "line-2"]


def test_a_byte_order_mark_elsewhere_is_no_json() -> None:
    assert errors(lines(1) + codecs.BOM_UTF8 + jsonl([line(2)])) == [("invalid_json_line", 2, None)]


def body(**changes: Any) -> dict[str, Any]:
    return {"body": line(2)["body"] | changes}


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in line(2).items() if key != name}


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (without("custom_id"), ("missing_required_parameter", 2, "custom_id")),
        (without("body"), ("missing_required_parameter", 2, "body")),
        (line(2, body={"messages": []}), ("missing_required_parameter", 2, "body.model")),
        (line(2, custom_id=5), ("invalid_type", 2, "custom_id")),
        (line(2, body=[]), ("invalid_type", 2, "body")),
        (line(2, **body(model=1)), ("invalid_type", 2, "body.model")),
        (line(2, method="GET"), ("invalid_method", 2, "method")),
        (line(2, url="/v1/completions"), ("mismatched_endpoint", 2, "url")),
        (line(2, **body(model="other")), ("mismatched_model", 2, "body.model")),
        (line(2, custom_id="line-1"), ("duplicate_custom_id", 2, "custom_id")),
        ([1], ("invalid_json_line", 2, None)),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_field(second: object, expected: tuple[Any, ...]) -> None:
    assert errors(jsonl([line(1), second, line(3)])) == [expected]


@pytest.mark.parametrize("bad", [b"{", b"nonsense", b'{"custom_id": "\xff"}', b"[" * 100_000, b"\x00"])
def test_what_is_no_json_is_named(bad: bytes) -> None:
    assert errors(lines(1) + bad + b"\n") == [("invalid_json_line", 2, None)]


@pytest.mark.parametrize("blank", [b"\x0b", b"\x0c", b"\x1c", b"\xc2\xa0"])
def test_what_only_python_takes_for_a_blank_is_no_json(blank: bytes) -> None:
    for bad in (blank + lines(1), lines(1)[:-1] + blank + b"\n", blank + b"\n"):
        assert errors(bad) == [("invalid_json_line", 1, None)]


@given(st.lists(st.sampled_from([bytes([n]) for n in range(33)]), max_size=4), st.booleans())
def test_a_line_that_was_found_good_can_be_read(around: list[bytes], is_before: bool) -> None:
    blanks = b"".join(around).replace(b"\n", b" ")
    data = blanks + lines(1) if is_before else lines(1)[:-1] + blanks + b"\n"
    found = validated(data)
    if not found.errors:
        request = decode_request(Line(1, data[found.offsets[0] :][: found.lengths[0]]))
        assert request.custom_id == "line-1"
        assert request.body is not None


@pytest.mark.parametrize(
    ("raw", "custom_id"),
    [
        (lines(1)[:-1] + b"\x0c", "line-1"),
        (lines(1)[:-9], "line-1"),
        (b'{"custom_id": "a\\"\\u0062\xff\\ud800", "body"', 'a"b\ufffd?'),
        (b'{"custom_id" : "a\\x", "body"', "a\\x"),
        (b"\x00" * 9, ""),
        (b'{"custom_id":"a","body":' + b"[" * 100_000, "a"),
    ],
)
def test_a_line_that_is_bad_after_all_still_has_its_name(raw: bytes, custom_id: str) -> None:
    assert decode_request(Line(1, raw)) == Request(custom_id, None)


@pytest.mark.parametrize("where", ["line", "body"])
def test_a_line_nested_too_deeply_is_named(where: str) -> None:
    deep = b'"deep": ' + b"[" * 100_000 + b"]" * 100_000 + b", "
    at = b'"body": {' if where == "body" else b"{"
    assert errors(lines(1).replace(at, at + deep, 1)) == [("invalid_json_line", 1, None)]


def test_an_empty_file_and_one_of_blank_lines_are_refused() -> None:
    assert errors(b"") == errors(b"\n \n") == [("empty_file", None, None)]


def test_an_unknown_model_is_named_once() -> None:
    assert errors(lines(3), model="another") == [("model_not_found", 1, "body.model")]


def test_a_file_may_hold_so_many_lines_and_no_more() -> None:
    limits = replace(LIMITS, max_lines=3)
    assert errors(lines(3), limits) == []
    assert errors(lines(4), limits) == [("too_many_requests", 4, None)]


def test_a_line_may_be_so_long_and_no_longer() -> None:
    limits = replace(LIMITS, max_line_bytes=1000)
    long = line(2, **body(messages=["x" * 5000]))
    assert errors(jsonl([line(1), long, line(3, custom_id=7)]), limits) == [
        ("line_too_long", 2, None),
        ("invalid_type", 3, "custom_id"),
    ]


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8], ids=["plain", "after_a_mark"])
def test_the_first_line_may_be_as_long_as_any(mark: bytes) -> None:
    first = lines(1)
    for num_bytes, found in ((len(first), []), (len(first) - 1, [("line_too_long", 1, None)])):
        assert errors(mark + first, replace(LIMITS, max_line_bytes=num_bytes)) == found


def test_no_more_errors_are_told_than_help() -> None:
    assert len(errors(jsonl([1] * 50), replace(LIMITS, max_errors=10))) == 10


@given(st.lists(st.binary(max_size=60), max_size=8))
def test_no_bytes_break_the_reader(pieces: list[bytes]) -> None:
    found = validated(b"\n".join(pieces))
    assert found.errors
    for error in found.errors:
        json.dumps(error.message)


def test_the_memory_taken_does_not_grow_with_the_size_of_the_lines() -> None:
    num_lines, line_bytes = 2000, 20_000
    filler = "x" * line_bytes

    class Endless(io.RawIOBase):
        """A file of 40 MB that nobody wrote down."""

        count = 0

        def readline(self, size: int | None = -1, /) -> bytes:
            self.count += 1
            return b"" if self.count > num_lines else jsonl([line(self.count, **body(messages=[filler]))])

    tracemalloc.start()
    try:
        found = Validation(Endless(), ENDPOINT, LIMITS)  # type: ignore[arg-type]
        while not found.advance():
            pass
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found.numbers) == num_lines
    assert peak_bytes < 100 * line_bytes < num_lines * line_bytes / 10
