"""Which lines may have killed an engine, and what follows. Pure.

When an engine dies, nobody sees which of the lines in it was the cause, so that each of them is counted. A
line with several deaths runs with no other line beside it from then on: an innocent one is answered there,
the one that kills is alone with its deed. Once is no proof, for an engine may be killed from outside too.
"""

from __future__ import annotations

from omniserve.batch.line_runner import LineResponse, failure
from omniserve.batch.records import Line

# Engines that may die of a line among others before it runs alone, and of it alone before it is given up.
DEATHS_AMONG_OTHERS = 3
DEATHS_ALONE = 2


def runs_alone(line: Line) -> bool:
    return line.num_deaths >= DEATHS_AMONG_OTHERS


def is_given_up(line: Line) -> bool:
    return line.num_deaths >= DEATHS_AMONG_OTHERS + DEATHS_ALONE


def given_up(line: Line) -> LineResponse:
    """The result of a line that runs no more."""
    message = (
        f"the engine died {line.num_deaths} times while it ran this request, the last {DEATHS_ALONE} times "
        "with no other line of a batch beside it, which is the most a line may cost; the server's log tells "
        "of each death. Change the request, or send it again after an upgrade"
    )
    return failure(500, message, "server_error", "engine_error")
