"""Latents in place of frames, with and without a decode rank; a pipeline that moves or is saved into a used folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from causalrope_sp import CausalVideoPipeline, ConfigError, SequenceParallel
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.errors import OutputError

PROMPT = "a red circle slides right"


@pytest.fixture(scope="module")
def pipe() -> CausalVideoPipeline:
    made = CausalVideoPipeline.from_pretrained("toybox", device="cpu")
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (5, 2), (6, 3), (9, 3), (13, 4)])
def test_a_video_has_the_latent_frames_that_it_decodes_from(
    pipe: CausalVideoPipeline, frames: int, latents: int
) -> None:
    found = pipe(PROMPT, num_frames=frames, output_type="latent").frames
    assert isinstance(found, torch.Tensor)
    assert found.shape[2] == latents


def test_latents_of_a_redrawn_video_end_where_it_ends(pipe: CausalVideoPipeline) -> None:
    video = np.zeros((9, 64, 64, 3), np.uint8)
    options: dict[str, Any] = {"num_frames": 81, "video": video, "strength": 0.5}
    assert len(pipe(PROMPT, **options).frames[0]) == 9
    found = pipe(PROMPT, **options, output_type="latent").frames
    assert isinstance(found, torch.Tensor)
    assert found.shape[2] == 3


def refused_latents(group: Any, device: str) -> list[str]:
    def refuse(*_: Any) -> None:
        raise ConfigError("the caller had enough")

    parallel = SequenceParallel(group, device=device, decode_ranks=1)
    pipe = CausalVideoPipeline.from_pretrained("toybox", parallel=parallel)
    said = []
    try:
        pipe(PROMPT, num_frames=21, output_type="latent", callback_on_step_end=refuse)
    except ConfigError as error:
        said.append(str(error))
    chunks = list(pipe.stream(PROMPT, num_frames=9))
    return [*said, f"{len(chunks)} chunks"]


def test_an_error_while_latents_are_made_ends_the_call_on_decode_ranks(pool: RankPool) -> None:
    assert pool.run(refused_latents, 2)[-1] == "1 chunks"


def test_a_video_interface_network_moves_with_its_transformer() -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox-vin", device="cpu", parallel_chunks="vin")
    pipe.to(dtype=torch.float64)
    chunks = pipe.parts.parallel_chunks
    assert chunks is not None
    assert {parameter.dtype for parameter in chunks.vin.parameters()} == {torch.float64}
    assert pipe.parts.options.dtype == torch.float64


def test_saving_into_a_used_folder_leaves_one_model(pipe: CausalVideoPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    whole = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    shard = tmp_path / "transformer" / "diffusion_pytorch_model-00001-of-00001.safetensors"
    save_file(whole, shard)
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": {}}')
    pipe.save_pretrained(tmp_path)
    assert not shard.exists()
    again = CausalVideoPipeline.from_pretrained(tmp_path, device="cpu")
    again.save_pretrained(tmp_path)  # into the folder that it was opened from
    last = CausalVideoPipeline.from_pretrained(tmp_path, device="cpu")
    first, second = (p(PROMPT, num_frames=5).frames[0] for p in (pipe, last))
    assert np.array_equal(first, second)


def cannot_save(group: Any, device: str, folder: Path) -> str:
    pipe = CausalVideoPipeline.from_pretrained("toybox", parallel=SequenceParallel(group, device=device))
    with pytest.raises(OutputError) as error:
        pipe.save_pretrained(folder)
    return str(error.value)


def test_a_folder_that_cannot_be_written_is_an_error_of_every_rank(pool: RankPool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told = pool.run(cannot_save, 2, tmp_path / "file")
    assert "a file of that name is in the way" in str(told)
