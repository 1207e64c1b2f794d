"""The web application of a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from causalrope_sp.errors import RankLostError
from causalrope_sp.serving.access import AccessControl, error_response
from causalrope_sp.serving.jobs_api import jobs_router
from causalrope_sp.serving.realtime import Connection
from causalrope_sp.serving.server import Server
from causalrope_sp.version import __version__

_PAGE = Path(__file__).with_name("page.html")
# The page is one file: nothing else may be loaded, and no other page may show it.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; "
    "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE_HEADERS = {
    "Content-Security-Policy": _PAGE_POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def build_app(server: Server) -> AccessControl:
    """Builds the application.

    Args:
        server: what it serves.
    """
    app = FastAPI(title="causalrope_sp", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)

    @app.exception_handler(HTTPException)
    async def refuse(_: Request, error: HTTPException) -> JSONResponse:
        server.metrics.refused.labels(str(error.status_code)).inc()
        return error_response(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def refuse_fields(_: Request, error: RequestValidationError) -> JSONResponse:
        server.metrics.refused.labels("422").inc()
        first = error.errors()[0]
        return error_response(422, f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}")

    @app.exception_handler(RankLostError)
    async def refuse_stopped(_: Request, __: RankLostError) -> JSONResponse:
        return error_response(503, "the server is stopping")

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        return HTMLResponse(_PAGE.read_text(), headers=_PAGE_HEADERS)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "version": __version__}

    @app.get("/v1/info")
    async def info() -> dict[str, Any]:
        return server.facts

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(server.metrics.as_text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.delete("/v1/sessions/{name}")
    async def remove_saved(name: str) -> dict[str, Any]:
        if not server.remove_saved(name):
            raise HTTPException(404, "there is no saved session of this name")
        return {"saved": name, "deleted": True}

    if server.jobs is not None:
        app.include_router(jobs_router(server, server.jobs))

    @app.websocket("/v1/realtime")
    async def realtime(socket: WebSocket) -> None:
        await Connection(server, socket).run()

    if server.facts["webrtc"]:
        from causalrope_sp.serving.webrtc import webrtc_router

        app.include_router(webrtc_router(server))
    return AccessControl(app, server.options)
