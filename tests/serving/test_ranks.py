"""A server under torchrun: rank 0 listens, and the other ranks follow its calls."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from causalrope_sp.pipeline.pipeline import CausalVideoPipeline
from tests.support.servers import ONE_STEP, RunningServer, Viewer, running_server

RED, GREEN = "a large red circle slides right", "a large green circle stays still"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    options = ("--window", "7", "--timeout", "3", "--max-sessions", "2", *ONE_STEP)
    with running_server(tmp_path_factory.mktemp("served"), *options, ranks=2) as server:
        yield server


def test_two_ranks_serve_what_one_process_makes(server: RunningServer) -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox", num_inference_steps=1, window=7)
    with Viewer(server.socket_url) as viewer, pipe.open(RED, seed=5, history=4) as alone:
        opened = viewer.ask("open", prompt=RED, seed=5)
        assert (opened["ranks"], opened["strategy"] != "single") == (2, True)
        pause = viewer.ask("pause")["from_chunk"]
        assert viewer.ask("prompt", prompt="a pink circle slides right")["code"] == "wrong_prompt"  # on both ranks
        changed = viewer.ask("prompt", prompt=GREEN)
        time.sleep(5)  # longer than the timeout of a rank that holds up others: nobody is asked for anything
        viewer.ask("resume")
        for number in range(pause + 2):
            if number == changed["from_chunk"]:
                alone.set_prompt(GREEN)
            seen, right = viewer.next_chunk(), alone.step()
            assert right.frames is not None
            assert np.abs(seen.frames.astype(int) - right.frames).mean() < 4
        assert viewer.ask("seek", chunk=1)["type"] == "ack"
        viewer.chunks.clear()
        assert viewer.next_chunk().head["chunk"] == 1
        assert viewer.ask("close")["type"] == "ack"
    assert 'causalrope_received_bytes_total{kind="' in server.get("metrics").text


def test_a_lost_rank_ends_the_server_with_a_message(tmp_path: Path) -> None:
    with running_server(tmp_path, *ONE_STEP, ranks=2) as server, Viewer(server.socket_url) as viewer:
        viewer.ask("open", prompt=RED)
        viewer.next_chunk()
        os.kill(_last_rank(server.process.pid), signal.SIGKILL)
        with pytest.raises((ConnectionClosed, TimeoutError)):
            viewer.read_all()
        assert server.process.wait(60) != 0
    # torchrun ends rank 0, now and then before that one has seen who is lost, and names the lost rank in its own way
    assert any("rank 1" in line or "local_rank: 1" in line for line in server.log)


def _last_rank(launcher: int) -> int:
    """The process of rank 1, which torchrun starts last."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher)], capture_output=True, text=True, check=True)
    return max(int(word) for word in listed.stdout.split())
