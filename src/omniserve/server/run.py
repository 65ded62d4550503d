"""Runs a server from start to graceful stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import uvicorn

from omniserve.batch.limits import Limits
from omniserve.batch.runner import RunnerSettings
from omniserve.batch.service import BatchService
from omniserve.config import EngineConfig
from omniserve.engine.async_llm import AsyncLLM
from omniserve.errors import ConfigError
from omniserve.machine import raise_file_limit
from omniserve.server.app import make_app
from omniserve.server.auth import Keyring
from omniserve.server.batch_lines import EndpointLines
from omniserve.server.dashboard.watch import Watch
from omniserve.server.endpoints import make_endpoints
from omniserve.server.engine_keeper import EngineKeeper
from omniserve.server.errors import unavailable
from omniserve.server.model_names import model_names, own_name
from omniserve.server.settings import ServerConfig

logger = logging.getLogger("omniserve.server")

# What connections may take to close once nothing is left to answer.
CLOSE_S = 3
# Longer than clients keep idle connections (httpx 5 s, nginx 60 s): when the server closes one first, a
# request that is just being sent on it is lost.
KEEP_ALIVE_S = 75
BACKLOG = 4096


class _Http(uvicorn.Server):
    """Leaves signals to whoever runs it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """One server. `serve` returns when it has stopped; it raises what kept the engine from starting."""

    def __init__(
        self, config: ServerConfig, engine_config: EngineConfig, make: Callable[[], AsyncLLM]
    ) -> None:
        """make: starts the engine, blocking."""
        self._config = config
        self.keeper = EngineKeeper(make)
        names = model_names(config, engine_config)
        self.endpoints = make_endpoints(config, engine_config, self.keeper, names)
        self.batches = None if config.state_dir is None else self._batch_service(config.state_dir, names)
        self.watch = Watch(self.endpoints, engine_config.classes, names[0], self.batches)
        self._app = make_app(config, self.endpoints, names, self.batches, self.watch, own_name(engine_config))
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()

    def _batch_service(self, state_dir: Path, names: Sequence[str]) -> BatchService:
        keyring = Keyring(self._config)
        return BatchService(
            state_dir,
            EndpointLines(self.endpoints, keyring.owner),
            quota_of=keyring.quota,
            settings=RunnerSettings(concurrency=self._config.batch_concurrency),
            limits=Limits(
                retention_s=self._config.retention_s, reserve_bytes=self._config.disk_reserve_bytes
            ),
            is_known_model=lambda name: name in names,
        )

    def stop(self) -> None:
        """Stop in good order; asked a second time, at once."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def serve(self, listener: socket.socket) -> None:
        http = _Http(
            uvicorn.Config(
                self._app,
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=CLOSE_S,
            )
        )
        engine = asyncio.create_task(self.keeper.run(), name="engine")
        serving = asyncio.create_task(http.serve([listener]), name="http")
        stopping = asyncio.create_task(self._stop.wait())
        if self.batches is not None:
            self.batches.start()
        watching = asyncio.create_task(self.watch.run(), name="watch")
        try:
            await asyncio.wait((engine, serving, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not engine.done():
                await self._drain()
        finally:
            stopping.cancel()
            self.endpoints.doors.is_draining = True
            self.endpoints.doors.end_all(unavailable("the server stopped", "server_stopping"))
            http.should_exit = True
            watching.cancel()
            await asyncio.gather(serving, watching, return_exceptions=True)
            if self.batches is not None:
                await self.batches.stop()
            await self.keeper.stop()
            self.endpoints.generation.close()
            if not engine.done():
                engine.cancel()
        await asyncio.gather(engine, return_exceptions=True)
        if not engine.cancelled() and (error := engine.exception()) is not None:
            raise error

    async def _drain(self) -> None:
        """Admit nothing more; let chats end within the grace time. Best-effort work does not hold it up:
        lines of batches run again after the next start."""
        doors, grace_s = self.endpoints.doors, self._config.grace_s
        doors.is_draining = True
        self.keeper.retire()
        if self.batches is not None:
            self.batches.runner.pause()
        logger.info("stopping: %d chats may take up to %g s to end", doors.count(best_effort=False), grace_s)
        ended = asyncio.create_task(doors.wait_empty(best_effort=False))
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait((ended, hurry), timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        for task in (ended, hurry):
            task.cancel()


def listen(config: ServerConfig) -> socket.socket:
    """The listening socket; ConfigError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"host, port: cannot listen on {config.host}:{config.port}: {error}") from error
    return listener


def warn_of_openness(config: ServerConfig) -> None:
    """A server that others can reach and that asks nobody for a key is worth a word."""
    if config.api_keys or config.is_loopback:
        return
    logger.warning(
        "\n%s\nEVERYBODY who can reach %s:%d may use this server: there is no --api-key.\n%s",
        "!" * 80, config.host, config.port, "!" * 80,
    )  # fmt: skip


async def run_server(config: ServerConfig, engine_config: EngineConfig, make: Callable[[], AsyncLLM]) -> None:
    """Serve until SIGTERM or SIGINT; a second one hurries."""
    raise_file_limit()
    listener = listen(config)
    host, port = listener.getsockname()[:2]
    warn_of_openness(config)
    server = Server(config, engine_config, make)
    # Modules and routes stay. Looking through them for garbage would hold up every stream now and then.
    gc.collect()
    gc.freeze()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop)
    logger.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    await server.serve(listener)
