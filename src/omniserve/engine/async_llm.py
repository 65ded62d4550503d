"""AsyncLLM: text in, text out, over an engine process. Everything about text happens here."""

from __future__ import annotations

import asyncio
import itertools
import operator
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import fields, replace
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from omniserve.config import EngineConfig
from omniserve.engine.acceptance import Acceptance, check_cache_salt, check_service
from omniserve.engine.client import EngineClient
from omniserve.engine.mailbox import Mailbox
from omniserve.engine.messages import Token
from omniserve.engine.progress import Progress
from omniserve.errors import ConfigError, RequestError, SloUnattainableError
from omniserve.model.sources import ensure_model
from omniserve.model.tokenizer import load_tokenizer
from omniserve.seeds import derive_seed
from omniserve.types import SLO, Prompt, RequestOutput, SamplingParams, service_class_named

Message = Mapping[str, Any]


def make_config(settings: Mapping[str, Any]) -> EngineConfig:
    """Settings by name; ConfigError naming unknown ones."""
    known = {f.name for f in fields(EngineConfig)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ConfigError(f"unknown setting {', '.join(unknown)}; known settings: {', '.join(sorted(known))}")
    return EngineConfig(**settings)


def _one_text_each(params: SamplingParams) -> list[SamplingParams]:
    """The parameters of each of the `n` texts: its own seed; the prompt is scored with the first one."""
    if params.n == 1:
        return [params]
    return [
        replace(
            params,
            n=1,
            seed=None if params.seed is None else derive_seed(params.seed, i),
            prompt_logprobs=params.prompt_logprobs if i == 0 else None,
        )
        for i in range(params.n)
    ]


class AsyncLLM:
    """An engine for asyncio callers. `submit` yields the growing output of one request.

    Settings are those of `omniserve.config.EngineConfig`. The constructor blocks until the engine is up.
    hang_timeout_s: an engine that gives no sign of life for so many seconds is killed; None: never.
    """

    def __init__(
        self, model: str = "smollm2-135m", hang_timeout_s: float | None = None, **settings: Any
    ) -> None:
        self.config = make_config({"model": model, **settings})
        is_real = self.config.load_format != "dummy"
        self.path = ensure_model(self.config.model, self.config.revision, with_weights=is_real)
        self.tokenizer = load_tokenizer(self.path, is_required=is_real)
        self._client = EngineClient(self.config, self.path, hang_timeout_s)
        self._names = itertools.count()
        self._running: dict[str, Callable[[], None]] = {}
        # Of the event loops on which requests run now.
        self._mailboxes: WeakValueDictionary[asyncio.AbstractEventLoop, Mailbox] = WeakValueDictionary()

    @property
    def engine_pid(self) -> int:
        return self._client.pid

    @property
    def silent_s(self) -> float:
        """Seconds since the engine's last sign of life, of which there is one every second."""
        return self._client.silent_s

    @property
    def startup_s(self) -> float:
        """Seconds the engine process took from its start until it could serve."""
        return self._client.info.startup_s

    @property
    def acceptance(self) -> Acceptance:
        """What the engine takes: context length, vocabulary, room for one request."""
        return self._client.info.acceptance

    async def wait_ended(self) -> str:
        """Wait until the engine process has ended, whyever; returns the reason."""
        return await asyncio.wrap_future(self._client.death)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt given as text or as ids; RequestError for anything else."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        try:
            return [t if type(t) is bool else int(operator.index(t)) for t in prompt]
        except TypeError:
            raise RequestError("prompt", "must be text or a list of token ids (integers)") from None

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation rendered by the model's chat template, ready for the answer."""
        if not messages:
            raise RequestError("messages", "must hold at least one message")
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_bad_words(self, params: SamplingParams) -> list[list[int]]:
        """Token sequences of the bad words: as at the beginning of a text, and with a space before them where
        that is the same number of tokens and another first one."""
        found: list[list[int]] = []
        for word in params.bad_words or ():
            bare, spaced = (
                self.tokenizer.encode(space + word.lstrip(), add_special_tokens=False) for space in ("", " ")
            )
            found.append(bare)
            if len(spaced) == len(bare) and spaced[:1] != bare[:1]:
                found.append(spaced)
        return found

    def check(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        service_class: str,
        cache_salt: str | None = None,
        slo: SLO | None = None,
        completion_window_s: float | None = None,
    ) -> None:
        """Raise RequestError when the engine would refuse this request, whatever else it has to do."""
        check_service(self.config, service_class, slo, completion_window_s)
        self._checked_bad_words(prompt, params, cache_salt)

    async def check_arrival(
        self,
        num_prompt: int,
        max_tokens: int | None,
        service_class: str,
        arrived_s: float,
        slo: SLO | None = None,
        priority: int = 0,
    ) -> None:
        """Raise SloUnattainableError for a request that `stream` would refuse for its targets whatever its
        prompt is, of `num_prompt` tokens at least: worth asking before a long prompt is tokenised.

        The engine answers between two walks; where nothing is promised, nobody is asked.
        """
        kind = service_class_named(service_class, self.config.classes)
        if self.config.admission == "off" or kind.slo_of(slo) is None:
            return
        asked = num_prompt, max_tokens, service_class, slo, arrived_s, priority
        found = await asyncio.wrap_future(self._client.foresee(*asked))
        if found:
            raise SloUnattainableError(**found)

    def _checked_bad_words(
        self, prompt: Sequence[int], params: SamplingParams, cache_salt: str | None
    ) -> list[list[int]]:
        """Bad words as tokens, and with their help the checks of everything but class and targets."""
        check_cache_salt(cache_salt)
        bad_words = self.encode_bad_words(params)
        self.acceptance.check(prompt, params, bad_words)
        return bad_words

    async def submit(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        service_class: str = "latency_sensitive",
        request_id: str | None = None,
        cache_salt: str | None = None,
        slo: SLO | None = None,
        completion_window_s: float | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the request's output after each token (cumulative); the last one has a finish reason.

        cache_salt: cached prefixes are shared only among requests of the same salt (None: those without one).
        slo: targets of its own, within its class's clamp. completion_window_s: seconds in which a best-effort
        job should end; it goes before those that have more time left. priority: within the class, lower goes
        first.
        Leaving the iterator early aborts the request. Raises RequestError for a request that can not be
        served, SloUnattainableError for one whose targets could not be held now, and EngineDeadError when the
        engine ends.
        """
        arrived_s = time.monotonic()
        ids, params = self.encode(prompt), sampling_params or SamplingParams()
        service = (service_class, request_id, arrived_s, cache_salt, slo, completion_window_s, priority)
        async with aclosing(self.stream(ids, params, *service)) as stream:
            async for progress in stream:
                yield progress.output()

    async def stream(
        self,
        ids: list[int],
        params: SamplingParams,
        service_class: str,
        request_id: str | None,
        arrived_s: float,
        cache_salt: str | None = None,
        slo: SLO | None = None,
        completion_window_s: float | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[Progress, None]:
        """`submit` for a tokenised prompt whose time counts from `arrived_s` (time.monotonic()).

        It yields the same Progress after each token: to look at what is new costs the same however long the
        text is.
        """
        check_service(self.config, service_class, slo, completion_window_s)
        bad_words = self._checked_bad_words(ids, params, cache_salt)
        name = request_id if request_id is not None else f"request-{next(self._names)}"
        if name in self._running:
            raise RequestError("request_id", f"{name!r} is running already")
        loop, news = asyncio.get_running_loop(), asyncio.Queue[tuple[float, int, Token | Exception | None]]()
        mailbox = self._mailboxes.setdefault(loop, Mailbox(loop))

        def listen(index: int, item: Token | Exception | None) -> None:
            mailbox.put(news.put_nowait, (time.monotonic(), index, item))

        engine_ids: list[int] = []

        def leave() -> None:
            for engine_id in engine_ids:
                self._client.abort(engine_id)

        def stop() -> None:
            leave()
            listen(0, None)

        progress = Progress(self.tokenizer, name, ids, params, arrived_s, time.monotonic())
        self._running[name] = stop
        try:
            for index, own in enumerate(_one_text_each(params)):
                hears = partial(listen, index)
                service = (bad_words, cache_salt, slo, arrived_s, completion_window_s, priority)
                engine_ids.append(self._client.add(ids, own, service_class, hears, *service))
            while not progress.is_finished:
                when_s, index, item = await news.get()
                if isinstance(item, Exception):
                    raise item
                if item is not None and progress.has_ended(index):
                    continue  # it was under way when a stop string ended its text
                if item is not None:
                    progress.push(item, when_s, index)
                else:
                    progress.abort()
                yield progress
                if progress.has_ended(index):
                    self._client.abort(engine_ids[index])
        finally:
            del self._running[name]
            leave()

    async def abort(self, request_id: str) -> bool:
        """Stop a request by its id: its iterator yields a last output with finish reason "abort".

        False when no request of that id is running.
        """
        stop = self._running.get(request_id)
        if stop is not None:
            stop()
        return stop is not None

    async def stats(self) -> dict[str, Any]:
        """Counters and gauges of the engine; see docs/design.md."""
        return await asyncio.wrap_future(self._client.stats())

    async def explain(self) -> dict[str, Any]:
        """Why the engine's last plans are as they are, and its last refusals; see docs/policy.md."""
        return await asyncio.wrap_future(self._client.explain())

    def close(self) -> None:
        """End the engine and its host; requests still running raise EngineDeadError."""
        self._client.close()
