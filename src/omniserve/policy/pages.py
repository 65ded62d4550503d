"""PagePool: which KV pages are free and how often each is referenced. Integers only; no memory here."""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """Ids 0..num_pages-1 of pages of `page_size` tokens.

    One class, two instances: the device's pages and the host's. A page is free when nobody references it;
    `allocate` gives the first reference, `share` adds one, `release` takes one back.

    Pages are divided into `num_partitions` contiguous runs, one for each NUMA node of the host; page p
    belongs to partition p * num_partitions // num_pages, as in the native part (csrc/segment.h). Pages of one
    holder come from one partition while that has any.
    """

    def __init__(self, num_pages: int, page_size: int, num_partitions: int = 1) -> None:
        if num_pages < 0 or page_size < 1 or not 1 <= num_partitions <= max(1, num_pages):
            raise ValueError(
                "PagePool needs num_pages >= 0, page_size >= 1 and 1 to num_pages partitions, "
                f"got {num_pages}, {page_size}, {num_partitions}"
            )
        self.num_pages = num_pages
        self.page_size = page_size
        self.num_partitions = num_partitions
        self._free: list[list[int]] = [[] for _ in range(num_partitions)]  # by partition; the last goes first
        for page in reversed(range(num_pages)):
            self._free[self.partition_of(page)].append(page)
        self._references = [0] * num_pages

    @property
    def num_free(self) -> int:
        return sum(map(len, self._free))

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    def partition_of(self, page: int) -> int:
        return page * self.num_partitions // self.num_pages

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens of one request."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int, near: int | None = None) -> list[int]:
        """`count` free pages, each with one reference. Asking for more than are free is our own mistake.

        near: the partition of the holder's pages; None: it has none yet and gets the one with most free
        pages. When that has too few, the rest comes from the ones with most left.
        """
        assert 0 <= count <= self.num_free, f"allocate({count}) with {self.num_free} pages free"
        ids: list[int] = []
        while len(ids) < count:
            if near is None or not self._free[near]:
                near = max(range(self.num_partitions), key=lambda p: len(self._free[p]))
            free = self._free[near]
            taken = free[max(0, len(free) - (count - len(ids))) :]
            del free[len(free) - len(taken) :]
            ids += reversed(taken)
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
                self._free[self.partition_of(page)].append(page)

    def check(self, owners: Iterable[Iterable[int]]) -> None:
        """Assert that the owners' pages are exactly the used ones, each as often as it is referenced."""
        counts = [0] * self.num_pages
        for ids in owners:
            for page in ids:
                counts[page] += 1
        assert counts == self._references, "pages leaked or owned twice"
        free = {page for pages in self._free for page in pages}
        assert len(free) == self.num_free, "a page is on the free list twice"
        assert all((page in free) == (counts[page] == 0) for page in range(self.num_pages))
        for partition, pages in enumerate(self._free):
            assert {self.partition_of(page) for page in pages} <= {partition}, "a page has changed partition"
