"""Keys: who may do what, whose things are whose, and what a server without keys says."""

from __future__ import annotations

import asyncio
import hmac
from pathlib import Path
from typing import Any

import httpx
import pytest

from omniserve.batch.limits import Quota
from omniserve.errors import ConfigError
from omniserve.server import auth
from omniserve.server.auth import Keyring
from omniserve.server.errors import ApiError
from omniserve.server.run import warn_of_openness
from omniserve.server.settings import ApiKey, ServerConfig
from server.scripted import CHAT, STATS, standing

KEYS = (ApiKey("sk-a"), ApiKey("sk-b", owner="b", tiers=("flex",)))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_with_keys_every_api_endpoint_asks_for_one_and_probes_do_not() -> None:
    async def story() -> None:
        async with standing(before=9, api_keys=KEYS, admin_key="sk-admin") as stand:
            for headers in (
                {},
                bearer("sk-c"),
                {"authorization": "Bearer"},
                {"authorization": "sk-a"},
                bearer("sk-admin"),
            ):
                for path in ("/v1/models", "/v1/unknown"):
                    answer = await stand.http.get(path, headers=headers)
                    assert answer.status_code == 401
                    assert answer.json()["error"]["code"] == "invalid_api_key"
                assert (await stand.chat(headers=headers)).status_code == 401
            assert (await stand.chat(headers=bearer("sk-a"))).status_code == 200
            for path in ("/health", "/ready", "/version", "/metrics"):
                assert (await stand.http.get(path)).status_code == 200

    asyncio.run(story())


def test_admin_asks_for_the_admin_key_alone() -> None:
    async def story() -> None:
        async with standing(api_keys=KEYS, admin_key="sk-admin") as stand:
            for headers in ({}, bearer("sk-a")):
                assert (await stand.http.get("/admin/stats", headers=headers)).status_code == 401
            answer = await stand.http.get("/admin/explanations", headers=bearer("sk-admin"))
            assert answer.json() == {"plans": []}
            assert (await stand.http.get("/admin/stats", headers=bearer("sk-admin"))).json() == STATS

    asyncio.run(story())


def test_without_an_admin_key_only_this_machine_administrates() -> None:
    assert Keyring(ServerConfig()).admin(None).is_admin
    for host in ("0.0.0.0", "::", "192.0.2.1", "gpu-box"):
        with pytest.raises(ApiError, match="--admin-key"):
            Keyring(ServerConfig(host=host)).admin(None)
    # Clients with keys may come through a proxy on this machine.
    with pytest.raises(ApiError, match="--admin-key"):
        Keyring(ServerConfig(api_keys=KEYS)).admin(None)


def test_a_key_may_be_kept_to_tiers() -> None:
    async def story() -> None:
        async with standing(before=9, api_keys=KEYS) as stand:
            refused = await stand.chat(headers=bearer("sk-b"))
            assert (refused.status_code, refused.json()["error"]["param"]) == (403, "service_tier")
            assert (await stand.chat(headers=bearer("sk-b"), service_tier="flex")).status_code == 200

    asyncio.run(story())


def test_the_tiers_of_a_key_hold_for_batches(tmp_path: Path) -> None:
    keys = (ApiKey("sk-a", owner="a", tiers=("default",)), ApiKey("sk-b", owner="a", tiers=("flex",)))

    async def story() -> None:
        async with standing(before=9, api_keys=keys, state_dir=tmp_path / "state") as stand:
            form = {"file": ("in.jsonl", b"{}")}
            headers = bearer("sk-b")
            sent = await stand.http.post("/v1/files", files=form, data={"purpose": "batch"}, headers=headers)
            new = {"input_file_id": sent.json()["id"], "endpoint": CHAT, "completion_window": "24h"}
            refused = await stand.http.post("/v1/batches", json=new, headers=bearer("sk-a"))
            error = refused.json()["error"]
            assert (refused.status_code, error["param"]) == (403, "service_tier")
            assert error["code"] == "tier_not_allowed"
            assert (await stand.http.get("/v1/batches", headers=headers)).json()["data"] == []
            assert (await stand.http.post("/v1/batches", json=new, headers=headers)).status_code == 200

    asyncio.run(story())


@pytest.mark.parametrize("own", ["default", "auto"])
def test_a_key_that_may_have_the_default_tier_may_leave_the_choice_and_ask_for_no_other(own: str) -> None:
    async def story() -> None:
        async with standing(before=9, api_keys=(ApiKey("sk-a", tiers=(own,)),)) as stand:
            for asked in (None, "auto", "default"):
                assert (await stand.chat(headers=bearer("sk-a"), service_tier=asked)).status_code == 200
            for asked in ("priority", "fast", "scale", "flex"):
                refused = await stand.chat(headers=bearer("sk-a"), service_tier=asked)
                assert refused.json()["error"]["code"] == "tier_not_allowed"

    asyncio.run(story())


def test_a_key_keeps_to_its_quota_and_others_to_theirs(tmp_path: Path) -> None:
    keys = (ApiKey("sk-a", quota=Quota(max_files=1, max_open_lines=0)), ApiKey("sk-b"))

    async def story() -> None:
        async with standing(api_keys=keys, state_dir=tmp_path / "state") as stand:

            async def upload(key: str) -> httpx.Response:
                form = {"file": ("in.jsonl", b"{}")}
                return await stand.http.post(
                    "/v1/files", files=form, data={"purpose": "batch"}, headers=bearer(key)
                )

            file_id = (await upload("sk-a")).json()["id"]
            new = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
            batch = await stand.http.post("/v1/batches", json=new, headers=bearer("sk-a"))
            for refused, param in ((await upload("sk-a"), "file"), (batch, "input_file_id")):
                error = refused.json()["error"]
                assert (refused.status_code, error["code"]) == (429, "insufficient_quota")
                assert error["param"] == param
                assert refused.headers["x-should-retry"] == "false"
            assert [(await upload("sk-b")).status_code for _ in range(2)] == [200, 200]

    asyncio.run(story())


def test_retention_is_the_servers_or_the_keys_own(tmp_path: Path) -> None:
    keys = (ApiKey("sk-a", quota=Quota(retention_s=7200)), ApiKey("sk-b"))

    async def story() -> None:
        async with standing(api_keys=keys, state_dir=tmp_path / "state", retention_s=3600) as stand:
            lives = {}
            for key in ("sk-a", "sk-b"):
                form = {"file": ("in.jsonl", b"{}")}
                answer = await stand.http.post(
                    "/v1/files", files=form, data={"purpose": "batch"}, headers=bearer(key)
                )
                lives[key] = answer.json()["expires_at"] - answer.json()["created_at"]
            assert lives == {"sk-a": 7200, "sk-b": 3600}

    asyncio.run(story())


def test_nothing_is_stored_where_the_reserve_of_the_disk_begins(tmp_path: Path) -> None:
    async def story() -> None:
        async with standing(state_dir=tmp_path / "state", disk_reserve_bytes=1 << 60) as stand:
            form = {"file": ("in.jsonl", b"{}")}
            refused = await stand.http.post("/v1/files", files=form, data={"purpose": "batch"})
            assert refused.status_code == 507
            assert str(1 << 60) in refused.json()["error"]["message"]

    asyncio.run(story())


def test_cached_prefixes_are_not_shared_between_owners() -> None:
    async def story() -> None:
        async with standing(before=9, api_keys=(ApiKey("sk-a"), ApiKey("sk-b"))) as stand:
            for key, salt in (("sk-a", None), ("sk-b", None), ("sk-a", "s"), ("sk-b", "s"), ("sk-a", None)):
                await stand.chat(headers=bearer(key), cache_salt=salt)
            salts = [asked["salt"] for asked in stand.llm.asked]
            assert len(set(salts)) == 4
            assert salts[0] == salts[4]
            assert not any("sk-" in salt for salt in salts), "keys go nowhere"

    asyncio.run(story())


def test_owners_cannot_choose_a_name_and_a_salt_that_give_the_salt_of_another() -> None:
    keys = (ApiKey("sk-a", owner="team"), ApiKey("sk-b", owner="team/x"), ApiKey("sk-c", owner="4:team"))

    async def story() -> None:
        async with standing(before=9, api_keys=keys) as stand:
            for key, salt in (("sk-a", "x/"), ("sk-a", "x/y"), ("sk-b", None), ("sk-b", "y"), ("sk-c", "x/")):
                await stand.chat(headers=bearer(key), cache_salt=salt)
            assert len({asked["salt"] for asked in stand.llm.asked}) == 5

    asyncio.run(story())


def test_keys_are_compared_in_constant_time_and_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    in_constant_time = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return in_constant_time(one, other)

    monkeypatch.setattr(auth.hmac, "compare_digest", compare)
    keyring = Keyring(ServerConfig(api_keys=KEYS))
    compared.clear()
    assert keyring.client("Bearer sk-a").owner.startswith("key-")
    assert len(compared) == len(KEYS), "the first one fits, the others are looked at all the same"
    assert all(len(one) == len(other) == 32 for one, other in compared)


def test_keys_of_one_owner_see_the_same_things() -> None:
    keyring = Keyring(
        ServerConfig(api_keys=(ApiKey("x", owner="team"), ApiKey("y", owner="team"), ApiKey("z")))
    )
    owners = [keyring.client(f"Bearer {key}").owner for key in "xyz"]
    assert owners[0] == owners[1] == "team" != owners[2]


def test_an_open_server_that_others_can_reach_warns_loudly(caplog: pytest.LogCaptureFixture) -> None:
    for quiet in (ServerConfig(), ServerConfig(host="::1"), ServerConfig(host="0.0.0.0", api_keys=KEYS)):
        warn_of_openness(quiet)
    assert not caplog.records
    warn_of_openness(ServerConfig(host="0.0.0.0"))
    assert "EVERYBODY" in caplog.text


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"port": 70000}, "port"),
        ({"max_requests": 0}, "max_requests"),
        ({"queue_timeout_s": -1}, r"queue_timeout_s: must be 0 \(no limit\)"),
        ({"grace_s": -1}, "grace_s"),
        ({"api_keys": (ApiKey("a"), ApiKey("a"))}, "api_keys"),
        ({"api_keys": (ApiKey("a"),), "admin_key": "a"}, "admin_key"),
        ({"admin_key": ""}, "admin_key"),
        ({"served_model_name": ("",)}, "served_model_name"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ServerConfig(**settings)


def test_keys_do_not_show_in_settings() -> None:
    assert "sk-a" not in repr(ServerConfig(api_keys=KEYS, admin_key="sk-admin"))
    assert "sk-admin" not in repr(ServerConfig(api_keys=KEYS, admin_key="sk-admin"))
