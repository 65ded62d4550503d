"""`omniserve batch run`: a batch file on this machine, without a server."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omniserve.commands.engine_flags import add_engine_flags, engine_settings

if TYPE_CHECKING:
    from omniserve.batch.records import BatchRecord


def add_parser(commands: Any) -> None:

    batch = commands.add_parser("batch", help="batch files in OpenAI's format, without a server")
    actions = batch.add_subparsers(required=True, metavar="ACTION")
    run = actions.add_parser("run", help="run every line; goes on where an interrupted run stopped")
    run.add_argument("input", type=Path, help="JSON lines: custom_id, method, url, body")
    run.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="results, in any order")
    run.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    run.add_argument("--concurrency", type=int, default=64, metavar="N", help="lines in flight; default: 64")
    add_engine_flags(run)
    run.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    return asyncio.run(_run_file(options, engine_settings(options)))


async def _run_file(options: argparse.Namespace, settings: dict[str, Any]) -> int:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from omniserve.batch.engine_lines import EngineLines
    from omniserve.batch.offline import run_file
    from omniserve.batch.runner import RunnerSettings
    from omniserve.engine.async_llm import AsyncLLM

    llm = await asyncio.to_thread(lambda: AsyncLLM(**settings))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns) as progress:
            task = progress.add_task(options.input.name, total=None)

            def show(batch: BatchRecord) -> None:
                progress.update(task, total=batch.total or None, completed=batch.total - batch.num_left)

            batch = await run_file(
                options.input,
                options.output,
                EngineLines(llm),
                RunnerSettings(concurrency=options.concurrency),
                options.overwrite,
                show,
                is_known_model=lambda name: name in (llm.config.model, llm.path.name),
            )
    finally:
        await asyncio.to_thread(llm.close)
    print(f"{options.output}: {batch.completed} lines completed, {batch.failed} failed")
    return 0
