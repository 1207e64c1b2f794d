"""A Video Interface Network's files, its training, and what is refused."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from causalrope_sp import CheckpointError, ConfigError, LatentGrid
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.vin import (
    ParallelChunksConfig,
    VideoInterfaceNetwork,
    VINConfig,
    load_vin,
    sample_parallel_chunks,
    save_vin,
)
from causalrope_sp.vin.chunks import AssignedChunks, cut
from causalrope_sp.vin.parallel_forward import ParallelChunksForward
from tests.support.paths import ROOT
from tests.support.streams import strategy_of
from tests.support.vin_runs import (
    CHUNKS,
    CONFIG,
    GRID,
    STEPS,
    VIN,
    Job,
    frame_shape,
    make_pair,
    random,
    relative,
    single,
    work_of,
)


def test_global_tokens_are_learned() -> None:
    """A few seconds of training, and far chunks agree by them; without, by chance, though chunks overlap and fuse."""
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]
    from vin_agreement import agreement, train

    with torch.compiler.set_stance("force_eager"):
        pair = train(120, batch=64)
    found, alone = agreement(pair, True), agreement(pair, False)
    assert found["far"] > 0.7
    assert abs(alone["far"] - 0.5) < 0.1


def test_weights_come_back_and_others_are_refused(tmp_path: Path) -> None:
    _, vin = make_pair(torch.float32)
    save_vin(vin, CHUNKS, tmp_path / "vin.safetensors")
    again, chunks = load_vin(tmp_path / "vin.safetensors", CONFIG)
    assert chunks == CHUNKS
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in vin.state_dict().items())
    with pytest.raises(CheckpointError, match="for another DiT than this one: num_layers 2, not 3"):
        load_vin(tmp_path / "vin.safetensors", replace(CONFIG, num_layers=3))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_vin(tmp_path / "none.safetensors", CONFIG)
    with torch.no_grad():
        vin.z_init[0, 0] = torch.nan
    save_vin(vin, CHUNKS, tmp_path / "vin.safetensors")
    with pytest.raises(CheckpointError, match="NaN or infinite: z_init"):
        load_vin(tmp_path / "vin.safetensors", CONFIG)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"vin": "[1]"}, "its metadata lacks the sizes of a Video Interface Network"),
        ({"dit": "null"}, "its metadata lacks the sizes"),
        ({"chunks": "{"}, "its metadata lacks the sizes of a Video Interface Network: not JSON"),
        ({"chunks": '{"chunk_frames": 5, "overlap": 0, "keyframe_every": 1}'}, "cannot be read .*overlap must be"),
        ({"vin": '{"global_tokens": 1000000000000, "dim": 24, "heads": 3, "layers": 2}'}, "z_init is"),
        ({"vin": '{"global_tokens": 5, "dim": 24, "heads": 3, "layers": 99}'}, r"is missing; .*\.\.\. \(\d+ in all\)"),
    ],
)
def test_a_file_that_says_nonsense_is_refused_by_name(tmp_path: Path, said: dict[str, str], message: str) -> None:
    _, vin = make_pair(torch.float32)
    path = tmp_path / "vin.safetensors"
    save_vin(vin, CHUNKS, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(vin.state_dict(), path, metadata | said)
    with pytest.raises(CheckpointError, match=f"^{path}: .*{message}"):
        load_vin(path, CONFIG)
    save_file({name: x.to(torch.int8) for name, x in vin.state_dict().items()}, path, metadata)
    with pytest.raises(CheckpointError, match=r"is torch\.int8, not float64"):
        load_vin(path, CONFIG)


def with_another_dit() -> None:
    vin = VideoInterfaceNetwork(VIN, replace(CONFIG, num_layers=3))
    noise, embeds = seeded_noise(0, (1, *frame_shape(GRID))), torch.zeros(1, CONFIG.text_len, CONFIG.text_dim)
    list(sample_parallel_chunks(make_pair(torch.float32)[0], vin, embeds, noise, GRID, 5, chunks=CHUNKS, sampler=STEPS))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: ParallelChunksConfig(5, 3, 2), "more than half of a chunk"),
        (lambda: ParallelChunksConfig(5, 0, 2), "overlap must be a whole number of at least 1"),
        (lambda: ParallelChunksConfig(5, 2, 2, 1.5), "fuse_above is a share"),
        (lambda: VINConfig(8, 10, 3, 1), "not divisible by its 3 heads"),
        (lambda: Job(0).outputs(SequenceParallel.single()), "frames must be at least 1"),
        (
            lambda: Job(5, preview_every=0).outputs(SequenceParallel.single()),
            "preview_every must be a whole number of at least 1",
        ),
        (lambda: Job(5, preview_every=1.5).outputs(SequenceParallel.single()), "whole number of at least 1, not 1.5"),  # type: ignore[arg-type]
        (
            lambda: single(Job(5, sampler=replace(STEPS, guidance_scale=2.0))),
            "parallel chunks are not guided",
        ),
        (with_another_dit, "for another DiT than this one: num_layers 3, not 2"),
    ],
)
def test_nonsense_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wrong()


def test_training_computes_what_the_sampler_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The velocity of every chunk."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    from vin_training.forward import Pair, TogetherForcing

    from causalrope_sp.toybox.chart import chart

    monkeypatch.setattr("toybox_training.dit.BF16", torch.float32)
    chunks, grid = ParallelChunksConfig(5, 1, 4), LatentGrid(2, 3)
    model, vin = make_pair(torch.float32)
    pair = Pair(model, vin)
    forcing = TogetherForcing(grid, chunks, pair, torch.device("cpu"))
    noisy = random(2, 13, *frame_shape(grid)).float()
    embeds = random(2, CONFIG.text_len, CONFIG.text_dim).float()
    level = torch.tensor([0.8, 0.3])
    found = forcing.global_keys(vin, noisy, embeds, level)
    parts = [slice(part.start, part.stop) for part in cut(13, chunks)]
    with torch.compiler.set_stance("force_eager"):
        seen = [forcing.velocity(pair, noisy[:, part], embeds, level, part.start, found) for part in parts]
    trained = torch.cat(seen, 1)
    parallel = SequenceParallel.single(device="cpu")
    assigned = AssignedChunks(cut(13, chunks, 1), chunks)
    work = replace(work_of(model), grid=grid)
    with torch.inference_mode():
        for n, timestep in enumerate((800.0, 300.0)):  # a level each
            state = ParallelChunksForward(
                model, vin, embeds[n : n + 1], grid, assigned, 1, strategy_of(parallel, work), parallel
            )
            state.commit(grid.patchify(chart(1, *noisy.shape[2:])))
            sampled = torch.cat(state.velocities(grid.patchify(noisy[n : n + 1]), timestep), 1)
            assert relative(grid.patchify(trained[n : n + 1]), sampled) < 1e-5


def test_the_recipe_takes_a_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From the weights that ship, on noise in place of encoded scenes."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    from toybox_training.latents import Latents
    from vin_training.forward import TogetherForcing

    from causalrope_sp.toybox import WEIGHTS
    from causalrope_sp.toybox.prompts import parse_prompt

    train_vin = importlib.import_module("train_vin")
    monkeypatch.setattr(train_vin, "MEASURED_EVERY", 1)
    pair = train_vin.old_pair(WEIGHTS, WEIGHTS / "toybox.safetensors")
    config, grid = pair.dit.config, LatentGrid.from_pixels(64, 64, 8)
    seen = torch.ones(2, 21, 8, 8, dtype=torch.bool)
    embeds = torch.ones(2, config.text_len, config.text_dim)
    latents = torch.randn(2, 21, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    scenes = Latents(latents, embeds, seen, [parse_prompt("a red circle bounces")] * 2, torch.ones(2))
    forcing = TogetherForcing(grid, train_vin.CHUNKS, pair, torch.device("cpu"))
    before = [x.clone() for x in pair.parameters()]
    with torch.compiler.set_stance("force_eager"):
        trained = train_vin.train(tmp_path, pair, scenes, scenes, forcing, 2, 1e-4, 1e-3)
    assert any(not torch.equal(x, y) for x, y in zip(before, trained.parameters(), strict=True))
    assert all(x.isfinite().all() for x in trained.parameters())
    assert (tmp_path / "vin.pt").is_file()
    logged = json.loads((tmp_path / "vin.jsonl").read_text())
    assert logged["held_out_open"] == logged["learned_open"], "the same scenes"
    assert len({0, *(logged[f"held_out_{what}"] for what in ("first", "second", "open"))}) == 4
