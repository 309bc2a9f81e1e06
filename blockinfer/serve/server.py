"""uvicorn, with what it lacks: a limit on the time for headers, on clients that do not read, and on shutdown."""

import asyncio
import logging
import socket
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from blockinfer.serve.app import create_app
from blockinfer.serve.errors import ApiError
from blockinfer.serve.service import Service

_log = logging.getLogger("uvicorn.error")
# How long a client may leave sent data untaken; pauses in a slow answer do not count.
_UNREAD_SECONDS = 60


class Server(uvicorn.Server):
    """One service's server. SIGTERM and Ctrl-C give running requests shutdown_timeout seconds to finish and refuse
    new ones; a second Ctrl-C ends it at once."""

    def __init__(self, service: Service, *, log_level: str = "info") -> None:
        options = service.options
        self._service = service
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http=type("Protocol", (_Protocol,), {"header_timeout": options.receive_timeout}),
                ws="none",
                lifespan="on",
                log_level=log_level,
                server_header=False,
                # by then running requests were aborted
                timeout_graceful_shutdown=int(options.shutdown_timeout) + 5,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            _log.info("blockinfer: http://%s:%d", f"[{host}]" if ":" in host else host, port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.draining = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.draining = True
        engine, seconds = self._service.engine, self._service.options.shutdown_timeout
        error = ApiError(503, f"the server is shutting down, and {seconds:g} s were not enough to finish this answer")
        timer = asyncio.get_running_loop().call_later(seconds, engine.abort_all, error)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


class _Protocol(H11Protocol):
    """A connection that closes if a request's headers do not arrive in time or the client does not take its data."""

    header_timeout: float
    _headers_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        # asyncio does not see that a listener made elsewhere is TCP, and does not set this: small writes would wait
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_SECONDS * 1000)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._unset_headers_due()
        elif self._headers_due is None and self.timeout_keep_alive_task is None:
            self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unset_headers_due()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        self._headers_due = self.loop.call_later(self.header_timeout, self.timeout_keep_alive_handler)

    def _unset_headers_due(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None
