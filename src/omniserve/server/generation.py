"""The one path from work to the engine and back: token ids in, growing texts out, times noted on the way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar, cast

from omniserve.engine.async_llm import AsyncLLM
from omniserve.engine.progress import Progress
from omniserve.engine.progress import Text as TextProgress
from omniserve.errors import RequestError, SloUnattainableError
from omniserve.server.errors import invalid, timed_out
from omniserve.server.metrics import ServerMetrics
from omniserve.server.prompts import SHORT_CHARS, Tokenising, check_fits, num_chars
from omniserve.server.request_models import Message
from omniserve.server.served import Served
from omniserve.server.settings import ServerConfig
from omniserve.server.shapes import Position, Text, usage_of
from omniserve.server.work import Origin, Work
from omniserve.types import SLO, CompletionOutput, RequestMetrics, RequestOutput

T = TypeVar("T")


class Generation:
    """Runs work on an engine."""

    def __init__(self, config: ServerConfig, metrics: ServerMetrics) -> None:
        self._config, self._metrics = config, metrics
        self._tokenising = Tokenising()

    def close(self) -> None:
        self._tokenising.close()

    def start(self, llm: AsyncLLM, work: Work, origin: Origin) -> Run:
        return Run(llm, work, origin, self._tokenising, self._metrics, self._timeout_s(work, origin))

    def _timeout_s(self, work: Work, origin: Origin) -> float | None:
        """Seconds from arrival to the first token; a line of a batch has all the time its batch has."""
        if origin.window_s is not None:
            return None
        if work.tier.is_best_effort:
            return self._config.best_effort_queue_timeout_s or None
        return self._config.queue_timeout_s or None


class Run:
    """One request in the engine, all its prompts. Iterate `grown` or await `whole`, once."""

    def __init__(
        self,
        llm: AsyncLLM,
        work: Work,
        origin: Origin,
        tokenising: Tokenising,
        metrics: ServerMetrics,
        timeout_s: float | None,
    ) -> None:
        self._llm, self._work, self._origin = llm, work, origin
        self._tokenising, self._metrics, self._timeout_s = tokenising, metrics, timeout_s
        self.service_class = work.tier.service_class
        self._progress: list[Progress | None] = [None] * len(work.prompts)
        self.growing = [Growing(i) for i in range(work.params.n * len(work.prompts))]
        self.ttft_s: float | None = None

    @property
    def slo(self) -> SLO | None:
        """Targets that the request brought."""
        return self._work.slo

    @property
    def has_token(self) -> bool:
        return self.ttft_s is not None

    @property
    def silent_since_s(self) -> float:
        """When the text that waits longest had its newest token; its arrival when it has none.

        As the server took tokens in: a client that does not read what it is sent holds that up.
        """
        arrived_s, n = self._origin.arrived_s, self._work.params.n
        since_s = [
            self.growing[at * n + i].last_s or arrived_s
            for at, progress in enumerate(self._progress)
            for i in range(n)
            if progress is None or progress.texts[i].finish_reason is None
        ]
        return min(since_s, default=time.monotonic())

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds of a token after the first, of the slowest text; None where none has two.

        As the tokens came from the engine: a client that reads slowly is no miss of ours.
        """
        return RequestMetrics.over(output.metrics for output in self.outputs).tpot_s

    @property
    def served(self) -> Served:
        """What there is to account for, as it stands."""
        outputs, params = self.outputs, self._work.params
        sizes = [len(one.token_ids) for output in outputs for one in output.outputs]
        return Served(
            num_prompt=sum(len(output.prompt_token_ids) for output in outputs),
            num_cached=sum(output.outputs[0].metrics.num_cached_tokens for output in outputs),
            num_output=sum(sizes),
            num_longest=max(sizes, default=0),
            num_texts=params.n,
            max_tokens=params.max_tokens if self._work.shows_output else 0,
            metrics=RequestMetrics.over(output.metrics for output in outputs),
        )

    @property
    def outputs(self) -> list[RequestOutput]:
        """What there is of each prompt that has begun."""
        return [progress.output() for progress in self._progress if progress is not None]

    @property
    def usage(self) -> dict[str, Any]:
        return usage_of(self.outputs, self._work.shows_output)

    async def whole(self) -> dict[str, Any]:
        """The answer as one object; ApiError."""
        async with aclosing(self.grown()) as grown:
            async for _ in grown:
                pass
        texts = [
            self._whole_text(at * self._work.params.n + one.index, output, one)
            for at, output in enumerate(self.outputs)
            for one in output.outputs
        ]
        return self._work.shape.whole(texts, self.usage)

    def grown(self) -> AsyncGenerator[int, None]:
        """The index of a prompt whenever one of its texts has a new token; ApiError.

        Few layers lie under it, for each takes its time for each token of each stream.
        """
        streams = [self._grown(at) for at in range(len(self._work.prompts))]
        return streams[0] if len(streams) == 1 else merged(streams)

    def news(self, at: int) -> list[Text]:
        """What the choices of a prompt have that was not told yet."""
        progress, n = self._progress[at], self._work.params.n
        assert progress is not None
        found: list[Text] = []
        for one in progress.texts:
            growing = self.growing[at * n + one.index]
            if self._work.echo and not growing.has_begun:
                found.append(growing.begin(self._echo(growing.index, progress.output())))
            new = growing.take(one, self._work.shows_output)
            if new is not None:
                found.append(new)
        return found

    # ------------------------------------------------------------ echo

    def _echo(self, index: int, output: RequestOutput) -> Text:
        """The prompt as the beginning of a choice."""
        at = index // self._work.params.n
        prompt = self._work.prompts[at]
        ids = output.prompt_token_ids
        text = (
            prompt if isinstance(prompt, str) else self._llm.tokenizer.decode(ids, skip_special_tokens=False)
        )
        if self._work.params.logprobs is None:
            return Text(index, text, None)
        # Texts after the first of a prompt are scored with it.
        first = self._llm.tokenizer.decode(ids[:1], skip_special_tokens=False)
        return Text(index, text, None, output.prompt_logprobs or [], first)

    def _whole_text(self, index: int, output: RequestOutput, one: CompletionOutput) -> Text:
        logprobs: Sequence[Position | None] | None = one.logprobs
        if not self._work.echo:
            return Text(index, one.text, one.finish_reason, logprobs)
        echo = self._echo(index, output)
        if not self._work.shows_output:
            return replace(echo, finish_reason="length")
        if logprobs is not None:
            logprobs = [*(echo.logprobs or ()), *logprobs]
        return replace(echo, text=echo.text + one.text, finish_reason=one.finish_reason, logprobs=logprobs)

    # ------------------------------------------------------------ engine

    async def _grown(self, at: int) -> AsyncGenerator[int, None]:
        work, origin = self._work, self._origin
        await self._in_time(self._check_arrival(at))
        ids = await self._in_time(self._encoded(at))
        name = origin.answer_id if len(work.prompts) == 1 else f"{origin.answer_id}-{at}"
        window_s = None if origin.window_s is None else max(1.0, origin.window_s)
        service = (work.cache_salt, work.slo, window_s, work.priority)
        stream = self._llm.stream(ids, work.params, self.service_class, name, origin.arrived_s, *service)
        async with aclosing(stream):
            try:
                progress = await self._in_time(anext(stream))
            except SloUnattainableError:
                raise
            except RequestError as error:
                field = work.names.get(error.field, error.field)
                raise invalid(field, f"{field}: {error.reason}") from None
            self._note(at, progress)
            yield at
            async for progress in stream:
                self._note(at, progress)
                yield at

    async def _check_arrival(self, at: int) -> None:
        """Whatever can be known without the tokens of a long text is asked before they are made."""
        work, llm = self._work, self._llm
        count = num_chars(work.prompts[at])
        if work.tier.is_best_effort or count <= SHORT_CHARS:
            return
        # A template may leave out what it likes of a chat.
        least = 1 if work.is_chat else -(-count // llm.tokenizer.longest_token)
        limit, arrived_s = work.params.max_tokens, self._origin.arrived_s
        await llm.check_arrival(least, limit, self.service_class, arrived_s, work.slo, work.priority)

    async def _encoded(self, at: int) -> list[int]:
        prompt, param = self._work.prompts[at], "messages" if self._work.is_chat else "prompt"
        if isinstance(prompt, str):
            ids = await self._tokenising.text(self._llm, prompt)
        elif self._work.is_chat:
            ids = await self._tokenising.chat(self._llm, cast("Sequence[Message]", prompt))
        else:
            ids = cast("list[int]", prompt)
        check_fits(self._llm, len(ids), self._work.params, param, self._work.shows_output)
        return ids

    async def _in_time(self, step: Awaitable[T]) -> T:
        """Await a step towards the first token; ApiError 429 when the time for that is over."""
        if self._timeout_s is None:
            return await step
        left_s = self._origin.arrived_s + self._timeout_s - time.monotonic()
        try:
            async with asyncio.timeout(left_s):
                return await step
        except TimeoutError:
            raise timed_out(self._timeout_s, self._work.tier.is_best_effort) from None

    def _note(self, at: int, progress: Progress) -> None:
        """Keep it, and note the times of its new tokens."""
        self._progress[at] = progress
        now = time.monotonic()
        if self.ttft_s is None:
            self.ttft_s = now - self._origin.arrived_s
            self._metrics.first_token(self.service_class, self.ttft_s)
        for one in progress.texts:
            gap_s = self.growing[at * self._work.params.n + one.index].gap_s(len(one.token_ids), now)
            if gap_s is not None:
                self._metrics.token_gap(self.service_class, gap_s)


class Growing:
    """How much of one choice has been given out. last_s: when its newest token came; None before."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.has_begun = False
        self._offset = self._num_chars = self._num_tokens = self._num_timed = 0
        self.last_s: float | None = None
        self._has_ended = False

    def begin(self, echo: Text) -> Text:
        self.has_begun, self._offset = True, len(echo.text)
        return echo

    def take(self, one: TextProgress, shows_output: bool) -> Text | None:
        """What is new; None when nothing is that can be shown yet."""
        self.has_begun = True
        if self._has_ended or (len(one.token_ids) == self._num_tokens and one.finish_reason is None):
            return None
        if not shows_output:
            self._has_ended = True
            return Text(self.index, "", "length")
        text = one.text[self._num_chars :]
        if not text and one.finish_reason is None and one.logprobs is None:
            return None
        logprobs = None if one.logprobs is None else one.logprobs[self._num_tokens :]
        offset = self._offset + self._num_chars
        self._num_chars += len(text)
        self._num_tokens, self._has_ended = len(one.token_ids), one.finish_reason is not None
        return Text(self.index, text, one.finish_reason, logprobs, offset=offset)

    def gap_s(self, num_tokens: int, now: float) -> float | None:
        """Seconds since the token before, when there are more tokens than last time and there was one."""
        if num_tokens == self._num_timed:
            return None
        self._num_timed = num_tokens
        last_s, self.last_s = self.last_s, now
        return None if last_s is None else now - last_s


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Items of all streams as they come; the first error ends all of them."""
    news = asyncio.Queue[tuple[T | None, BaseException | None]]()

    async def drain(stream: AsyncGenerator[T, None]) -> None:
        error: BaseException | None = None
        try:
            async for item in stream:
                news.put_nowait((item, None))
        except Exception as found:
            error = found
        news.put_nowait((None, error))

    tasks = [asyncio.create_task(drain(stream)) for stream in streams]
    num_open = len(tasks)
    try:
        while num_open:
            item, error = await news.get()
            if error is not None:
                raise error
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
