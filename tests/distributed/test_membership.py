"""Ranks without a launcher such as torchrun: they join anew, end with a stream open, and name a rank that is gone."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.paths import ROOT

OPENS = """
import sys, torch
from causalrope_sp import CausalVideoPipeline, SequenceParallel

torch.set_num_threads(1)
def join():
    parallel = SequenceParallel.from_env(device="cpu")
    pipe = CausalVideoPipeline.from_pretrained("toybox", parallel=parallel, decode=sys.argv[1])
    return parallel, pipe.stream("a red circle slides right", num_frames=21, num_inference_steps=1)
"""
JOINS_ANEW = (
    OPENS
    + """
for _ in range(3):
    parallel, stream = join()
    print(sum(int(chunk.frames.sum()) for chunk in stream if chunk.frames is not None), flush=True)
    parallel.close()
"""
)
ENDS_WITH_A_STREAM_OPEN = (
    OPENS
    + """
parallel, stream = join()
next(stream)
"""
)
CLOSES_ITS_GROUP_WITH_A_STREAM_OPEN = (
    OPENS
    + """
parallel, stream = join()
next(stream)
parallel.close()
try:
    next(stream)
except ValueError as error:
    print(error, flush=True)
"""
)
RANK_0_IS_GONE = (
    OPENS
    + """
import os, signal, time
parallel, stream = join()
next(stream)
if parallel.rank == 0:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(1)
next(stream)
"""
)
OTHERS_WAIT_WHILE_OPTIONS_ARE_AGREED = (
    OPENS
    + """
import os, signal
parallel = SequenceParallel.from_env(device="cpu")
if parallel.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
parallel.everyone.agree({"seed": 0})
"""
)
RAISES_BETWEEN_CHUNKS = (
    OPENS
    + """
import time
parallel, stream = join()
next(stream)
if parallel.rank == 1:
    raise KeyError("boom")
time.sleep(1)
next(stream)
"""
)
RESTS_AT_ITS_END = (
    """
import atexit, time

def rested():
    print(time.monotonic() - began >= REST_S)

atexit.register(rested)  # it runs last, since all others come later
"""
    + OPENS
    + """
from causalrope_sp.distributed.membership import REST_S

parallel, stream = join()
next(stream)
began = time.monotonic()
if sys.argv[1] == "closed":
    parallel.close()
elif sys.argv[1] == "raised":
    raise KeyError("boom")
"""
)
INTERRUPTED_WITHIN_A_CHUNK = """
import os, signal, sys, time
from causalrope_sp import CausalVideoPipeline, SequenceParallel

parallel = SequenceParallel.from_env(device="cpu")
pipe = CausalVideoPipeline.from_pretrained("toybox", parallel=parallel)

def callback(pipe, step, timestep, kwargs):
    if str(parallel.rank) in sys.argv[1] and kwargs["chunk"] == 1 and step == parallel.rank:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)  # the signal arrives at once

session = pipe.open("a red circle slides right", callback_on_step_end=callback, num_inference_steps=2)
session.step()
print(time.monotonic(), flush=True)
try:
    session.step()
except KeyboardInterrupt:
    session.step()
"""


def run(program: str, decode: str, folder: Path) -> list[tuple[int, str, str]]:
    """Runs a program on 2 ranks; returns the status, the output and the errors of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = folder / "program.py"
    script.write_text(program)
    ranks = []
    for rank in range(2):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"}
        ranks.append(
            subprocess.Popen(
                [sys.executable, str(script), decode],
                env=environment | {name: str(number) for name, number in numbers.items()},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [process.communicate(timeout=120) for process in ranks]
    return [(process.returncode, *text) for process, text in zip(ranks, said, strict=True)]


@pytest.mark.parametrize("decode", ["inline", "overlap"])
def test_ranks_that_close_their_group_can_join_anew(tmp_path: Path, decode: str) -> None:
    (first, other) = run(JOINS_ANEW, decode, tmp_path)
    assert first[0] == other[0] == 0, first[2] + other[2]
    sums = first[1].split()
    assert sums == [sums[0]] * 3
    assert int(sums[0]) > 0
    assert other[1].split() == ["0"] * 3


def test_a_group_that_is_closed_ends_the_work_ahead(tmp_path: Path) -> None:
    for rank, (status, said, errors) in enumerate(run(CLOSES_ITS_GROUP_WITH_A_STREAM_OPEN, "overlap", tmp_path)):
        assert status == 0, errors
        assert said == f"rank {rank} has closed its group of ranks: make another one, and its pipeline\n"


def test_a_program_may_end_while_a_stream_works_ahead(tmp_path: Path) -> None:
    assert [status for status, _, _ in run(ENDS_WITH_A_STREAM_OPEN, "overlap", tmp_path)] == [0, 0]


@pytest.mark.parametrize("end", ["open", "closed", "raised"])
def test_the_threads_of_gloo_have_time_to_let_go_before_python_ends(tmp_path: Path, end: str) -> None:
    """One that lets go of a tensor while Python ends aborts the process (pytorch issue 190489)."""
    for status, said, errors in run(RESTS_AT_ITS_END.replace("decode=sys.argv[1]", 'decode="inline"'), end, tmp_path):
        assert status == (end == "raised"), errors
        assert said == "True\n", errors


@pytest.mark.parametrize(
    ("program", "gone", "says"),
    [
        (RANK_0_IS_GONE, 0, "rank 0 is gone"),
        (OTHERS_WAIT_WHILE_OPTIONS_ARE_AGREED, 1, "rank 1 is gone"),
        (RAISES_BETWEEN_CHUNKS, 1, "rank 1 raised KeyError: 'boom', and rank 0 asks for chunk 1 of stream 1"),
    ],
    ids=["the holder of the store", "while options are agreed", "raises"],
)
def test_a_rank_that_is_gone_is_named_without_a_launcher(tmp_path: Path, program: str, gone: int, says: str) -> None:
    ranks = run(program, "inline", tmp_path)
    status, _, said = ranks[1 - gone]
    assert status == 1
    assert says in said
    assert ranks[gone][0] in (1, -9)
    last = said.strip().splitlines()[-1]
    assert last.startswith(("error: ", "causalrope_sp.errors.RankLostError: ", "[rank")), said


@pytest.mark.parametrize("interrupted", ["0", "1", "01"])
def test_ctrl_c_within_a_chunk_ends_all_ranks_with_a_sentence(tmp_path: Path, interrupted: str) -> None:
    """Also where the program catches it and goes on: collectives may be cut off anywhere."""
    ranks = run(INTERRUPTED_WITHIN_A_CHUNK, interrupted, tmp_path)
    began = max(float(said) for _, said, _ in ranks)
    assert time.monotonic() - began < 10
    for rank, (status, _, errors) in enumerate(ranks):
        assert status == 1
        last = errors.strip().splitlines()[-1]
        if str(rank) == interrupted:
            call = "in a call of all ranks \\(asks for chunk 1 of stream 1\\), from which none can go on"
            assert re.search(f"rank {rank} was interrupted \\(KeyboardInterrupt\\) {call}: end the program on ", last)
        else:
            assert re.search(f"rank [{interrupted}] was interrupted \\(KeyboardInterrupt\\)", last)
