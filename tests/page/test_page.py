"""The live page in a real browser, over a real server under load. Screenshots go to build/page."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import openai
import pytest

from server.processes import PATIENCE_S, Served, serving

pytestmark = [pytest.mark.page, pytest.mark.timeout(1200)]

SHOTS = Path(__file__).parents[2] / "build" / "page"
# Seconds of load before the pictures are taken: the charts need something to show.
LOAD_S = float(os.environ.get("OMNISERVE_PAGE_LOAD_S", "45"))
ADMIN_KEY = "sk-admin"
EVIL = "<img src=x onerror=\"document.title='broken'\">"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 380, "height": 780}
OTHER_LOOKS = (
    ("desktop-dark", DESKTOP, "dark"),
    ("phone", PHONE, "light"),
    ("phone-dark", PHONE, "dark"),
)
HELLO = [{"role": "user", "content": "Hello, how are you?"}]
# Lanes on a host, targets, and a client that may ask for ones that nobody can keep.
SETTINGS = (
    *("--served-model-name", "tiny", "--admin-key", ADMIN_KEY, "--host-offload", "always"),
    *("--device-threads", "1", "--host-threads", "1", "--device-memory-bytes", str(64 * 1024**2)),
    *("--slo-ttft-s", "1", "--slo-tpot-s", "0.2", "--batch-concurrency", "8"),
    *("--slo-tightest-ttft-s", "0.001", "--slo-tightest-tpot-s", "0.001"),
)


@pytest.fixture(scope="module", autouse=True)
def _playwright() -> None:
    pytest.importorskip("playwright.sync_api", reason="`make test-page` installs it")


@pytest.fixture(scope="module")
def tiny(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama(max_position_embeddings=2048)


class Load:
    """Chats, flex requests and refusals, from threads, until it is left."""

    def __init__(self, server: Served) -> None:
        self._server, self._is_over = server, threading.Event()
        self.num_refused = 0
        targets = (self._chat, self._chat, self._flex, self._flex, self._too_tight)
        self._threads = [threading.Thread(target=self._loop, args=(one,)) for one in targets]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _loop(self, turn: Callable[[openai.OpenAI, int], None]) -> None:
        with self._server.client() as client:
            for number in itertools.count():
                if self._is_over.is_set():
                    return
                with suppress(openai.APIConnectionError, openai.InternalServerError):
                    turn(client, number)

    def _ask(self, client: openai.OpenAI, max_tokens: int, **more: Any) -> None:
        extra = {"ignore_eos": True}
        client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=max_tokens, extra_body=extra, **more
        )

    def _chat(self, client: openai.OpenAI, number: int) -> None:
        with suppress(openai.RateLimitError):
            self._ask(client, 20 + 7 * (number % 5))
        self._is_over.wait(0.1 * (number % 4))

    def _flex(self, client: openai.OpenAI, number: int) -> None:
        self._ask(client, 100 + number % 60, service_tier="flex")

    def _too_tight(self, client: openai.OpenAI, number: int) -> None:
        try:
            self._ask(client, 5, extra_headers={"x-slo-ttft-ms": "1", "x-slo-tpot-ms": "1"})
        except openai.RateLimitError:
            self.num_refused += 1
        self._is_over.wait(3)


def submit(server: Served, num_lines: int, filename: str, **more: Any) -> str:
    """A batch; its id."""
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 60, "ignore_eos": True}
    lines = (
        {"custom_id": f"{EVIL}{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for i in range(num_lines)
    )
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with server.client() as client:
        file = client.files.create(file=(filename, content), purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", **more
        )
    return str(batch.id)


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium as the system has it; `make test-page` says how to get it."""
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium")
    assert found is not None, "no chromium; scripts/preflight.sh --page says how to install it"
    with sync_playwright() as playwright:
        # As root, as in containers, Chromium's own sandbox does not start.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        one = playwright.chromium.launch(executable_path=found, args=arguments)
        try:
            yield one
        finally:
            one.close()


class Eyes:
    """A page, and what went wrong in it."""

    def __init__(self, browser: Any, url: str, viewport: dict[str, int], scheme: str = "light") -> None:
        self.page = browser.new_page(viewport=viewport, color_scheme=scheme)
        self.page.set_default_timeout(1000 * PATIENCE_S)
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(f"exception: {error}"))
        self.page.on("console", self._hear)
        self.page.goto(url + "/dashboard")

    def _hear(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(f"{message.type}: {message.text}")

    def unlock(self) -> None:
        """Give the key. The refusal before it is the one error that a browser reports by itself."""
        self.page.locator("#ask").wait_for(state="visible")
        self.page.get_by_label("Admin key").fill(ADMIN_KEY)
        self.page.get_by_role("button").click()
        self.page.locator("#body").wait_for(state="visible")
        self.forget(lambda error: "401" in error)

    def forget(self, expected: Callable[[str], bool]) -> None:
        self.errors = [error for error in self.errors if not expected(error)]

    def text(self, selector: str) -> str:
        return str(self.page.locator(selector).inner_text())

    def wait_text(self, selector: str, pattern: str) -> None:
        """Until the text of a part matches."""
        self.wait_until(lambda: re.search(pattern, self.text(selector), re.DOTALL), pattern)

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        """Only a hang can fail this."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"never seen: {what}\n{self.text('body')}\n{self.errors}"
            self.page.wait_for_timeout(50)

    @property
    def times(self) -> list[float]:
        """Of the history that the page holds."""
        return list(self.page.evaluate("past.at"))

    def shoot(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png", full_page=True)

    @property
    def overflows(self) -> bool:
        """Whether it has to be moved sideways."""
        return bool(self.page.evaluate("document.documentElement.scrollWidth > innerWidth"))


def check_numbers(eyes: Eyes, ended: str, under_way: str) -> None:
    eyes.wait_text("#chat-tiles", r"\d %")
    eyes.wait_text("#chat-tiles", r"(within|above) 1 s")
    eyes.wait_text("#batch-tiles", r"[1-9][\d.,]* per s")
    eyes.wait_text("#batch-tiles", r"up.*% busy")
    eyes.wait_text("#chat-now", r"Running now: .*(waits?|decodes?)")
    eyes.wait_text("#batch-now", r"[1-9]\d* decodes?, the longest gap now is [\d.]+ m?s")
    eyes.wait_text("#refusals", r"slo unattainable.*predicted [\d.]+ m?s, target 1.0 ms")
    eyes.wait_text("#batches", r"\d+ of 2,000 lines.*done in about \d+")
    for batch_id in (ended, under_way):
        assert batch_id in eyes.text("#batches")
    assert eyes.page.locator("#batches progress").count() == 3
    assert eyes.page.locator("svg.chart path[d^=M]").count() >= 9, "every line has points"
    label = eyes.page.locator("#chat-charts svg.chart").first.get_attribute("aria-label")
    assert re.match(r"Time to first token.* p99 [\d.]+ m?s.* target 1 s", label), label


def check_names(eyes: Eyes) -> None:
    """What users named is text."""
    assert EVIL in eyes.text("#batches")
    assert eyes.page.locator("main img").count() == 0
    assert eyes.page.title() == "OmniServe"


def look_again(chromium: Any, server: Served) -> None:
    """With other eyes: they see the history at once, and need not move the page sideways."""
    for name, viewport, scheme in OTHER_LOOKS:
        eyes = Eyes(chromium, server.base_url, viewport, scheme)
        eyes.unlock()
        assert eyes.page.locator("svg.chart path[d^=M]").count() >= 9
        eyes.wait_text("#batch-tiles", r"[1-9][\d.,]* per s")
        assert not eyes.overflows
        eyes.shoot(name)
        assert eyes.errors == []
        eyes.page.close()


def test_the_page_shows_a_server_at_work(tiny: Path, tmp_path: Path) -> None:
    with serving(str(tiny), "--state-dir", str(tmp_path / "s"), *SETTINGS) as server, browser() as chromium:
        eyes = Eyes(chromium, server.base_url, DESKTOP)
        eyes.unlock()
        assert "Nothing was refused" in eyes.text("#refusals")
        assert eyes.text("#batches") == "No batch yet."
        eyes.shoot("empty")
        ended = submit(server, 5, "evaluation.jsonl", metadata={"name": "Nightly evaluation"})
        with server.client() as client:
            server.wait_until(lambda: client.batches.retrieve(ended).status == "completed", "it is through")
        under_way = submit(server, 2000, f"{EVIL}.jsonl", metadata={"name": EVIL})
        submit(server, 300, "summaries of reports.jsonl")
        with Load(server) as load:
            time.sleep(LOAD_S)
            server.wait_until(lambda: load.num_refused >= 2, "requests are refused")
            check_numbers(eyes, ended, under_way)
            check_names(eyes)
            assert not eyes.overflows
            eyes.shoot("desktop-light")
            look_again(chromium, server)
        server.post("/admin/best_effort/pause", authorization=f"Bearer {ADMIN_KEY}")
        eyes.page.get_by_text("best-effort paused").wait_for(state="visible")
        assert eyes.errors == []


def test_a_chat_that_is_stuck_shows_while_it_runs(tiny: Path) -> None:
    def ask() -> None:
        with server.client() as client, suppress(openai.RateLimitError):  # its target has passed
            client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4)

    with serving(str(tiny), *SETTINGS) as server, browser() as chromium:
        eyes = Eyes(chromium, server.base_url, PHONE)
        eyes.unlock()
        eyes.wait_text("#chat-now", "Running now: nothing")
        found = re.search(r"the engine is up .*\(pid (\d+)\)", server.log)
        assert found is not None
        chat, engine = threading.Thread(target=ask), int(found[1])
        os.kill(engine, signal.SIGSTOP)
        try:
            chat.start()
            eyes.wait_text("#chat-now", r"1 request waits .* the oldest for [\d.]+ s .* 1 past the target")
            eyes.wait_text("#state", "no sign")
            assert not eyes.overflows
            eyes.shoot("stuck")
        finally:
            os.kill(engine, signal.SIGCONT)
            chat.join()
        eyes.wait_text("#chat-now", "Running now: nothing")
        assert eyes.errors == []


def test_a_wrong_key_is_told_and_shows_nothing(tiny: Path) -> None:
    with serving(str(tiny), *SETTINGS) as server, browser() as chromium:
        eyes = Eyes(chromium, server.base_url, PHONE)
        eyes.page.get_by_label("Admin key").fill("sk-wrong")
        eyes.page.get_by_role("button").click()
        eyes.page.get_by_text("does not know that key").wait_for(state="visible")
        assert not eyes.page.locator("#body").is_visible()
        eyes.shoot("key")
        eyes.unlock()
        assert "no batches" in eyes.text("#batches")
        assert eyes.errors == []


def test_the_page_survives_a_restart_of_the_server(tiny: Path) -> None:
    with browser() as chromium:
        with serving(str(tiny), *SETTINGS) as server:
            eyes = Eyes(chromium, server.base_url, DESKTOP)
            eyes.unlock()
            eyes.wait_until(lambda: len(eyes.times) >= 2, "history")
            first = eyes.times[0]
        eyes.page.get_by_text("No connection since").wait_for(state="visible")
        eyes.shoot("no-connection")
        port = server.base_url.rsplit(":", 1)[1]
        with serving(str(tiny), *SETTINGS, "--port", port):
            eyes.page.get_by_text("No connection since").wait_for(state="hidden")
            eyes.wait_text("#state", "ready")
            last = eyes.times[-1]
            eyes.wait_until(lambda: eyes.times[-1] > last, "news")
            assert eyes.times[0] == first, "what was seen before is still there"
            eyes.forget(lambda error: "ERR_CONNECTION" in error or "Failed to load" in error)
            assert eyes.errors == []
