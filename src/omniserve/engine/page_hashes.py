"""Hashes of full pages: each stands for the page's tokens and all tokens before them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import sha256


class PageHashes:
    """Hashes of one text's full pages of `page_size` tokens, each computed once as the text grows.

    SHA-256 over the hash of the page before and the page's token ids: nobody can find another text with the
    same hashes, so a page found by its hash holds the KV of just these tokens. With a `salt` the first page
    follows the salt's own hash: texts of different salts have no page in common.
    """

    def __init__(self, page_size: int, salt: str | None = None) -> None:
        self._page_size = page_size
        self._last = sha256(b"").digest() if salt is None else sha256(b"salt:" + salt.encode()).digest()
        self._rest = array("q")  # tokens of the page that is not full yet

    def extend(self, tokens: Sequence[int]) -> list[bytes]:
        """Add tokens to the text; returns the hashes of the pages that they fill."""
        rest, size = self._rest, self._page_size
        rest.extend(tokens)
        hashes = []
        for first in range(0, len(rest) - size + 1, size):
            self._last = sha256(self._last + rest[first : first + size].tobytes()).digest()
            hashes.append(self._last)
        del rest[: len(hashes) * size]
        return hashes
