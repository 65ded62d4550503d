"""When pages become known by their hash, and how often that helps."""

from __future__ import annotations

from dataclasses import dataclass

from omniserve.policy.pages import PagePool
from omniserve.policy.request import Phase, Request


@dataclass(slots=True)
class HitCount:
    """Tokens asked of a prefix cache, and those that were there."""

    queried_tokens: int = 0
    hit_tokens: int = 0

    def add(self, queried: int, hit: int) -> None:
        self.queried_tokens += queried
        self.hit_tokens += hit


def register_device_pages(pool: PagePool, request: Request, first: int) -> None:
    """Make a request's full pages known from index `first` on, their KV written.

    Where a page of the same content was known before, the request goes on with that one and gives up its own.
    """
    last = min(request.kv_tokens // pool.page_size, len(request.device_hashes))
    for i in range(first, last):
        request.device_pages[i] = _register(pool, request.device_pages[i], request.device_hashes[i], True)


def register_host_pages(pool: PagePool, request: Request) -> None:
    """Make a request's full host pages known: those that have landed or that it filled as a lane.

    As on the device, but a page that the executor has been told of stays.
    """
    hold = request.hold
    is_lane = request.phase in (Phase.LANE, Phase.MOVING_IN)
    complete = request.kv_tokens if is_lane else hold.landed_tokens
    last = min(complete // pool.page_size, len(request.host_hashes))
    for i in range(hold.num_registered, last):
        hold.pages[i] = _register(pool, hold.pages[i], request.host_hashes[i], i >= hold.known_pages)
    hold.num_registered = max(hold.num_registered, last)


def _register(pool: PagePool, own: int, page_hash: bytes, may_change: bool) -> int:
    """The page to go on with."""
    known = pool.register(own, page_hash)
    if known == own or not may_change:
        return own
    pool.share([known])
    pool.release([own])
    return known
