"""What somebody said last who may be slow, or silent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Latest(Generic[T]):
    """The last answer to `ask`, which is asked again only when it has answered.

    value: None until the first answer, and after one that failed with one of `failures`: then `trouble` says
    how. at_s: when the last answer came, on the event loop's clock.
    """

    def __init__(
        self, ask: Callable[[], Coroutine[Any, Any, T]], failures: tuple[type[Exception], ...]
    ) -> None:
        self._ask, self._failures = ask, failures
        self._question: asyncio.Task[T] | None = None
        self.value: T | None = None
        self.trouble: str | None = None
        self.at_s = float("-inf")

    @property
    def is_open(self) -> bool:
        """Whether a question waits for its answer."""
        return self._question is not None

    async def refresh(self, patience_s: float) -> None:
        """Ask, unless a question is open, and wait for the answer so long at most."""
        if self._question is None:
            self._question = asyncio.create_task(self._ask())
        question = self._question
        await asyncio.wait((question,), timeout=patience_s)
        if not question.done() or question is not self._question:
            return  # no answer yet, or somebody else who waited has taken it in
        self._question = None
        self.at_s = asyncio.get_running_loop().time()
        self.value, self.trouble = None, None
        try:
            self.value = question.result()
        except self._failures as error:
            self.trouble = str(error)

    def close(self) -> None:
        if self._question is not None:
            self._question.cancel()
