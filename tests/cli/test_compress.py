"""`compress` and `decompress` as commands, alone and under torchrun."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import pytest
from click.testing import CliRunner

from causalrope_sp.cli.main import cli
from causalrope_sp.compression import Header

PROMPT = "a red circle slides right"


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(word) for word in words])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compressed")
    assert run("generate", PROMPT, "--frames", 25, "--seed", 3, "--out", folder / "in.mp4")[0] == 0
    status, output = run(
        "compress", folder / "in.mp4", folder / "v.cvc", "--prompt", PROMPT, "--text-seed", 3, "--json"
    )
    assert status == 0, output
    assert json.loads(output)["bytes"] == (folder / "v.cvc").stat().st_size < 400
    return folder / "v.cvc"


def frames_of(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_video_comes_back(compressed: Path, tmp_path: Path) -> None:
    status, output = run("decompress", compressed, tmp_path / "back.mp4", "--json")
    assert status == 0, output
    assert json.loads(output)["frames"] == frames_of(tmp_path / "back.mp4") == 25


def test_the_model_is_loaded_with_the_weights_of_the_header(compressed: Path, tmp_path: Path) -> None:
    data = compressed.read_bytes()
    header, end = Header.read(data)
    (tmp_path / "fp8.cvc").write_bytes(replace(header, weights="fp8").pack() + data[end:])
    status, output = run("decompress", tmp_path / "fp8.cvc", tmp_path / "back.mp4")
    assert status == 0, output


def test_what_was_decoded_of_a_cut_file_is_kept(compressed: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.cvc").write_bytes(compressed.read_bytes()[:-5])
    status, output = run("decompress", tmp_path / "cut.cvc", tmp_path / "back.mp4")
    assert status == 2
    assert "cut off: it has 2 whole chunks and no last one" in output
    assert frames_of(tmp_path / "back.mp4") == 21


def test_ranks_decompress_together(compressed: Path, tmp_path: Path) -> None:
    """What there is of a file that is cut off, which ends them with an error."""
    (tmp_path / "cut.cvc").write_bytes(compressed.read_bytes()[:-5])
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "causalrope_sp"]
    ended = subprocess.run(
        [sys.executable, *words, "decompress", tmp_path / "cut.cvc", tmp_path / "back.mp4"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 1, ended.stderr[-2000:]
    assert "cut off: it has 2 whole chunks and no last one" in ended.stderr
    assert frames_of(tmp_path / "back.mp4") == 21


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--rate", 0), "rate must be above 0"),
        (("--rate", 1, "--bpp", 0.01), "give rate or bpp, not both"),
        (("--atoms", 1000), "atoms must be a power of two"),
        (("--bits", 3), "most must be a power of two"),
        (("--exact", "--dtype", "bfloat16"), "--dtype must be float64, not bfloat16"),
        (("--solver", "euler"), "No such option"),
        (("--steps", "1"), "must have at least 2"),
    ],
)
def test_wrong_options_are_named(compressed: Path, tmp_path: Path, words: tuple[object, ...], said: str) -> None:
    status, output = run("compress", compressed.parent / "in.mp4", tmp_path / "o.cvc", "--prompt", PROMPT, *words)
    assert status == 2
    assert said in output
    assert not (tmp_path / "o.cvc").exists()


def test_a_video_does_not_replace_itself(compressed: Path, tmp_path: Path) -> None:
    source, link = compressed.parent / "in.mp4", tmp_path / "link.mp4"
    link.symlink_to(source)
    before = source.read_bytes()
    for out in (source, link, "-"):
        status, output = run("compress", source, out, "--prompt", PROMPT)
        assert status == 2
        assert "OUT must be a file other than VIDEO" in output
    assert source.read_bytes() == before


def test_what_is_no_compressed_video_is_refused(compressed: Path, tmp_path: Path) -> None:
    status, output = run("decompress", compressed.parent / "in.mp4", tmp_path / "back.mp4")
    assert status == 2
    assert "does not begin with CVC" in output
