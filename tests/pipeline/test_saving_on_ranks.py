"""Sessions that several ranks save, and that others go on with: the codec's spatial shards, guidance on two halves of
the ranks, and a rank that cannot write."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from causalrope_sp import CausalVideoPipeline, ConfigError, SequenceParallel
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.errors import CausalRopeError, CheckpointError, OutputError
from causalrope_sp.pipeline.saved_cache import KIND
from causalrope_sp.pipeline.session import Session
from tests.support.paths import ROOT

RED, BLUE = "a red circle slides right", "a blue square bounces"
GUIDED: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0}


def open_pipe(group: dist.ProcessGroup | None, strategy: str, kind: str) -> CausalVideoPipeline:
    if kind == "guided":
        parallel = SequenceParallel(group, strategy, "cpu", cfg=1 if group is None else 2)
        return CausalVideoPipeline.from_pretrained("toybox-flow", parallel=parallel, **GUIDED)
    decode = "spatial" if group is not None else "inline"
    parallel = SequenceParallel(group, strategy, "cpu")
    stored: dict[str, Any] = {"cache": "int8", "dtype": "float64"} if kind == "int8" else {}
    return CausalVideoPipeline.from_pretrained("toybox", parallel=parallel, decode=decode, **stored)


def frames_of(session: Session, count: int) -> list[Any]:
    return [session.step().frames for _ in range(count)]


def equal(found: list[Any], expected: list[Any], levels: int = 0) -> bool:
    pairs = list(zip(found, expected, strict=True))
    return all(one is None or np.abs(one.astype(int) - other).max() <= levels for one, other in pairs)


def save(group: dist.ProcessGroup | None, device: str, folder: Path, strategy: str, kind: str) -> tuple[Any, ...]:
    """Saves a session in both forms; returns the next frames and those of the same ranks after a resume."""
    pipe = open_pipe(group, strategy, kind)
    options: dict[str, Any] = {"negative_prompt": BLUE} if kind == "guided" else {}
    session = pipe.open(RED, seed=3, window=9, sink=1, **options)
    frames_of(session, 4)
    session.set_prompt(BLUE)
    session.step()
    pipe.parallel.comm_stats.take()
    session.save(folder / f"{kind}-{pipe.parallel.size}")
    kinds = {kind: entry.calls for kind, entry in pipe.parallel.comm_stats.take().by_kind().items()}
    assert not any(use.startswith(KIND) for c in pipe.parallel.communicators.values() for use, _ in c.buffers)
    session.save(folder / f"{kind}-{pipe.parallel.size}-small", cache=False)
    resumed = pipe.resume(folder / f"{kind}-{pipe.parallel.size}")
    return frames_of(session, 2), frames_of(resumed, 2), kinds.get(KIND, 0)


def resume(group: dist.ProcessGroup | None, device: str, file: Path, strategy: str, kind: str) -> list[Any]:
    return frames_of(open_pipe(group, strategy, kind).resume(file), 2)


@pytest.fixture(scope="module")
def saved(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[Any]]]:
    """The sessions of 1, 2 and 3 ranks, and the frames that follow."""
    folder, frames = tmp_path_factory.mktemp("saved"), dict[int, list[Any]]()
    for ranks, strategy in ((1, "auto"), (2, "ulysses"), (3, "shard-kv")):
        run = save(None, "cpu", folder, strategy, "plain") if ranks == 1 else None
        expected, found, collectives = run or pool.run(save, ranks, folder, strategy, "plain")
        assert equal(found, expected), "the same ranks go on bit for bit"
        assert collectives == (0 if ranks == 1 else 6), "one for each of toybox's layers"
        frames[ranks] = expected
    return folder, frames


@pytest.mark.parametrize(
    ("by", "on", "strategy"),
    [(1, 2, "shard-kv"), (1, 3, "ulysses"), (2, 1, "auto"), (2, 3, "gather-kv"), (3, 1, "auto")],
)
def test_other_ranks_go_on(
    pool: RankPool, saved: tuple[Path, dict[int, list[Any]]], by: int, on: int, strategy: str
) -> None:
    folder, frames = saved
    file, arguments = folder / f"plain-{by}", (strategy, "plain")
    made = resume(None, "cpu", file, *arguments) if on == 1 else pool.run(resume, on, file, *arguments)
    assert equal(made, frames[by], levels=1)
    assert equal(frames[by], frames[1], levels=1)


def test_other_ranks_compute_the_cache_anew(pool: RankPool, saved: tuple[Path, dict[int, list[Any]]]) -> None:
    folder, _ = saved
    alone = resume(None, "cpu", folder / "plain-1-small", "auto", "plain")
    for ranks, by in ((2, 1), (3, 2)):
        assert equal(pool.run(resume, ranks, folder / f"plain-{by}-small", "ulysses", "plain"), alone, levels=1)


def test_keys_and_values_in_8_bits_go_on_on_other_ranks(pool: RankPool, tmp_path: Path) -> None:
    """Numbers, scales, and what is taken off the keys, which each rank has of all heads."""
    expected, found, collectives = pool.run(save, 2, tmp_path, "ulysses", "int8")
    assert equal(found, expected)
    assert collectives == 7, "one more, for what is taken off the keys"
    assert equal(resume(None, "cpu", tmp_path / "int8-2", "auto", "int8"), expected, levels=1)
    assert equal(pool.run(resume, 3, tmp_path / "int8-2", "shard-kv", "int8"), expected, levels=1)
    alone, *_ = save(None, "cpu", tmp_path, "auto", "int8")
    assert equal(alone, expected, levels=1)
    assert equal(pool.run(resume, 2, tmp_path / "int8-1", "gather-kv", "int8"), expected, levels=1)


def test_the_two_halves_of_guidance_save_a_branch_each(pool: RankPool, tmp_path: Path) -> None:
    expected, found, collectives = pool.run(save, 2, tmp_path, "auto", "guided")
    assert equal(found, expected)
    assert collectives > 0
    assert equal(resume(None, "cpu", tmp_path / "guided-2", "auto", "guided"), expected, levels=1)
    alone, *_ = save(None, "cpu", tmp_path, "auto", "guided")
    assert equal(pool.run(resume, 2, tmp_path / "guided-1", "auto", "guided"), alone, levels=1)


def what_fails(group: dist.ProcessGroup, device: str, folder: Path) -> list[Any]:
    """A full disk on the rank that writes, a file that one rank lacks, a broken one; the session goes on."""
    pipe = open_pipe(group, "ulysses", "plain")
    session, said = pipe.open(RED, seed=3, window=9, sink=1), []
    frames_of(session, 4)
    session.set_prompt(BLUE)
    session.step()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    rank = pipe.parallel.rank

    def said_by(call: Any) -> None:
        try:
            call()
        except CausalRopeError as error:
            said.append((type(error), str(error)))

    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, limits[1]))
    said_by(lambda: session.save(folder / "s"))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said_by(lambda: pipe.resume(folder / "plain-1" if rank == 0 else folder / "none"))
    said_by(lambda: pipe.resume(folder / "broken"))
    said_by(lambda: session.save("" if rank == 0 else folder / "s"))
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, said, group)
    return [everyone, frames_of(session, 2)]


def test_what_fails_on_one_rank_ends_the_call_on_all(
    pool: RankPool, saved: tuple[Path, dict[int, list[Any]]], tmp_path: Path
) -> None:
    folder, frames = saved
    (folder / "broken").write_bytes((folder / "plain-1").read_bytes()[:-1])
    everyone, made = pool.run(what_fails, 2, folder)
    for rank, said in enumerate(everyone):
        for (kind, message), expected, words in zip(
            said,
            (OutputError, CheckpointError, CheckpointError, ConfigError),
            ("File too large", "no such file", "truncated", "path must be a path, not ''"),
            strict=True,
        ):
            assert kind is expected, (rank, message)
            assert words in message
            assert "\n" not in message
    assert not (folder / "s").exists()
    assert equal(made, frames[2]), "the session goes on as if nothing had been"


def decode_ranks(group: dist.ProcessGroup, device: str, file: Path) -> list[str]:
    parallel = SequenceParallel(group, device=device, decode_ranks=1)
    pipe, said = CausalVideoPipeline.from_pretrained("toybox", parallel=parallel), []
    session = pipe.open(RED, window=9)
    session.step()
    for call in (lambda: session.save(file), lambda: pipe.resume(file)):
        try:
            call()
        except ConfigError as error:
            said.append(str(error))
        session.close()
    return said


def test_decode_ranks_neither_save_nor_resume(pool: RankPool, saved: tuple[Path, dict[int, list[Any]]]) -> None:
    said = pool.run(decode_ranks, 2, saved[0] / "plain-1")
    assert len(said) == 2
    assert all("a session with decode ranks goes on as it began" in each for each in said)


def test_the_example_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    for words, says in (
        ((), "begins s (ranks: 1): chunks up to 1"),
        (torchrun, "goes on with s (ranks: 2): chunks up to 3"),
    ):
        command = (sys.executable, *words, ROOT / "examples" / "resume.py", "s", "v.mp4", "2")
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
        assert done.stdout == f"{says} are saved\n", done.stderr
        assert (tmp_path / "v.mp4").stat().st_size > 1000
