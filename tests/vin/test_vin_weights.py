"""A Video Interface Network's files, its training, and what is refused."""

from __future__ import annotations

import copy
import importlib
import json
import math
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
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
    inspect_vin,
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
    guided = replace(CHUNKS, global_guidance_scale=2, global_guidance_interval=(850, 1000))
    save_vin(vin, guided, tmp_path / "guided.safetensors")
    assert load_vin(tmp_path / "guided.safetensors", CONFIG)[1] == guided
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
    inspected, chunks = inspect_vin(tmp_path / "vin.safetensors", CONFIG)  # reads no weights
    assert (inspected.config, chunks) == (VIN, CHUNKS)
    assert {x.device.type for x in inspected.parameters()} == {"meta"}


def test_frequencies_are_not_rounded(tmp_path: Path) -> None:
    """Far positions of a VIN in bfloat16 are those of one in float32 but for the rounding of what comes after."""
    _, vin = make_pair(torch.float32)
    save_vin(vin, CHUNKS, tmp_path / "vin.safetensors")
    loaded, _ = load_vin(tmp_path / "vin.safetensors", CONFIG, dtype=torch.bfloat16)
    save_vin(loaded, CHUNKS, tmp_path / "again.safetensors")
    again, _ = load_vin(tmp_path / "again.safetensors", CONFIG)
    cast = copy.deepcopy(vin).to(torch.bfloat16)
    assert cast.dtype == loaded.dtype == torch.bfloat16
    for other in (loaded, again, cast, copy.deepcopy(vin).double().float()):
        assert torch.equal(other.frequencies, vin.frequencies)
    assert copy.deepcopy(vin).to("meta").to(torch.bfloat16).to_empty(device="cpu").frequencies.dtype == torch.float32
    trained = copy.deepcopy(vin).requires_grad_(True)
    trained.frequencies.square().sum().backward()
    torch.optim.AdamW(trained.to(torch.bfloat16).parameters()).step()
    assert trained.frequencies.dtype == torch.float32
    assert not torch.equal(trained.frequencies, vin.frequencies)
    where, embeds = torch.tensor([[[500.0, 1.0, 2.0]]]), random(1, 3, CONFIG.text_dim).float()
    expected = vin.position_embeddings(where, vin.text(embeds))
    for other in (loaded, cast):
        assert relative(other.position_embeddings(where, other.text(embeds)).float(), expected) < 0.02


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"layout": "causalrope_sp-vin-1"}, "in the earlier layout causalrope_sp-vin-1, .* cannot be run any more"),
        ({"layout": "other"}, "not a Video Interface Network: its layout is not causalrope_sp-vin-2"),
        ({"vin": "[1]"}, "its metadata lacks the sizes of a Video Interface Network"),
        ({"dit": "null"}, "its metadata lacks the sizes"),
        ({"chunks": "{"}, "its metadata lacks the sizes of a Video Interface Network: not JSON"),
        ({"chunks": '{"chunk_frames": 5, "overlap": 0, "keyframe_every": 1}'}, "cannot be read .*overlap must be"),
        ({"vin": json.dumps(asdict(VIN) | {"global_tokens": 10**12})}, "z_init is"),
        ({"vin": json.dumps(asdict(VIN) | {"layers": 9})}, r"is missing; .*\.\.\. \(\d+ in all\)"),
        ({"vin": json.dumps(asdict(VIN) | {"position_layers": 10**9})}, r"holds \d+ tensors, too few for its layers"),
        (
            {"chunks": '{"overlap": 1, "new": 2}'},
            "has no chunk_frames, no keyframe_every, an unknown new",
        ),
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


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "vin.safetensors")
    for read in (load_vin, inspect_vin):
        with pytest.raises(CheckpointError, match="it is no regular file"):
            read(tmp_path / "vin.safetensors", CONFIG)


def with_another_dit() -> None:
    vin = VideoInterfaceNetwork(VIN, replace(CONFIG, num_layers=3))
    noise, embeds = seeded_noise(0, (1, *frame_shape(GRID))), torch.zeros(1, CONFIG.text_len, CONFIG.text_dim)
    list(sample_parallel_chunks(make_pair(torch.float32)[0], vin, embeds, noise, GRID, 5, chunks=CHUNKS, sampler=STEPS))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: ParallelChunksConfig(5, 3, 2), "more than half of a chunk"),
        (lambda: ParallelChunksConfig(5, 0, 2), "overlap must be a whole number of at least 1"),
        (lambda: ParallelChunksConfig(5, 2, 2, 1.5), "fuse_above must be a finite number of at least 0 and at most 1"),
        (lambda: ParallelChunksConfig(5, 2, 2, 0.4, -1), "scale must be a finite number of at least 0"),
        (lambda: ParallelChunksConfig(5, 2, 2, 0.4, math.nan), "global_guidance_scale must be a finite number"),
        (lambda: ParallelChunksConfig(5, 2, 2, 0.4, 2, 900), "interval must be two timesteps, not 900"),  # type: ignore[arg-type]
        (lambda: ParallelChunksConfig(5, 2, 2, 0.4, 2, (0, 1001)), "a timestep of global_guidance_interval must be"),
        (lambda: ParallelChunksConfig(5, 2, 2, 0.4, 2, (900, 800)), "must begin with its lower timestep"),
        (lambda: ParallelChunksConfig(5, 2, 2, 0.4, 1, (800, 900)), "says nothing without a global_guidance_scale"),
        (lambda: VINConfig(8, 10, 3, 1, 1), "not divisible by its 3 heads"),
        (lambda: Job(0).outputs(SequenceParallel.single()), "frames must be at least 1"),
        (
            lambda: Job(5, preview_every=0).outputs(SequenceParallel.single()),
            "preview_every must be a whole number of at least 1",
        ),
        (lambda: Job(5, preview_every=1.5).outputs(SequenceParallel.single()), "whole number of at least 1, not 1.5"),  # type: ignore[arg-type]
        (
            lambda: single(Job(5, sampler=replace(STEPS, guidance_scale=2.0))),
            "no guidance by a negative text: guidance_scale must be 1, not 2, and cfg of the mesh 1",
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
    from vin_training.forward import Pair, ParallelChunksForcing

    from causalrope_sp.toybox.chart import chart

    monkeypatch.setattr("toybox_training.dit.BF16", torch.float32)
    monkeypatch.setattr("vin_training.forward.in_bfloat16", lambda device: nullcontext())
    chunks, grid = ParallelChunksConfig(5, 1, 4), LatentGrid(2, 3)
    model, vin = make_pair(torch.float32)
    pair = Pair(model, vin)
    forcing = ParallelChunksForcing(grid, chunks, pair, torch.device("cpu"))
    noisy = random(2, 13, *frame_shape(grid)).float()
    embeds = random(2, CONFIG.text_len, CONFIG.text_dim).float()
    level = torch.tensor([0.8, 0.3])
    found = vin.keys_of_layers(forcing.read(vin, noisy, noisy, embeds, level))
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
    """Positions, then colours, then both networks, from random weights, on noise in place of encoded scenes."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    from toybox_training.coverage import coverage_of
    from toybox_training.latents import PIXEL_FRAMES, Latents, draw_scenes
    from vin_training import loop
    from vin_training.forward import ParallelChunksForcing
    from vin_training.reading import OF_COLORS, OF_POSITIONS, Options, learn_colors, learn_positions

    from causalrope_sp.toybox import WEIGHTS
    from causalrope_sp.toybox.toybox_text import encode_scene

    train_vin = importlib.import_module("train_vin")
    monkeypatch.setattr(loop, "MEASURED_EVERY", 1)
    pair = train_vin.new_pair(WEIGHTS / "toybox.safetensors")
    specs, starts = draw_scenes(0)
    embeds = torch.stack([encode_scene(spec, start) for spec, start in zip(specs, starts, strict=True)])
    latents = torch.randn(len(specs), 21, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    objects = torch.ones(len(specs), 21, 8, 8, dtype=torch.bool)
    described = zip(specs, starts.tolist(), strict=True)
    covered = torch.stack([coverage_of(spec, start, PIXEL_FRAMES, 8) for spec, start in described])
    scenes = Latents(latents, embeds, objects, covered, specs, starts, torch.ones(len(specs)))
    grid = LatentGrid.from_pixels(64, 64, 8)
    forcing = ParallelChunksForcing(grid, train_vin.CHUNKS, pair, torch.device("cpu"))
    options = Options(tmp_path, {17: 1.0}, 2, 1e-3, 5)

    def parameters() -> dict[str, torch.Tensor]:
        return {name: x.clone() for name, x in pair.named_parameters()}

    def changed(before: dict[str, torch.Tensor]) -> set[str]:
        return {name for name, x in pair.named_parameters() if not torch.equal(x, before[name])}

    before = parameters()
    learn_positions(pair.reader, scenes, scenes, forcing, options, 1e-9)
    assert changed(before) == {name for name in before if name.startswith(OF_POSITIONS)}
    assert json.loads((tmp_path / "positions.jsonl").read_text())["r2"] < 0.5, "next to nothing is learned in a step"
    before = parameters()
    learn_colors(pair.reader, scenes, scenes, forcing, options, 1e-9)
    assert {"vin.z_init", "probes.colors.weight"} <= changed(before) <= {n for n in before if n.startswith(OF_COLORS)}
    assert {"accuracy_0.8", "accuracy_0.9", "accuracy_0.95"} <= set(json.loads((tmp_path / "colors.jsonl").read_text()))
    before = parameters()
    learn_colors(pair.reader, scenes, scenes, forcing, options, 0)
    assert not changed(before), "what has learned to read is loaded"
    with pytest.raises(click.UsageError, match=r"colors.pt was trained on another codec: give another --out"):
        learn_colors(pair.reader, scenes, scenes, forcing, replace(options, codec=6), 0)

    before = parameters()
    with torch.compiler.set_stance("force_eager"):
        trained = train_vin.train(pair, scenes, scenes, forcing, options, 1e-4)
    assert any(name.startswith("dit.") for name in changed(before))
    assert not any(name.startswith(OF_POSITIONS) for name in changed(before))
    assert all(x.isfinite().all() for x in trained.parameters())
    assert (tmp_path / "vin.pt").is_file()
    logged = json.loads((tmp_path / "vin.jsonl").read_text())
    assert logged["held_out_open"] == logged["learned_open"], "the same scenes"
    assert len({0, *(logged[f"held_out_{what}"] for what in ("first", "second", "open"))}) == 4


def test_colors_are_judged_by_what_the_whole_text_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two scenes with three objects in all, a perfect reader errs in none; a reader of one colour in the others."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    from vin_training.reading import Probes

    from causalrope_sp.toybox.prompts import BACKGROUNDS, COLORS, parse_prompt
    from causalrope_sp.toybox.toybox_text import encode_scene

    prompts = ("a red circle bounces and a blue square slides right", "a red circle bounces")
    embeds = torch.stack([encode_scene(parse_prompt(prompt), torch.full((6,), 0.5)) for prompt in prompts])
    probes = Probes(8, 4)
    with torch.no_grad():
        for linear in (probes.colors, probes.backgrounds):
            linear.weight.copy_(20 * torch.eye(len(linear.weight), 8))
            linear.bias.zero_()
    backgrounds = [parse_prompt(prompt).background for prompt in prompts]
    red, blue = (list(COLORS).index(color) for color in ("red", "blue"))
    ground = [list(BACKGROUNDS).index(background) for background in backgrounds]
    z = torch.nn.functional.one_hot(torch.tensor([[red, blue, ground[0]], [red, red, ground[1]]]), 8).float()
    assert probes.color_accuracy(z, embeds) == 1
    assert probes.color_loss(z, embeds) < 1e-6
    z[0, 1] = z[0, 0]
    assert probes.color_accuracy(z, embeds) == pytest.approx(2 / 3)
    assert probes.color_loss(z, embeds) > 6


def test_what_the_probe_of_coverage_explains(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the variance if it is right, none if it says the mean."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    from vin_training.reading import Probes

    probes, tokens = Probes(32, 4), torch.randn(2, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    covered = (tokens[..., :8] > 0).float()
    torch.nn.init.zeros_(probes.coverage.weight)
    torch.nn.init.zeros_(probes.coverage.bias)
    assert probes.coverage_r2(tokens, covered) == pytest.approx(0, abs=0.01)
    assert probes.coverage_loss(tokens, covered).item() == pytest.approx(math.log(2))
    with torch.no_grad():
        probes.coverage.weight[:, :8] = 1e4 * torch.eye(8)
    assert probes.coverage_r2(tokens, covered) == pytest.approx(1)
    assert probes.coverage_loss(tokens, covered) < 1e-3
