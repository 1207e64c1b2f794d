"""Who may talk to the server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request, WebSocket
from fastapi.testclient import TestClient
from starlette.exceptions import HTTPException
from starlette.websockets import WebSocketDisconnect

from causalrope_sp.errors import ConfigError
from causalrope_sp.serving.access import SUBPROTOCOL, AccessControl, error_response
from causalrope_sp.serving.server_options import MIB, ServerOptions

TOKEN = "a-token-of-enough-characters"
OWN, FOREIGN = {"origin": "http://127.0.0.1"}, {"origin": "http://evil.example"}


def client(**options: Any) -> TestClient:
    app = FastAPI()

    @app.exception_handler(HTTPException)
    async def refuse(_: Request, error: HTTPException) -> Any:
        return error_response(error.status_code, error.detail)

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def anything(path: str, request: Request) -> int:
        return len(await request.body())

    @app.websocket("/v1/realtime")
    async def socket(socket: WebSocket) -> None:
        await socket.accept(SUBPROTOCOL if SUBPROTOCOL in socket.scope["subprotocols"] else None)
        await socket.close()

    return TestClient(AccessControl(app, ServerOptions(folder=Path("/none"), **options)), "http://127.0.0.1")


def connects(client: TestClient, headers: dict[str, str], *subprotocols: str) -> bool:
    headers = {"host": "127.0.0.1", **headers}
    try:
        with client.websocket_connect("/v1/realtime", list(subprotocols), headers=headers):
            return True
    except WebSocketDisconnect as refused:
        return refused.code != 1008


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[", "127.0.0.1@evil.example"]
)
def test_names_that_are_not_local_are_refused_without_a_token(host: str) -> None:
    assert client().get("/health", headers={"host": host}).status_code == 421
    assert not connects(client(), {"host": host})


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "LOCALHOST", "[::1]:8000"])
def test_local_names_are_answered(host: str) -> None:
    assert client().get("/health", headers={"host": host}).status_code == 200


def test_pages_of_other_origins_read_nothing_and_change_nothing() -> None:
    app = client()
    assert connects(app, OWN)
    assert connects(app, {})
    for foreign in (FOREIGN, {"origin": "null"}, {"origin": "http://127.0.0.1:81"}, {"origin": "http://["}):
        assert not connects(app, foreign)
        assert app.post("/v1/videos", headers=foreign).status_code == 403
    assert app.post("/v1/videos", headers=OWN).status_code == 200
    allowed = client(origins=("http://evil.example/",))
    assert connects(allowed, FOREIGN)
    assert allowed.post("/v1/videos", headers=FOREIGN).status_code == 200


def test_a_token_is_demanded_of_all_but_the_page() -> None:
    app = client(token=TOKEN, host="0.0.0.0")
    assert [app.get(path).status_code for path in ("/", "/health", "/metrics", "/v1/videos")] == [200, 200, 401, 401]
    right, wrong = {"authorization": f"Bearer {TOKEN}"}, {"authorization": f"Bearer {TOKEN}x"}
    assert app.get("/metrics", headers=right).status_code == 200
    assert app.get("/metrics", headers=wrong).status_code == 401
    assert app.get("/metrics", headers=[(b"authorization", "Bearer é".encode())]).status_code == 401
    assert connects(app, right)
    assert not connects(app, wrong)
    assert connects(app, {}, SUBPROTOCOL, f"bearer.{TOKEN}")
    assert not connects(app, {}, SUBPROTOCOL, "bearer.other")
    assert not connects(app, {})


def test_the_size_of_a_request_is_limited() -> None:
    def parts() -> Iterator[bytes]:  # a body whose length is not declared
        for _ in range(3):
            yield bytes(MIB // 2)

    app = client(upload_mib=1)
    assert app.post("/x", content=bytes(MIB)).json() == MIB
    for refused in (app.post("/x", content=bytes(MIB + 1)), app.post("/x", content=parts())):
        assert (refused.status_code, refused.json()["error"]["message"]) == (413, "a request may have at most 1 MiB")
    assert app.post("/x", headers={"content-length": "9" * 30}).status_code == 413


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"host": "0.0.0.0"}, "token must be set for host 0.0.0.0"),
        ({"host": "::"}, "token must be set for host ::"),
        ({"host": "example.org"}, "token must be set for host example.org"),
        ({"token": "short"}, "token must be at least 16 letters"),
        ({"token": "with a space in the middle"}, "token must be at least 16 letters"),
        ({"port": 65536}, "port must be"),
        ({"lead_seconds": 0}, "lead_seconds must be"),
        ({"grace_seconds": float("nan")}, "grace_seconds must be"),
        ({"max_sessions": 0}, "max_sessions must be"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)):
        ServerOptions(folder=Path("/none"), **options)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_token(host: str) -> None:
    assert ServerOptions(host=host, folder=Path("/none")).token is None
