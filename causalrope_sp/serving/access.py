"""Who may talk to the server: the host that was asked for, the page that asks, the token, and the size of a request."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from causalrope_sp.serving.server_options import MIB, ServerOptions

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

SUBPROTOCOL = "causalrope-sp"  # of the WebSocket
TOKEN_PREFIX = "bearer."  # of the subprotocol by which a browser shows the token
OPEN_PATHS = frozenset({"/", "/health"})  # that need no token, since they tell nothing
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class AccessControl:
    """Wraps an application and refuses requests.

    Without a token the server is on a loopback address, and any page that a browser of this machine has open could
    talk to it. So the name that was asked for must be a local one (against DNS rebinding), and a page's script may
    change something or open a WebSocket only from the server's own page or from `origins`.

    Args:
        app: the application.
        options: token, origins, host, and the largest body.
    """

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self._app, self._token = app, options.token
        self._origins = frozenset(origin.rstrip("/").lower() for origin in options.origins)
        self._names = _LOCAL_NAMES | {options.host.lower()}
        self._largest = options.upload_mib * MIB

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if refusal is None:
            await self._app(scope, self._limited(receive) if scope["type"] == "http" else receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": refusal[1]})
        else:
            await error_response(*refusal)(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        """The status and the sentence by which a request is refused; None if it is not."""
        host = headers.get("host", "")
        if self._token is None and _name_of(host) not in self._names:
            return 421, "this server answers to local names alone"
        socket = scope["type"] == "websocket"
        if (socket or scope["method"] not in ("GET", "HEAD")) and not self._is_own(headers.get("origin"), host):
            return 403, "pages of this origin may not use the server: name it with --allow-origin"
        if scope["path"] not in OPEN_PATHS and not self._is_token(headers, socket):
            return 401, "the token is missing or wrong"
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or int(length[:20]) > self._largest:
            return 413, f"a request may have at most {self._largest // MIB} MiB"
        return None

    def _is_own(self, origin: str | None, host: str) -> bool:
        """Whether a page of an origin may use the server; programs that are no browsers send none."""
        if origin is None or origin.lower() in self._origins:
            return True
        return origin.lower() in {f"{scheme}://{host.lower()}" for scheme in ("http", "https")} and host != ""

    def _is_token(self, headers: Headers, socket: bool) -> bool:
        if self._token is None:
            return True
        shown = headers.get("authorization", "").removeprefix("Bearer ")
        if socket and not shown:
            names = [name.strip() for name in headers.get("sec-websocket-protocol", "").split(",")]
            shown = next((name.removeprefix(TOKEN_PREFIX) for name in names if name.startswith(TOKEN_PREFIX)), "")
        return hmac.compare_digest(shown.encode(), self._token.encode())

    def _limited(self, receive: Receive) -> Receive:
        """Counts the bytes of a body whose length is not declared."""
        left = self._largest

        async def counted() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, f"a request may have at most {self._largest // MIB} MiB")
            return message

        return counted


def _name_of(host: str) -> str:
    """The name in a header Host, without the port; nothing if there is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def error_response(status: int, sentence: str, code: str | None = None) -> JSONResponse:
    """Makes the answer to a refused request, in the form of the OpenAI API.

    Args:
        status: of HTTP.
        sentence: for people.
        code: a word for programs.
    """
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse({"error": {"message": sentence, "type": kind, "param": None, "code": code}}, status)
