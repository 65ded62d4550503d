"""Web pages that somebody opens on this machine must not use a server that asks nobody for a key.

A loopback address keeps strangers out, but a browser behind it sends what a page tells it to. Where a page's
own name was made to lead to 127.0.0.1, the page may even read the answers (DNS rebinding): the `Host` header
then has that name. What another site sends to change something has the site in `Origin`, or `cross-site` in
`Sec-Fetch-Site`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from omniserve.server.errors import ApiError
from omniserve.server.settings import ServerConfig

_READING = frozenset({"GET", "HEAD", "OPTIONS"})
WAY_OUT = (
    "this server asks for no key and so listens to this machine alone; to open it, start it with --api-key"
)


class Visitors:
    """Who is let in where no key is asked for: on a loopback address, names of this machine alone."""

    def __init__(self, config: ServerConfig) -> None:
        self._is_guarded = config.is_loopback and not config.api_keys
        self._bound = config.host.lower()

    def check(self, method: str, headers: Mapping[str, str]) -> None:
        """ApiError 403 for a request that a page from elsewhere may have sent. Programs send no Origin."""
        if not self._is_guarded:
            return
        host, origin = headers.get("host", ""), headers.get("origin")
        if host and not self._is_here(_name_in(f"//{host}")):
            raise _foreign("host", f"the Host header names {host!r:.200}", "foreign_host")
        if method in _READING:
            return
        if origin is not None and not self._is_here(_name_in(origin)):
            raise _foreign("origin", f"the request comes from {origin!r:.200}", "foreign_origin")
        if origin is None and headers.get("sec-fetch-site") == "cross-site":
            raise _foreign("origin", "the request comes from another site", "foreign_origin")

    def _is_here(self, name: str | None) -> bool:
        if name is None:
            return False
        if name in (self._bound, "localhost") or name.endswith(".localhost"):
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False


def _name_in(url: str) -> str | None:
    """The host of a URL, in lower case and without a dot at its end; None where there is none."""
    try:
        found = urlsplit(url).hostname
    except ValueError:
        return None
    return found.rstrip(".") if found else None


def _foreign(param: str, what: str, code: str) -> ApiError:
    return ApiError(403, f"{what}; {WAY_OUT}", kind="permission_error", param=param, code=code)
