"""Runs a server from its socket to its end."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from typing import TYPE_CHECKING

import uvicorn

from causalrope_sp.errors import ConfigError, first_line
from causalrope_sp.serving.app import build_app
from causalrope_sp.serving.event_log import log_event
from causalrope_sp.serving.messages import LONGEST_MESSAGE
from causalrope_sp.serving.server import Server
from causalrope_sp.serving.server_options import ServerOptions

if TYPE_CHECKING:
    from causalrope_sp.pipeline.pipeline import CausalVideoPipeline

PING_S = 15.0  # between two signs of life of a WebSocket, and how long an answer may take
GOODBYE_S = 5  # for requests that are open when the server stops

_log = logging.getLogger(__name__)


def listen(options: ServerOptions) -> socket.socket:
    """Opens the server's socket.

    Raises:
        ConfigError: the address cannot be listened at.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family)
    except OSError as error:
        raise ConfigError(f"cannot listen at {options.host}, port {options.port}: {first_line(error)}") from error


class _Web(uvicorn.Server):
    """A web server that ends the live sessions, and lets their viewers know, before it closes connections.

    Args:
        config: of uvicorn.
        server: whose sessions they are.
    """

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._live = server

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends the server."""
        log_event(_log, "stopping", message="the server ends, and keeps its live sessions on disk")
        await asyncio.to_thread(self._live.engine.stop)
        until = time.monotonic() + GOODBYE_S
        while self._live.viewers and time.monotonic() < until:
            await asyncio.sleep(0.05)
        await super().shutdown(sockets)


def serve(pipe: CausalVideoPipeline, model: str, options: ServerOptions, listening: socket.socket) -> None:
    """Serves until the process is told to stop.

    Args:
        pipe: the pipeline, on rank 0.
        model: its name, as clients see it.
        options: of the server.
        listening: the socket.

    Raises:
        Exception: what ended the engine.
    """
    failures: list[BaseException] = []

    def fail(error: BaseException) -> None:
        failures.append(error)
        web.should_exit = True

    server = Server(pipe, model, options, fail)
    web = _Web(
        uvicorn.Config(
            build_app(server),
            log_config=None,
            access_log=False,
            server_header=False,
            ws_max_size=LONGEST_MESSAGE,
            ws_ping_interval=PING_S,
            ws_ping_timeout=PING_S,
            ws_per_message_deflate=False,  # video does not get any smaller
            timeout_graceful_shutdown=GOODBYE_S,
        ),
        server,
    )
    server.engine.start()
    host, port = listening.getsockname()[:2]
    log_event(_log, "listening", url=f"http://{f'[{host}]' if ':' in host else host}:{port}/", model=model)
    try:
        web.run(sockets=[listening])
    finally:
        server.engine.stop()
    if failures:
        raise failures[0]
