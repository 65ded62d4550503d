"""PoolView: one page pool as a plan in the making sees it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from omniserve.policy.pages import PagePool


class PoolView:
    """Counts and references of a pool after the decisions taken so far; the pool itself does not change.

    A plan is committed in its order, but the cached pages that it refers to are referenced before anything
    else, so that nothing it allocates evicts them. They are thus missing from earlier allocations too:
    `_least_left` is what the tightest of those has to spare, and `match` finds no more than that.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.free = pool.num_free
        self._protected = pool.num_protected  # at most so many: who is evicted is not decided here
        self._least_left = pool.num_pages
        self._change: dict[int, int] = {}

    def references(self, page: int) -> int:
        return self.pool.references(page) + self._change.get(page, 0)

    def available(self, keep: int = 0) -> int:
        """Pages that can be taken when `keep` protected cached ones must stay."""
        return self.free - min(keep, self._protected)

    def take(self, count: int, keep: int = 0) -> None:
        left = self.available(keep) - count
        assert left >= 0, f"{count} pages taken, {left + count} available"
        self.free -= count
        if count:
            self._least_left = min(self._least_left, left)

    def match(self, hashes: Sequence[bytes], first: int = 0, last: int | None = None) -> list[int]:
        """PagePool.match, as far as the plan can still refer to the pages."""
        spare = self._least_left
        pages = self.pool.match(hashes, first, last)
        for i, page in enumerate(pages):
            if self.references(page) > 0:
                continue
            if self.pool.references(page) > 0 or spare == 0:  # given up by this plan, or too late for it
                return pages[:i]
            spare -= 1
        return pages

    def num_unreferenced(self, pages: Iterable[int]) -> int:
        return sum(self.references(page) == 0 for page in pages)

    def hold(self, pages: Sequence[int], sign: int = 1) -> None:
        """Refer to pages that `match` found. With sign -1: do not, after all."""
        for page in pages:
            others = self.references(page) - (sign < 0)
            self._change[page] = self._change.get(page, 0) + sign
            if others == 0:
                self.free -= sign
                self._least_left -= sign
                self._protected -= sign * self.pool.is_protected(page)

    def release(self, pages: Iterable[int], protect: bool = False) -> None:
        for page in pages:
            self._change[page] = self._change.get(page, 0) - 1
            if self.references(page) == 0:
                self.free += 1
                is_cached = self.pool.hash_of(page) is not None
                self._protected += is_cached and (protect or self.pool.is_protected(page))

    def available_without(self, owners: Iterable[Iterable[int]], keep: int = 0) -> int:
        """`available` if all these owners released their pages: those shared with others stay."""
        counts = Counter(page for pages in owners for page in pages)
        freed = [page for page, count in counts.items() if self.references(page) == count]
        protected = self._protected + sum(map(self.pool.is_protected, freed))
        return self.free + len(freed) - min(keep, protected)
