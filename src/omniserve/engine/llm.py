"""LLM: the engine for callers without asyncio. Calls from several threads run at once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from omniserve.config import EngineConfig
from omniserve.engine.async_llm import AsyncLLM, Message
from omniserve.engine.progress import Progress
from omniserve.errors import EngineDeadError, RequestError
from omniserve.model.tokenizer import Tokenizer
from omniserve.types import SLO, Prompt, RequestOutput, SamplingParams

T = TypeVar("T")
OnProgress = Callable[[int, RequestOutput], None]


class LLM:
    """A model served by an engine process of its own.

    Settings are those of `omniserve.config.EngineConfig`, for instance dtype, device_threads, host_threads,
    device_memory_bytes, host_memory_bytes, host_offload, reentry, max_model_len, page_size. Use it as a
    context manager, or call close().
    """

    def __init__(self, model: str = "smollm2-135m", **settings: Any) -> None:
        self._llm = AsyncLLM(model, **settings)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="omniserve-loop", daemon=True)
        self._thread.start()
        self._is_closed = False

    @property
    def config(self) -> EngineConfig:
        """The settings in force."""
        return self._llm.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._llm.tokenizer

    @property
    def engine_pid(self) -> int:
        return self._llm.engine_pid

    @property
    def startup_s(self) -> float:
        return self._llm.startup_s

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        service_class: str | Sequence[str] = "latency_sensitive",
        on_progress: OnProgress | None = None,
        cache_salt: str | Sequence[str] | None = None,
        slo: SLO | Sequence[SLO | None] | None = None,
        completion_window_s: float | None = None,
    ) -> list[RequestOutput]:
        """Generate for every prompt (text or token ids) and return the outputs in their order.

        sampling_params, service_class and cache_salt: one for all or one per prompt; cached prefixes are
        shared only among requests of the same salt (None: those without one). slo: targets of their own,
        within the clamp of their class; one for all or one per prompt (None: the class's).
        completion_window_s: seconds in which best-effort jobs should end. on_progress(i, output) is called
        after each token. Raises RequestError naming the first prompt that can not be served, before any of
        them runs, and SloUnattainableError when one could not have its targets now; the others end with it.
        """
        arrived_s = time.monotonic()
        batch = [self._llm.encode(p) for p in _as_list(prompts)]
        service = (service_class, cache_salt, slo, completion_window_s)
        return self._run_batch(batch, sampling_params, on_progress, arrived_s, *service)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        service_class: str | Sequence[str] = "latency_sensitive",
        on_progress: OnProgress | None = None,
        cache_salt: str | Sequence[str] | None = None,
        slo: SLO | Sequence[SLO | None] | None = None,
        completion_window_s: float | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of them, rendered by the model's chat template."""
        arrived_s = time.monotonic()
        if not messages or isinstance(messages[0], Mapping):
            messages = cast("Sequence[Sequence[Message]]", [messages])
        conversations = cast("Sequence[Sequence[Message]]", messages)
        batch = [self._llm.encode_chat(c) for c in conversations]
        service = (service_class, cache_salt, slo, completion_window_s)
        return self._run_batch(batch, sampling_params, on_progress, arrived_s, *service)

    def stats(self) -> dict[str, Any]:
        """Counters and gauges of the engine; see docs/design.md."""
        return self._call(self._llm.stats())

    def explain(self) -> dict[str, Any]:
        """Why the engine's last plans are as they are, and its last refusals; see docs/policy.md."""
        return self._call(self._llm.explain())

    def close(self) -> None:
        """End the engine and its host. Calls still running get EngineDeadError."""
        if self._is_closed:
            return
        self._is_closed = True
        self._llm.close()
        # Calls still on their way out hear of the end before their loop stops.
        asyncio.run_coroutine_threadsafe(_finish_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if self._is_closed:
            coroutine.close()
            raise EngineDeadError("this LLM was closed; make a new one")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _run_batch(
        self,
        batch: list[list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        on_progress: OnProgress | None,
        arrived_s: float,
        service_class: str | Sequence[str],
        cache_salt: str | Sequence[str] | None,
        slo: SLO | Sequence[SLO | None] | None,
        window_s: float | None,
    ) -> list[RequestOutput]:
        params = _one_each(sampling_params or SamplingParams(), len(batch), "sampling_params", SamplingParams)
        classes: list[str] = _one_each(service_class, len(batch), "service_class", str)
        salts: list[str | None] = [None] * len(batch)
        if cache_salt is not None:
            salts = [*_one_each(cache_salt, len(batch), "cache_salt", str)]
        slos: list[SLO | None] = [None] * len(batch)
        if slo is not None:
            slos = [*_one_each(cast("SLO | Sequence[SLO]", slo), len(batch), "slo", SLO)]
        for i, (prompt, own, kind, salt) in enumerate(zip(batch, params, classes, salts, strict=True)):
            try:
                self._llm.check(prompt, own, kind, salt, slos[i], window_s)
            except RequestError as error:
                raise RequestError(error.field, f"{error.reason} (prompt number {i})") from None

        async def run_one(i: int) -> RequestOutput:
            progress: Progress | None = None
            service = (classes[i], None, arrived_s, salts[i], slos[i], window_s)
            async for progress in self._llm.stream(batch[i], params[i], *service):
                if on_progress is not None:
                    on_progress(i, progress.output())
            assert progress is not None
            return progress.output()

        async def run_all() -> list[RequestOutput]:
            tasks = [asyncio.create_task(run_one(i)) for i in range(len(batch))]
            try:
                return list(await asyncio.gather(*tasks))
            finally:  # one failed, or the caller was interrupted: the others must not run on
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        return self._call(run_all())


async def _finish_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*others, return_exceptions=True)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt (text, or a list of ids) becomes a list of one."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [cast("Prompt", prompts)]
    return list(cast("Sequence[Prompt]", prompts))


def _one_each(value: T | Sequence[T], count: int, field: str, kind: type[T]) -> list[T]:
    if isinstance(value, kind):
        return [value] * count
    values = list(cast("Sequence[T]", value))
    if len(values) != count:
        raise RequestError(field, f"one value, or one per prompt: {count} prompts, {len(values)} values")
    return values
