"""A short form of what benchmarks/serve.py sends at length: nothing malformed harms the server or those beside it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.nonsense import send_messages, send_requests
from tests.support.servers import ONE_STEP, RunningServer, Viewer, running_server

RED = "a large red circle slides right"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("served"), "--max-jobs", "5", *ONE_STEP) as server:
        yield server


def test_malformed_messages_and_requests_disturb_nobody(server: RunningServer) -> None:
    with Viewer(server.socket_url) as viewer:
        viewer.ask("open", prompt=RED)
        viewer.next_chunk()
        assert send_messages(server.socket_url, 100) >= 100
        answers = send_requests(server.url, 144)
        assert {"200", "400", "404", "422"} <= answers.keys(), answers
        assert [viewer.next_chunk().head["chunk"] for _ in range(3)] == [1, 2, 3]
    assert server.process.poll() is None
    assert not [line for line in server.log if "Traceback" in line]
