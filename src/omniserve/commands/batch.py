"""`omniserve batch run`: a batch file on this machine, without a server."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omniserve.commands.engine_flags import add_engine_flags, engine_settings

if TYPE_CHECKING:
    from omniserve.batch.records import BatchRecord

# An engine that ends is started again; after so many starts in a row that failed, the run ends.
MAX_FAILED_STARTS = 3


def add_parser(commands: Any) -> None:

    batch = commands.add_parser("batch", help="batch files in OpenAI's format, without a server")
    actions = batch.add_subparsers(required=True, metavar="ACTION")
    run = actions.add_parser("run", help="run every line; goes on where an interrupted run stopped")
    run.add_argument("input", type=Path, help="JSON lines: custom_id, method, url, body")
    run.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="results, in any order")
    run.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    run.add_argument(
        "--concurrency", type=_at_least_one, default=64, metavar="N", help="lines in flight; default: 64"
    )
    add_engine_flags(run)
    run.set_defaults(run=_run)


def _at_least_one(text: str) -> int:
    """A number of lines; with none in flight nothing would ever end."""
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r:.80}")
    return count


def _run(options: argparse.Namespace) -> int:
    batch = asyncio.run(_run_file(options, engine_settings(options)))
    print(f"{options.output}: {batch.completed} lines completed, {batch.failed} failed")
    return 0


@contextmanager
def _progress(name: str) -> Iterator[Callable[[BatchRecord], None]]:
    """A bar, and what moves it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(name, total=None)

        def show(batch: BatchRecord) -> None:
            progress.update(task, total=batch.total or None, completed=batch.total - batch.num_left)

        yield show


async def _run_file(options: argparse.Namespace, settings: dict[str, Any]) -> BatchRecord:
    """Lines are answered by the code of the server's endpoints, without HTTP."""
    from omniserve.batch.offline import run_file
    from omniserve.batch.runner import RunnerSettings
    from omniserve.engine.async_llm import AsyncLLM, make_config
    from omniserve.server.batch_lines import EndpointLines
    from omniserve.server.endpoints import make_endpoints
    from omniserve.server.engine_keeper import EngineKeeper
    from omniserve.server.model_names import own_name
    from omniserve.server.settings import ServerConfig

    config, engine_config = ServerConfig(), make_config(settings)
    hang_timeout_s = config.engine_hang_timeout_s
    keeper = EngineKeeper(lambda: AsyncLLM(hang_timeout_s=hang_timeout_s, **settings), MAX_FAILED_STARTS)
    names = (own_name(engine_config), engine_config.model)
    endpoints = make_endpoints(config, engine_config, keeper, names)

    async def run() -> BatchRecord:
        await keeper.wait_up()
        with _progress(options.input.name) as show:
            return await run_file(
                options.input,
                options.output,
                EndpointLines(endpoints),
                RunnerSettings(concurrency=options.concurrency),
                options.overwrite,
                show,
                is_known_model=lambda name: name in names,
            )

    engine, running = asyncio.create_task(keeper.run()), asyncio.create_task(run())
    try:
        await asyncio.wait((engine, running), return_when=asyncio.FIRST_COMPLETED)
        if engine.done():
            await engine  # which raises what keeps it from running
        return await running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await keeper.stop()
        endpoints.generation.close()
        engine.cancel()
        await asyncio.gather(engine, return_exceptions=True)
