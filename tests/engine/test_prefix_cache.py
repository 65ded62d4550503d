"""Tokens are the same with cached prefixes as without; less is computed and copied."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from engine.driver import BE, LS, Arrival, Outcome, Subject, assert_exact, run
from engine.prompts import Pool, pool_of
from engine.scenarios import Scenario, Settings, config_of
from engine.scripted import ScriptedEngine
from engine.test_scripted_host import scripted_engine, text_of
from omniserve.engine.page_hashes import PageHashes
from omniserve.errors import RequestError
from omniserve.policy.request import Phase


@pytest.fixture(scope="module")
def tiny(tiny_subject: Callable[..., Subject]) -> Subject:
    return tiny_subject()


@pytest.fixture(scope="module")
def pool() -> Pool:
    rng = random.Random(17)
    return pool_of([rng.randrange(512) for _ in range(4000)])


# ---------------------------------------------------------------- hashes


def test_a_hash_stands_for_a_page_and_all_before_it() -> None:
    assert len(PageHashes(4).extend(range(11))) == 2
    one, other = PageHashes(2).extend([1, 2, 3, 4]), PageHashes(2).extend([5, 2, 3, 4])
    assert one[0] != other[0]
    assert one[1] != other[1], "the second pages hold the same tokens after different ones"


def test_hashes_do_not_depend_on_how_the_text_arrives() -> None:
    text = [random.Random(i).randrange(50_000) for i in range(100)]
    at_once, token_by_token = PageHashes(7), PageHashes(7)
    assert at_once.extend(text) == [h for token in text for h in token_by_token.extend([token])]


def test_salts_keep_hashes_apart() -> None:
    hashes = [PageHashes(2, salt).extend([1, 2, 3, 4]) for salt in (None, "", "a", "b")]
    assert len({h for of_salt in hashes for h in of_salt}) == 8


# ---------------------------------------------------------------- equal tokens, with a real host process


def turns_of(subject: Subject, pool: Pool, service_class: str, num_turns: int, gap: int) -> list[Arrival]:
    """A chat: each prompt is all that was said before, the answers included, and a little more."""
    arrivals = []
    prompt = pool[47].ids
    for turn in range(num_turns):
        arrivals.append(Arrival(gap * turn, prompt, 16, service_class))
        prompt = (*prompt, *subject.reference.generate(prompt, 16), *pool[23].ids[turn : turn + 9])
    return arrivals


def hit_tokens(outcome: Outcome) -> dict[str, int]:
    names = ("device_latency_sensitive", "device_best_effort", "host")
    return {name: outcome.stats["prefix_cache"][name]["hit_tokens"] for name in names}


@pytest.mark.parametrize("service_class", [LS, BE])
@pytest.mark.parametrize("settings", [Settings(), Settings("next_iteration", 16, 8, 5)], ids=str)
def test_turns_of_a_chat_are_exact_and_find_what_was_said(
    tiny: Subject, pool: Pool, service_class: str, settings: Settings
) -> None:
    arrivals = turns_of(tiny, pool, service_class, 4, gap=60)
    story = Scenario(arrivals, lambda outcome: None, "always")
    config = config_of(tiny, story, settings)
    cached = run(tiny, config, arrivals)
    plain = run(tiny, replace(config, enable_prefix_caching=False), arrivals)
    for outcome in (cached, plain):
        assert_exact(tiny, outcome)
    assert set(hit_tokens(plain).values()) == {0}
    saved = plain.stats["prompt_tokens"] - cached.stats["prompt_tokens"]
    hits = hit_tokens(cached)
    assert saved == hits["device_latency_sensitive"] + hits["device_best_effort"]
    # Of each earlier prompt all full pages, of a chat's answers too; those of lanes are cached on the host.
    said = sum(len(a.prompt) + (16 if service_class == LS else 0) for a in arrivals[:-1])
    assert saved >= said - 3 * (settings.page_size + 1)
    assert (hits["host"] > 0) == (service_class == BE)
    assert cached.stats["landed_pages"] < plain.stats["landed_pages"] or service_class == LS


def test_lossy_lanes_share_pages_and_chats_stay_exact(tiny: Subject, pool: Pool) -> None:
    beginning = pool[127].ids
    arrivals = [
        Arrival(20 * i, beginning + pool[33].ids[: 5 * i], 12, LS if i % 3 == 0 else BE) for i in range(7)
    ]
    story = Scenario(arrivals, lambda outcome: None, "always")
    outcome = run(tiny, replace(config_of(tiny, story, Settings()), host_kv_dtype="int8"), arrivals)
    assert hit_tokens(outcome)["host"] > 0
    assert outcome.stats["fetched_pages"] == 0
    for arrival, tokens in zip(outcome.arrivals, outcome.tokens, strict=True):
        assert len(tokens) == 12
        if not arrival.best_effort:
            tiny.reference.check(arrival.prompt, tokens)


# ---------------------------------------------------------------- single stories, on a scripted host


@pytest.fixture(scope="module")
def small(tiny_subject: Callable[..., Subject]) -> Subject:
    return tiny_subject(max_position_embeddings=64)


def served(run: ScriptedEngine, *requests: int) -> None:
    """Steps until these have all their tokens."""
    while any(len(run.asked[i].tokens) < run.asked[i].max_tokens for i in requests):
        run.host.serve_all()
        run.step()


def test_lanes_of_one_prompt_read_the_same_pages_and_each_writes_its_own(small: Subject) -> None:
    run = scripted_engine(small, 40, 40, page_size=4, host_page_size=4, host_offload="always")
    first = run.add(text_of(0, 18), 12, BE)
    while len(run.asked[first].tokens) < 3:
        run.host.serve_all()
        run.step()
    second = run.add(text_of(0, 18), 12, BE)
    while run.engine.state.requests[second].phase is not Phase.LANE:
        run.host.serve_copies()
        run.step()
    ours, theirs = (run.engine.state.active[i].hold.pages for i in (second, first))
    assert ours[:4] == theirs[:4]
    assert not set(ours[4:]) & set(theirs[4:])
    run.finish()
    run.assert_exact()
    run.close()


def test_a_request_dropped_with_its_host_recomputes_only_what_the_device_lost(small: Subject) -> None:
    run = scripted_engine(small, 40, 40, page_size=4, host_page_size=4, host_offload="always")
    lane = run.add(text_of(0, 22), 12, BE)
    while len(run.asked[lane].tokens) < 6:
        run.host.serve_all()
        run.step()
    before = run.engine.stats()["prompt_tokens"]
    run.host.lose()
    run.finish()
    run.assert_exact()
    assert run.engine.stats()["num_dropped"] == 1
    # 22 prompt tokens and 6 others; five full pages of the prompt are on the device still.
    assert run.engine.stats()["prompt_tokens"] - before == 28 - 20
    run.close()


def test_the_metric_counts_prompt_tokens_found_at_the_first_start(small: Subject) -> None:
    run = scripted_engine(small, 40, 40, page_size=4, host_page_size=4)
    served(run, run.add(text_of(0, 18), 3, LS))
    again = run.add(text_of(0, 18), 3, LS)
    assert run.step().num_cached == {again: 16}
    run.finish()
    run.close()


def test_engine_requests_of_another_salt_compute_everything(small: Subject) -> None:
    run = scripted_engine(small, 40, 40, page_size=4, host_page_size=4, host_offload="always")
    params = run.asked
    for salt in ("a", "b", None):
        request = run.add(text_of(0, 18), 4, BE, cache_salt=salt)
        served(run, request)
        assert params[request].tokens == params[0].tokens
    stats = run.engine.stats()["prefix_cache"]
    assert stats["device_best_effort"] == {"queried_tokens": 54, "hit_tokens": 0}
    assert stats["host"]["hit_tokens"] == 0
    run.finish()
    run.assert_exact()
    run.close()


@pytest.mark.parametrize("salt", ["", 5, "\ud800", "x" * 5000])
def test_a_bad_salt_is_refused_by_name(small: Subject, salt: object) -> None:
    run = scripted_engine(small, 8, 8, page_size=4, host_page_size=4)
    with pytest.raises(RequestError, match="1 to 4096 bytes") as caught:
        run.add(text_of(0, 5), 2, LS, cache_salt=salt)
    assert caught.value.field == "cache_salt"
    assert run.engine.is_idle
    run.close()
