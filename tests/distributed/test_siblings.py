"""The other ranks of this machine as the system sees them, and what a rank says on SIGTERM."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from causalrope_sp.distributed.notices import DONE, NoticeBoard
from causalrope_sp.distributed.watchdog import Watchdog
from causalrope_sp.siblings import Siblings
from tests.support.paths import ROOT

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds the ranks' processes in /proc")

Start = Callable[[int], subprocess.Popen[bytes]]


@pytest.fixture
def siblings(monkeypatch: pytest.MonkeyPatch) -> Siblings:
    """As rank 0 of three, with this process as the launcher."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(os, "getppid", os.getpid)
    return Siblings()


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def start(rank: int) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["sleep", "60"], env={**os.environ, "RANK": str(rank)}))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_rank_that_is_done_does_not_hide_one_that_is_lost(siblings: Siblings, start: Start) -> None:
    processes = [start(rank) for rank in (1, 2)]
    assert siblings.lost() is None
    processes[0].kill()
    processes[0].wait()
    assert siblings.lost() == (1, f"rank 1 is gone: its process {processes[0].pid} has ended")
    siblings.excuse(1)
    assert siblings.lost() is None
    processes[1].kill()
    processes[1].wait()
    assert siblings.lost() == (2, f"rank 2 is gone: its process {processes[1].pid} has ended")


def test_the_watchdog_looks_past_the_ranks_that_are_done(siblings: Siblings, start: Start) -> None:
    processes, store, said = [start(rank) for rank in (1, 2)], HashStore(), queue.Queue[str]()
    assert siblings.lost() is None
    boards = [NoticeBoard(store, rank, 3) for rank in range(3)]
    boards[1].end(DONE, 0)
    for process in processes:
        process.kill()
        process.wait()
    dog = Watchdog(boards[0], 0, lambda: 0, range(3), said.put, silence_s=60, stall_s=60, siblings=siblings)
    assert said.get(timeout=10) == f"rank 2 is gone: its process {processes[1].pid} has ended"
    dog.stop()


PROGRAM = """
import asyncio, os, signal, time
from causalrope_sp.distributed.termination import name_lost_rank_on_sigterm
from causalrope_sp.siblings import Siblings

name_lost_rank_on_sigterm(Siblings())
async def serve():
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, print)
if {loop}:
    asyncio.run(serve())
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(20)
"""


@pytest.mark.parametrize("loop", [False, True], ids=["the pipe is there", "an event loop took the pipe away"])
def test_sigterm_ends_a_rank_with_one_line(loop: bool) -> None:
    program = PROGRAM.format(loop=loop)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stderr == "error: rank 0 ends: its launcher sent SIGTERM\n"
    assert done.returncode == 128 + signal.SIGTERM
