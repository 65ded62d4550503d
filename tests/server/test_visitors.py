"""A web page that is opened on the server's machine gets nowhere with a server that asks for no key."""

from __future__ import annotations

import asyncio

import pytest

from omniserve.server.errors import ApiError
from omniserve.server.settings import ApiKey, ServerConfig
from omniserve.server.visitors import Visitors
from server.scripted import CHAT, standing

PRIVATE = ("/admin/best_effort", "/dashboard", "/dashboard/data", "/v1/models", "/v1/files")
PAUSE = "/admin/best_effort/pause"


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:8000",
        "127.1.2.3",
        "localhost",
        "LocalHost:1",
        "a.localhost",
        "localhost.",
        "[::1]:8000",
        "",
    ],
)
def test_every_name_of_this_machine_is_let_in(host: str) -> None:
    Visitors(ServerConfig()).check("POST", {"host": host})
    Visitors(ServerConfig()).check(
        "POST", {"host": host, "origin": f"http://{host}" if host else "http://[::1]"}
    )


@pytest.mark.parametrize(
    "host",
    ["evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "192.0.2.1", "[::2]", "[", "@"],
)
def test_a_name_that_was_made_to_lead_here_is_refused_whatever_is_asked(host: str) -> None:
    for method in ("GET", "POST"):
        with pytest.raises(ApiError, match="--api-key") as caught:
            Visitors(ServerConfig()).check(method, {"host": host})
        assert (caught.value.status_code, caught.value.code) == (403, "foreign_host")


@pytest.mark.parametrize(
    "sent",
    [{"origin": "https://evil.example"}, {"origin": "null"}, {"origin": "http://127.0.0.1.evil.example"},
     {"sec-fetch-site": "cross-site"}],
)  # fmt: skip
def test_a_page_of_another_site_reads_nothing_and_changes_nothing(sent: dict[str, str]) -> None:
    visitors, here = Visitors(ServerConfig()), {"host": "127.0.0.1:8000"}
    for method in ("POST", "DELETE"):
        with pytest.raises(ApiError) as caught:
            visitors.check(method, here | sent)
        assert (caught.value.status_code, caught.value.code) == (403, "foreign_origin")
    visitors.check("GET", here | sent)  # whose answer the browser keeps from the page


def test_keys_guard_a_server_by_themselves_and_one_that_all_may_reach_has_every_name() -> None:
    foreign = {"host": "chat.example", "origin": "https://chat.example"}
    for config in (ServerConfig(api_keys=(ApiKey("sk-a"),)), ServerConfig(host="0.0.0.0")):
        Visitors(config).check("POST", foreign)


def test_a_page_gets_nowhere_and_probes_stay_open() -> None:
    async def story() -> None:
        async with standing(before=9) as stand:
            rebound = {"host": "evil.example"}
            for path in PRIVATE:
                answer = await stand.http.get(path, headers=rebound)
                assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_host"), path
            assert (await stand.http.post(PAUSE, headers=rebound)).status_code == 403
            assert (await stand.chat(headers={"origin": "https://evil.example"})).status_code == 403
            assert not stand.doors.is_paused
            assert not stand.llm.asked
            for path in ("/health", "/ready", "/metrics", "/version"):
                assert (await stand.http.get(path, headers=rebound)).status_code == 200
            assert (await stand.chat()).status_code == 200
            own = {"origin": stand.base_url, "sec-fetch-site": "same-origin"}
            assert (await stand.http.post(PAUSE, headers=own)).status_code == 200
            assert stand.doors.is_paused

    asyncio.run(story())


def test_an_admin_key_does_not_open_the_rest_to_pages() -> None:
    async def story() -> None:
        async with standing(before=9, admin_key="sk-admin") as stand:
            body = {"messages": [{"role": "user", "content": "Hello"}]}
            answer = await stand.http.post(CHAT, json=body, headers={"host": "evil.example"})
            assert answer.status_code == 403

    asyncio.run(story())
