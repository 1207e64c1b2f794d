"""The cases that `verify` runs: reference cases from files, and small random cases for the self-check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from causalrope_sp.checks import shown
from causalrope_sp.config import DiTConfig, SamplerConfig, StreamConfig
from causalrope_sp.diffusion.noise import Noise, seeded_noise
from causalrope_sp.diffusion.schedule import timesteps
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import CheckpointError
from causalrope_sp.grid import Chunk, LatentGrid, split_into_chunks
from causalrope_sp.io.json_files import parse_object
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.reuse.policy import ReusePolicy
from causalrope_sp.sampling.sampler import sample_chunks
from causalrope_sp.weights import load_model

KNOWN_KINDS = ("dmd", "diffusion")


@dataclass(frozen=True)
class Case:
    """The arguments of one run of the sampler.

    Args:
        name: of the case, for the report.
        model: the DiT.
        grid: the latent frame in tokens.
        embeds: text embeddings, (B, text_len, text_dim).
        noise: makes a noise source that starts anew.
        frames: latent frames to generate.
        stream: chunk length, window and sink.
        sampler: steps, solver and guidance.
        initial: initial latents, (B, F0, C, H, W).
        negative: embeddings of the negative prompt, like `embeds`.
        reuse: a policy of reuse.
    """

    name: str
    model: CausalDiT
    grid: LatentGrid
    embeds: Tensor
    noise: Callable[[], Noise]
    frames: int
    stream: StreamConfig
    sampler: SamplerConfig
    initial: Tensor | None = None
    negative: Tensor | None = None
    reuse: ReusePolicy | None = None

    def run(self, parallel: SequenceParallel) -> Tensor:
        """Runs the sampler and returns the generated latents, (B, F, C, H, W)."""
        chunks = sample_chunks(
            self.model,
            self.embeds,
            self.noise(),
            self.grid,
            self.frames,
            stream=self.stream,
            sampler=self.sampler,
            parallel=parallel,
            initial_latents=self.initial,
            negative_embeds=self.negative,
            reuse=self.reuse,
        )
        return torch.cat([chunk.latents for chunk in chunks], 1)


def case_files(folder: Path) -> list[tuple[Path, str]]:
    """Lists the case files of a folder with their kinds, in order of name.

    Raises:
        CheckpointError: `folder` is not a folder, a file in it cannot be read, or it holds no case.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder of reference cases")
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        if "case" in _metadata(path):
            found.append((path, _field(_spec(path), "kind", path)))
    if not found:
        raise CheckpointError(f"{folder} holds no reference case (a .safetensors file with metadata 'case')")
    return found


def load_case(path: Path, dtype: torch.dtype, device: str = "cpu") -> tuple[Case, Tensor]:
    """Loads one reference case of a known kind with its weights, which are the file in its folder of the same sizes.

    Args:
        path: the file of the case.
        dtype: of the model.
        device: of the model.

    Returns:
        The case, and the latents that its run must match, (B, F, C, H, W).

    Raises:
        CheckpointError: the file, one of its fields or tensors, or its weights are missing, unreadable or do not fit.
    """
    try:
        return _load_case(path, dtype, device)
    except CheckpointError:
        raise
    except Exception as reason:  # a field or a tensor may be missing, or be anything
        raise CheckpointError(f"{path} is not a whole reference case: {type(reason).__name__}: {reason}") from reason


def _load_case(path: Path, dtype: torch.dtype, device: str) -> tuple[Case, Tensor]:
    spec = _spec(path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if not name.startswith("call.")}
    window, initial_frames, frames = spec["local_attn_size"], spec["initial_frames"], spec["num_frames"]
    starting, latents = tensors["noise"], tensors["latents"][:, initial_frames:]
    if latents.shape[1] != frames:
        raise CheckpointError(f"{path}: num_frames is {shown(frames)}, and it holds {latents.shape[1]} latent frames")
    renoise = [tensors[name] for name in sorted(tensors) if name.startswith("renoise.")]
    stream = StreamConfig(
        None if window == -1 else window, spec["sink_size"], spec["chunk_frames"], spec["independent_first_frame"]
    )
    sampler = _sampler(spec)
    chunks = split_into_chunks(
        frames, stream.chunk_frames, independent_first_frame=stream.independent_first_frame, start=initial_frames
    )
    draws = len(list(chunks)) * (len(sampler.steps) - 1) if sampler.solver == "renoise" else 0
    if len(renoise) != draws:
        raise CheckpointError(f"{path} holds {len(renoise)} fresh draws of noise, its chunks and steps need {draws}")

    def noise() -> Noise:
        fresh = iter(renoise)

        def draw(chunk: Chunk, step: int) -> Tensor:
            if step == 0:
                return starting[:, chunk.start - initial_frames : chunk.stop - initial_frames]
            return next(fresh).unflatten(0, (spec["batch"], chunk.frames))

        return draw

    case = Case(
        name=path.stem,
        model=load_model(_weights_for(path.parent, spec["cfg"]), dtype=dtype, device=device),
        grid=LatentGrid.from_latent(spec["latent_height"], spec["latent_width"]),
        embeds=tensors["prompt_embeds"],
        noise=noise,
        frames=frames,
        stream=stream,
        sampler=sampler,
        initial=tensors.get("initial_latent"),
        negative=tensors.get("negative_embeds"),
    )
    return case, latents


def _sampler(spec: dict[str, Any]) -> SamplerConfig:
    """Returns the sampler of a case: few steps with fresh noise ("dmd"), or many steps of UniPC with guidance
    ("diffusion")."""
    if spec["kind"] == "dmd":
        return SamplerConfig(tuple(spec["denoising_step_list"]), spec["timestep_shift"])
    steps = timesteps(spec["num_inference_steps"], "unipc")
    return SamplerConfig(steps, spec["timestep_shift"], "unipc", spec["guidance_scale"])


def self_check_cases(dtype: torch.dtype, device: str = "cpu") -> Iterator[Case]:
    """Yields cases of a small random model that cover the options of a stream: an odd grid, a window, a sink, an
    independent first frame, initial latents; and guidance, with the first step inside the interval and outside it.

    Args:
        dtype: of the model.
        device: of the model.
    """
    torch.manual_seed(0)
    config = DiTConfig(dim=72, ffn_dim=96, num_heads=6, num_layers=2, text_dim=16, text_len=5, freq_dim=32)
    model = CausalDiT(config).to(device, dtype).eval().requires_grad_(False)
    grid = LatentGrid(3, 5)
    plans = {
        "random": (9, StreamConfig()),
        "random-window": (14, StreamConfig(window=7, chunk_frames=3)),
        "random-sink": (16, StreamConfig(window=6, sink=2, chunk_frames=2)),
        "random-first-frame": (10, StreamConfig(window=6, sink=1, chunk_frames=3, independent_first_frame=True)),
        "random-extend": (6, StreamConfig(window=6, sink=1, chunk_frames=2)),
        "random-guidance": (8, StreamConfig(window=5, sink=1, chunk_frames=2)),
        "random-guidance-late": (7, StreamConfig(window=6, sink=1, chunk_frames=2, independent_first_frame=True)),
    }
    samplers = {
        "random-extend": SamplerConfig((1000, 500)),
        "random-guidance": SamplerConfig((999, 700, 300), 3.0, "unipc", 2.0, (500, 1000)),
        "random-guidance-late": SamplerConfig((1000, 600, 200), 1.0, "euler", 2.0, (100, 700)),
    }
    for seed, (name, (frames, stream)) in enumerate(plans.items()):
        shape = (2 if name == "random-sink" else 1, config.in_channels, grid.latent_height, grid.latent_width)
        draw = torch.Generator().manual_seed(seed)
        has_initial, guided = name in ("random-extend", "random-guidance-late"), "guidance" in name
        text = partial(torch.randn, shape[0], config.text_len, config.text_dim, generator=draw)
        yield Case(
            name=name,
            model=model,
            grid=grid,
            embeds=text(),
            noise=partial(seeded_noise, seed, shape),
            frames=frames,
            stream=stream,
            sampler=samplers.get(name, SamplerConfig((1000,))),
            initial=torch.randn(1, 5, *shape[1:], generator=draw) if has_initial else None,
            negative=text() if guided else None,
        )


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as reason:
        raise CheckpointError(f"cannot read {path}: {reason}") from reason


def _spec(path: Path) -> dict[str, Any]:
    try:
        return parse_object(_metadata(path)["case"])
    except ValueError as reason:
        raise CheckpointError(f"{path}: its metadata 'case' is {reason}") from reason


def _field(spec: dict[str, Any], name: str, path: Path) -> Any:
    if name not in spec:
        raise CheckpointError(f"{path}: its metadata 'case' has no {name!r}")
    return spec[name]


def _weights_for(folder: Path, sizes: dict[str, int]) -> Path:
    for path in sorted(folder.glob("*.safetensors")):
        config = _metadata(path).get("config")
        try:
            if config and parse_object(config) == sizes:
                return path
        except ValueError as reason:
            raise CheckpointError(f"{path}: its metadata 'config' is {reason}") from reason
    raise CheckpointError(f"{folder} holds no weights of the sizes {sizes}")
