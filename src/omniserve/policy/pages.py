"""PagePool: which KV pages are free, cached or referenced, and by which hash. No memory here."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice


class PagePool:
    """Ids 0..num_pages-1 of pages of `page_size` tokens.

    One class, two instances: the device's pages and the host's. `allocate` gives the first reference to a
    page, `share` adds one, `release` takes one back.

    A full page whose KV is written may be registered under the hash of its tokens and all before them. It is
    read-only from then on. Without references it is *cached*: still found by its hash, yet counted as free;
    it is evicted, least recently used first, when `allocate` has no page left that holds nothing. The pages
    of one holder are released from the last to the first, so that of a chain the end goes before its
    beginning. Cached pages once marked as protected can be kept from an allocation (`keep`).

    Pages are divided into `num_partitions` contiguous runs, one for each NUMA node of the host; page p
    belongs to partition p * num_partitions // num_pages, as in the native part (csrc/segment.h). New pages of
    one holder come from one partition while that has any; a cached page is shared from wherever it is.
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
        self.num_evicted = 0
        self._free: list[list[int]] = [[] for _ in range(num_partitions)]  # by partition; the last goes first
        for page in reversed(range(num_pages)):
            self._free[self.partition_of(page)].append(page)
        self._references = [0] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._hash_of: list[bytes | None] = [None] * num_pages
        self._is_protected = [False] * num_pages
        # Cached pages with the time of their release, oldest first: by partition, plain and protected.
        self._plain: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(num_partitions)]
        self._protected: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(num_partitions)]
        self._time = 0

    # ------------------------------------------------------------ counts

    @property
    def num_free(self) -> int:
        """Pages that nobody references, cached ones included."""
        return sum(map(len, self._free)) + self.num_cached

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    @property
    def num_cached(self) -> int:
        return sum(map(len, self._plain)) + self.num_protected

    @property
    def num_protected(self) -> int:
        """Cached pages that are protected."""
        return sum(map(len, self._protected))

    def references(self, page: int) -> int:
        return self._references[page]

    def is_protected(self, page: int) -> bool:
        return self._is_protected[page]

    def hash_of(self, page: int) -> bytes | None:
        """The hash a page is registered under, None when it is not."""
        return self._hash_of[page]

    def partition_of(self, page: int) -> int:
        return page * self.num_partitions // self.num_pages

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens of one request."""
        return -(-num_tokens // self.page_size)

    # ------------------------------------------------------------ references

    def allocate(self, count: int, near: int | None = None, keep: int = 0) -> list[int]:
        """`count` free pages, each with one reference. Asking for more than are free is our own mistake.

        near: the partition of the holder's pages; None: it has none yet and gets the one with most free
        pages. When that has too few, the rest comes from the ones with most left.
        keep: so many protected cached pages stay.
        """
        left = self.num_free - min(keep, self.num_protected)
        assert 0 <= count <= left, f"allocate({count}) with {left} pages free"
        ids: list[int] = []
        while len(ids) < count:
            if near is None or not self._available_in(near, keep):
                near = max(range(self.num_partitions), key=lambda p: self._available_in(p, keep))
            free = self._free[near]
            taken = free[max(0, len(free) - (count - len(ids))) :]
            del free[len(free) - len(taken) :]
            ids += reversed(taken)
            while len(ids) < count and self._available_in(near, keep):
                ids.append(self._evict(near, keep))
        for page in ids:
            self._references[page] = 1
        return ids

    def _available_in(self, partition: int, keep: int) -> int:
        protected = min(len(self._protected[partition]), max(0, self.num_protected - keep))
        return len(self._free[partition]) + len(self._plain[partition]) + protected

    def _evict(self, partition: int, keep: int) -> int:
        """Forget the least recently used of the cached pages that may go."""
        lists = [self._plain[partition]]
        if self.num_protected > keep:
            lists.append(self._protected[partition])
        oldest = min((pages for pages in lists if pages), key=lambda pages: next(iter(pages.values())))
        page, _ = oldest.popitem(last=False)
        page_hash = self._hash_of[page]
        assert page_hash is not None, "a cached page has a hash"
        del self._page_of[page_hash]
        self._hash_of[page] = None
        self._is_protected[page] = False
        self.num_evicted += 1
        return page

    def share(self, ids: Iterable[int]) -> None:
        """One more reference for each of these pages, which somebody holds already or which are cached."""
        for page in ids:
            if self._references[page] == 0:
                assert self._hash_of[page] is not None, f"page {page} is free and cannot be shared"
                del self._cached_with(page)[page]
            self._references[page] += 1

    def release(self, ids: Sequence[int], protect: bool = False) -> None:
        """One reference less for each of these pages, the last first; those without any are free or cached.

        protect: once cached, they are protected from now on until they are evicted.
        """
        for page in reversed(ids):
            assert self._references[page] > 0, f"page {page} is released twice"
            self._references[page] -= 1
            self._is_protected[page] |= protect
            if self._references[page] > 0:
                continue
            if self._hash_of[page] is None:
                self._is_protected[page] = False
                self._free[self.partition_of(page)].append(page)
            else:
                self._cache(page)

    def _cached_with(self, page: int) -> OrderedDict[int, int]:
        lists = self._protected if self._is_protected[page] else self._plain
        return lists[self.partition_of(page)]

    def _cache(self, page: int) -> None:
        self._time += 1
        self._cached_with(page)[page] = self._time

    # ------------------------------------------------------------ hashes

    def register(self, page: int, page_hash: bytes) -> int:
        """Make a full page, now written, known by its hash; returns the page that is known by it.

        That is another page when one with the same content was there before; this one then stays unknown.
        """
        assert self._references[page] > 0, f"page {page} is free and cannot be registered"
        known = self._page_of.setdefault(page_hash, page)
        if known == page:
            assert self._hash_of[page] in (None, page_hash), f"page {page} is known by another hash"
            self._hash_of[page] = page_hash
        return known

    def match(self, hashes: Sequence[bytes], first: int = 0, last: int | None = None) -> list[int]:
        """The pages known by hashes[first], hashes[first + 1], ... before `last`, up to one that is not."""
        pages = []
        for page_hash in islice(hashes, first, last):
            page = self._page_of.get(page_hash)
            if page is None:
                break
            pages.append(page)
        return pages

    def touch(self, ids: Sequence[int]) -> None:
        """Those of these pages that are cached were used just now, the first of them last."""
        for page in reversed(ids):
            if self._references[page] == 0:
                del self._cached_with(page)[page]
                self._cache(page)

    # ------------------------------------------------------------ accounting

    def check(self, owners: Iterable[Iterable[int]]) -> None:
        """Assert the books: the owners' pages are exactly the used ones, each as often as it is referenced;
        every other page is either free or cached; hashes and pages name each other.
        """
        counts = [0] * self.num_pages
        for ids in owners:
            for page in ids:
                counts[page] += 1
        assert counts == self._references, "pages leaked or owned twice"
        unused = [page for pages in (*self._free, *self._plain, *self._protected) for page in pages]
        assert sorted(unused) == [page for page in range(self.num_pages) if counts[page] == 0]
        known = {
            self._hash_of[page]: page for page in range(self.num_pages) if self._hash_of[page] is not None
        }
        assert known == self._page_of, "a page is reachable by a hash that is not its own"
        for partition in range(self.num_partitions):
            free, plain, protected = self._free[partition], self._plain[partition], self._protected[partition]
            homes = {self.partition_of(page) for page in (*free, *plain, *protected)}
            assert homes <= {partition}, "a page has changed partition"
            assert not any(self._hash_of[page] or self._is_protected[page] for page in free)
            assert all(self._hash_of[page] for page in (*plain, *protected)), "cached without a hash"
            assert all(self._is_protected[page] for page in protected)
            assert not any(self._is_protected[page] for page in plain)
            for pages in (plain, protected):
                assert list(pages.values()) == sorted(pages.values()), "out of the order of use"
