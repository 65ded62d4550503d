"""One run of `omniserve bench`: wait for the server, make prompts, warm up, send the load, report."""

from __future__ import annotations

import argparse
import asyncio
import gc
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import chain, islice
from typing import Any

import httpx
from rich.console import Console

from omniserve.bench.http_api import Api, Extras, ServedModel, make_client, served_model
from omniserve.bench.http_batch import BatchResult, run_batch
from omniserve.bench.http_load import PROBE, PROBE_TOKENS, Known, best_effort_sizes, make_load
from omniserve.bench.http_names import CHAT, FIXES_LENGTHS
from omniserve.bench.http_progress import DRAWN_PER_S, show_progress
from omniserve.bench.http_report import (
    Goal,
    Report,
    class_figures,
    definitions,
    read_goal,
    request_rows,
    sender_late,
)
from omniserve.bench.http_setup import Patience, find_tokenizer, make_pool
from omniserve.bench.http_target import HttpTarget
from omniserve.bench.load import Job, Load, Sender, Stream, send_load
from omniserve.bench.measure import machine
from omniserve.bench.prompts import Prompts
from omniserve.bench.workloads import Arrival
from omniserve.errors import OmniServeError
from omniserve.machine import raise_file_limit
from omniserve.types import BEST_EFFORT, LATENCY_SENSITIVE

LS, BE = LATENCY_SENSITIVE.name, BEST_EFFORT.name
# Requests that are not measured: theirs are other prompts than those of the load.
READY, WARM_UP, BATCH = "ready", "warm-up", "batch"


@dataclass(slots=True)
class Finished:
    """What a run leaves. goals: of the classes that sent anything."""

    report: Report
    sender: Sender
    goals: dict[str, Goal | None]


async def run_bench(options: argparse.Namespace, console: Console) -> Finished:
    """The whole run against the server named in the options.

    Raises ConfigError for a flag that does not fit, OmniServeError when the server is not ready in time or
    says no to a request that must succeed.
    """
    raise_file_limit()
    patience = Patience(options.ready_check_timeout_sec)
    try:
        async with make_client(options.base_url, os.environ.get("OPENAI_API_KEY")) as client:
            model = await patience.until_answered(lambda: served_model(client, options.model))
            return await Bench(client, options, model, console).run(patience)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise OmniServeError(f"base-url: {type(error).__name__}: {error}") from error


class Bench:
    """One server, one model, one load."""

    def __init__(
        self, client: httpx.AsyncClient, options: argparse.Namespace, model: ServedModel, console: Console
    ) -> None:
        self._client, self._options, self._model, self._console = client, options, model, console
        self._goals = {LS: read_goal(options.goodput), BE: read_goal(options.be_goodput, "be-goodput")}
        self._extras = {
            LS: Extras(options.service_tier, self._slo_headers(), options.extra_body),
            BE: Extras(options.be_service_tier, {}, options.be_extra_body),
        }
        self._backend = model.backend if options.backend == "auto" else options.backend
        fixes = self._backend in FIXES_LENGTHS if options.ignore_eos is None else options.ignore_eos
        self._api = Api(model.name, options.endpoint, fixes)
        tokenizer = find_tokenizer(options.tokenizer, model, console)
        self._prompts = Prompts(make_pool(tokenizer, options.endpoint == CHAT))
        self._known = Known(tokenizer, options.max_model_len or model.max_model_len)
        self._load = make_load(options, self._known, fixes)
        # Probes and what comes before the load are chats to the server.
        self._target = HttpTarget(client, self._api, self._prompts, self._extras, default=self._extras[LS])

    async def run(self, patience: Patience) -> Finished:
        await patience.until_answered(self._first_answer)
        await self._warm_up()
        for stream in self._load.streams:
            self._prompts.prepare(self._jobs(stream))
        sender, batch = Sender(self._target, self._load), BatchResult()
        with show_progress(self._load, sender, batch, self._console) as show, _no_collection():
            await self._send(sender, show, batch)
        report = self._report(sender, batch)
        return Finished(report, sender, {name: self._goals.get(name) for name in report["classes"]})

    # ------------------------------------------------------------ before the load

    def _slo_headers(self) -> dict[str, str]:
        goal = self._goals[LS]
        if not self._options.slo_headers or goal is None:
            return {}
        targets = {"x-slo-ttft-ms": goal.ttft_s, "x-slo-tpot-ms": goal.tpot_s}
        return {name: f"{1e3 * seconds:g}" for name, seconds in targets.items() if math.isfinite(seconds)}

    async def _first_answer(self) -> None:
        """One short request: what is wrong shows now, not a thousand times."""
        async for _ in self._target.send(Job(0, READY, PROBE_TOKENS, 1, self._options.seed)):
            pass

    async def _warm_up(self) -> None:
        """Requests as long as those of the load. OmniServeError unless all are answered."""
        options = self._options
        chats = ((a.num_prompt, a.num_output) for stream in self._load.streams for a in stream.arrivals)
        sizes = islice(chain(chats, best_effort_sizes(options, self._known)), options.num_warmups)
        stream = Stream(WARM_UP, [Arrival(0.0, *size) for size in sizes], options.max_concurrency)
        load = Load(
            [stream],
            0.0,
            drain_s=None,
            timeout_s=options.request_timeout,
            seed=options.seed,
            is_length_fixed=self._load.is_length_fixed,
        )
        for record in await send_load(self._target, load):
            if record.outcome != "finished":
                raise OmniServeError(f"num-warmups: one request {record.outcome}: {record.reason}")

    def _jobs(self, stream: Stream) -> Iterator[Job]:
        for number, arrival in enumerate(stream.arrivals):
            yield Job(number, stream.service_class, arrival.num_prompt, arrival.num_output, self._load.seed)

    # ------------------------------------------------------------ the load

    async def _send(self, sender: Sender, show: Callable[[], None], result: BatchResult) -> None:
        """The load, and the batch beside it; alone, the batch runs to its end."""
        if not self._options.be_batch_lines:
            await sender.run(lambda _: show())
            return
        stop = asyncio.Event()
        batch = asyncio.create_task(
            run_batch(self._client, self._api.endpoint, self._batch_bodies(), stop, result)
        )

        def on_tick(_: float) -> None:
            show()
            if batch.done():
                batch.result()  # raises what ended it, which ends the load

        try:
            await sender.run(on_tick)
            if sender.records or self._load.duration_s:
                stop.set()
            while not batch.done():
                await asyncio.wait([batch], timeout=1 / DRAWN_PER_S)
                show()
            batch.result()
        finally:
            batch.cancel()
            await asyncio.gather(batch, return_exceptions=True)

    def _batch_bodies(self) -> Iterator[dict[str, Any]]:
        extras = Extras(body=self._options.be_extra_body)
        sizes = best_effort_sizes(self._options, self._known)
        for number, size in enumerate(islice(sizes, self._options.be_batch_lines)):
            job = Job(number, BATCH, *size, self._options.seed)
            yield self._api.body(job, self._prompts.take(job), extras, is_streamed=False)

    # ------------------------------------------------------------ after it

    def _report(self, sender: Sender, batch: BatchResult) -> Report:
        sent = {r.service_class for r in sender.records}
        percentiles = self._options.metric_percentiles
        report: Report = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "definitions": definitions(),
            "client": machine() | sender_late(sender.records),
            "server": {
                "base_url": self._options.base_url,
                "backend": self._backend,
                "model": self._model.name,
                "endpoint": self._api.endpoint,
                "lengths_fixed": self._api.is_length_fixed,
            },
            "duration": sender.seconds,
            "classes": {
                name: class_figures(sender.records, name, sender.seconds, self._goals.get(name), percentiles)
                for name in (LS, BE, PROBE)
                if name in sent
            },
        }
        if batch.id:
            report["batch"] = asdict(batch) | {"tokens_per_s": batch.tokens_per_s}
        if self._options.save_detailed:
            report["requests"] = request_rows(sender.records)
        return report


@contextmanager
def _no_collection() -> Iterator[None]:
    """What exists now is never looked at by the collector meanwhile, whose pauses would count as latency."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
