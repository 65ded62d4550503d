"""API keys: who is calling. Keys are compared by digests, in a time that says nothing about them."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from omniserve.batch.limits import Quota
from omniserve.server.errors import ApiError
from omniserve.server.settings import ApiKey, ServerConfig
from omniserve.server.tiers import AUTO, DEFAULT, Clamp

# Of files and batches on a server without keys.
NOBODY = "anonymous"
_UNAUTHORIZED = {"www-authenticate": "Bearer"}


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is calling. owner: of files and batches; never the key itself, which must not reach the disk."""

    owner: str = NOBODY
    tiers: tuple[str, ...] | None = None
    clamps: tuple[Clamp, ...] = ()
    is_admin: bool = False

    def check_tier(self, asked: str, why: str = "") -> None:
        """ApiError 403 when this caller's key may not ask for that tier. why: one is asked for, in words.

        To leave the choice is to ask for the default one.
        """
        same = {DEFAULT, AUTO} if asked in (DEFAULT, AUTO) else {asked}
        if self.tiers is not None and same.isdisjoint(self.tiers):
            raise ApiError(
                403,
                f"service_tier: this API key may use {', '.join(self.tiers)}, not {asked}{why}",
                kind="permission_error",
                param="service_tier",
                code="tier_not_allowed",
            )


class Keyring:
    """All keys of a server."""

    def __init__(self, config: ServerConfig) -> None:
        self._clients = [(_digest(key.key), _caller(key)) for key in config.api_keys]
        quotas = ((owner_of(key), key.quota) for key in config.api_keys)
        self._quotas = {owner: quota for owner, quota in quotas if quota is not None}
        self._admin = None if config.admin_key is None else _digest(config.admin_key)
        self._is_admin_open = config.admin_key is None and config.is_loopback and not config.api_keys

    def client(self, authorization: str | None) -> Caller:
        """Who sends this Authorization header; ApiError 401."""
        if not self._clients:
            return Caller()
        found = _match(self._clients, _bearer(authorization))
        if found is None:
            raise _refused(authorization, "an API key")
        return found

    def owner(self, name: str) -> Caller:
        """Of lines of batches: which of an owner's keys made them is not kept, so all their bounds hold."""
        clamps = (clamp for _, key in self._clients if key.owner == name for clamp in key.clamps)
        return Caller(name, clamps=tuple(clamps))

    def quota(self, owner: str) -> Quota:
        return self._quotas.get(owner, Quota())

    def check_administrable(self) -> None:
        """ApiError 404 where there is nothing to administrate from outside, whatever key is sent."""
        if self._admin is None and not self._is_admin_open:
            message = "/admin and /dashboard need a server that was started with --admin-key"
            raise ApiError(404, message, code="unknown_url")

    def admin(self, authorization: str | None) -> Caller:
        """The operator; ApiError 401, or 404 where there is nothing to administrate from outside."""
        self.check_administrable()
        if self._admin is None:
            return Caller(is_admin=True)
        found = _match([(self._admin, Caller(is_admin=True))], _bearer(authorization))
        if found is None:
            raise _refused(authorization, "the admin key")
        return found


def owner_of(key: ApiKey) -> str:
    """The owner of what a key makes; never the key itself, which must not reach the disk."""
    return "key-" + _digest(key.key).hex()[:32] if key.owner is None else key.owner


def _caller(key: ApiKey) -> Caller:
    return Caller(owner_of(key), key.tiers, (key.clamp,))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _bearer(authorization: str | None) -> bytes:
    """Digest of the key in the header; of nothing where there is none."""
    scheme, _, key = (authorization or "").partition(" ")
    return _digest(key.strip() if scheme.lower() == "bearer" else "")


def _match(known: Sequence[tuple[bytes, Caller]], digest: bytes) -> Caller | None:
    """Looks at every key, whichever fits."""
    found: Caller | None = None
    for key, caller in known:
        if hmac.compare_digest(key, digest):
            found = caller
    return found


def _refused(authorization: str | None, what: str) -> ApiError:
    how = "the one sent is not known" if authorization else "send it as 'Authorization: Bearer KEY'"
    message = f"this endpoint needs {what}; {how}"
    return ApiError(401, message, param=None, code="invalid_api_key", headers=_UNAUTHORIZED)
