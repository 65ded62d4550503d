"""What the engine's client does with the tokens of a walk."""

from __future__ import annotations

from omniserve.engine.client import first_ones_first
from omniserve.engine.messages import Token


def test_first_tokens_go_before_those_of_requests_that_have_some_and_nothing_else_changes_its_place() -> None:
    tokens = [Token(request_id, 100 + request_id) for request_id in (5, 1, 7, 3, 9)]
    ordered = first_ones_first(tokens, unheard={7, 9, 11})
    assert [token.request_id for token in ordered] == [7, 9, 5, 1, 3]
