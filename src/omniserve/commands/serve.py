"""`omniserve serve`: the OpenAI-compatible server."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from omniserve.commands.engine_flags import add_engine_flags


def add_parser(commands: Any) -> None:
    from omniserve.server.flags import add_flags

    serve = commands.add_parser("serve", help="an OpenAI-compatible server for chat and batch work")
    add_flags(serve)
    add_engine_flags(serve)
    serve.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    import uvloop

    from omniserve.engine.async_llm import AsyncLLM
    from omniserve.server.flags import read_settings
    from omniserve.server.logs import set_up_logs
    from omniserve.server.run import run_server

    settings = read_settings(options)
    set_up_logs(settings.log_level)
    engine = {f.name: getattr(settings.engine, f.name) for f in fields(settings.engine)}
    hang_timeout_s = settings.server.engine_hang_timeout_s or None

    def make() -> AsyncLLM:
        return AsyncLLM(hang_timeout_s=hang_timeout_s, **engine)

    uvloop.run(run_server(settings.server, settings.engine, make))
    return 0
