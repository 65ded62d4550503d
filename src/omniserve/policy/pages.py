"""PagePool: which KV pages are free and how often each is referenced. Integers only; no memory here."""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """Ids 0..num_pages-1 of pages of `page_size` tokens.

    One class, two instances: the device's pages and the host's. A page is free when nobody references it;
    `allocate` gives the first reference, `share` adds one, `release` takes one back.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 0 or page_size < 1:
            raise ValueError(
                f"PagePool needs num_pages >= 0 and page_size >= 1, got {num_pages}, {page_size}"
            )
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens of one request."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """`count` free pages, each with one reference. Asking for more than are free is our own mistake."""
        assert 0 <= count <= len(self._free), f"allocate({count}) with {len(self._free)} pages free"
        if count == 0:
            return []
        ids = self._free[-count:][::-1]
        del self._free[-count:]
        for page in ids:
            self._references[page] = 1
        return ids

    def share(self, ids: Iterable[int]) -> None:
        """One more reference for each of these pages, which somebody holds already."""
        for page in ids:
            assert self._references[page] > 0, f"page {page} is free and cannot be shared"
            self._references[page] += 1

    def release(self, ids: Iterable[int]) -> None:
        """One reference less for each of these pages; those without any are free."""
        for page in ids:
            assert self._references[page] > 0, f"page {page} is released twice"
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)

    def check(self, owners: Iterable[Iterable[int]]) -> None:
        """Assert that the owners' pages are exactly the used ones, each as often as it is referenced."""
        counts = [0] * self.num_pages
        for ids in owners:
            for page in ids:
                counts[page] += 1
        assert counts == self._references, "pages leaked or owned twice"
        free = set(self._free)
        assert len(free) == len(self._free), "a page is on the free list twice"
        assert all((page in free) == (counts[page] == 0) for page in range(self.num_pages))
