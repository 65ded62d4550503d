"""Events come out of a stream whole, wherever it was cut."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from omniserve.bench.sse import EventStream


def test_data_is_what_events_hold_and_nothing_else_counts() -> None:
    received = b': ping\n\nevent: x\nid: 7\ndata: {"a": 1}\n\nretry: 5\n\ndata:no space\n\n'
    assert EventStream().feed(received) == ['{"a": 1}', "no space"]


def test_several_lines_of_data_are_one_event() -> None:
    assert EventStream().feed(b"data: one\r\ndata: two\r\n\r\n") == ["one\ntwo"]


def test_an_event_without_its_empty_line_is_not_there_yet() -> None:
    stream = EventStream()
    assert stream.feed(b"data: half") == []
    assert stream.feed(b"\n") == []
    assert stream.feed(b"\n") == ["half"]


@given(
    texts=st.lists(st.text(st.characters(exclude_characters="\r\n", codec="utf-8"), min_size=1), max_size=5),
    cuts=st.lists(st.integers(0, 200), max_size=8),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_where_the_bytes_are_cut_makes_no_difference(texts: list[str], cuts: list[int], end: str) -> None:
    """Also in the middle of a character, or of a line's end."""
    whole = "".join(f": c{end}data: {text}{end}{end}" for text in texts).encode()
    edges = sorted({0, len(whole), *(min(cut, len(whole)) for cut in cuts)})
    stream = EventStream()
    found = [event for a, b in pairwise(edges) for event in stream.feed(whole[a:b])]
    assert found == texts
