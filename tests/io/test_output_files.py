"""What is no regular file is not replaced by one: safetensors and os.replace would do it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from causalrope_sp.cli.encode import encode_to_file
from causalrope_sp.config import DiTConfig
from causalrope_sp.errors import OutputError
from causalrope_sp.io.output_files import check_replaceable
from causalrope_sp.io.saved_tensors import save_tensors
from causalrope_sp.io.video_writer import VideoWriter, check_output
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.text import save_embeds
from causalrope_sp.vin.network import VideoInterfaceNetwork
from causalrope_sp.vin.vin_config import ParallelChunksConfig, VINConfig
from causalrope_sp.vin.vin_weights import save_vin
from causalrope_sp.weights.save import save_model

DIT = DiTConfig(dim=12, ffn_dim=8, num_heads=2, num_layers=1, text_dim=4, freq_dim=4, in_channels=2)


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe.mp4")
    return tmp_path / "pipe.mp4"


def test_safetensors_replaces_a_pipe(pipe: Path) -> None:
    """Else the check is not needed any more."""
    save_file({"x": torch.zeros(1)}, pipe)
    assert stat.S_ISREG(pipe.stat().st_mode)


def test_weights_have_the_permissions_of_any_new_file_or_of_the_one_that_they_replace(tmp_path: Path) -> None:
    """safetensors alone gives every file to its owner alone."""
    path, umask = tmp_path / "x.safetensors", os.umask(0o027)
    try:
        save_model(CausalDiT(DIT), path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o664)
        save_model(CausalDiT(DIT), path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o664
    finally:
        os.umask(umask)


def test_weights_that_cannot_be_written_leave_no_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="non contiguous"):
        save_tensors({"x": torch.zeros(4, 4).T[:2]}, path, {})
    assert not path.exists()


@pytest.mark.parametrize(
    "write",
    [
        check_replaceable,
        check_output,
        lambda path: VideoWriter(path, 16, 16, 8.0),
        lambda path: encode_to_file("a red circle slides right", None, None, None, 0, str(path)),
        lambda path: save_embeds(path, torch.ones(1, 2, 3), "", ""),
        lambda path: save_model(CausalDiT(DIT), path),
        lambda path: save_vin(
            VideoInterfaceNetwork(VINConfig(2, 12, 2, 1, 1), DIT), ParallelChunksConfig(4, 1, 2, 0.5), path
        ),
    ],
)
def test_a_pipe_and_a_folder_are_refused(write: Callable[[Path], object], pipe: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write .*pipe\.mp4: it is no regular file"):
        write(pipe)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    os.unlink(pipe)
    pipe.mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*pipe\.mp4: (it is )?a folder"):
        write(pipe)
