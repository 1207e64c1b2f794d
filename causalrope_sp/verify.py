"""Are the numbers right on this machine? Reference cases, or a self-check, at any rank count and strategy."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from causalrope_sp.config import DiTConfig, SamplerConfig, StreamConfig
from causalrope_sp.errors import CheckpointError, ConfigError
from causalrope_sp.grid import Chunk, LatentGrid, split_into_chunks
from causalrope_sp.model import CausalDiT
from causalrope_sp.noise import Noise, seeded_noise
from causalrope_sp.parallel import STRATEGIES, SequenceParallel
from causalrope_sp.parallel.launch import run_ranks
from causalrope_sp.reference import block_causal_velocity
from causalrope_sp.sampler import sample_chunks
from causalrope_sp.weights import load_model

REFERENCE_BOUND = {torch.float64: 1e-6, torch.float32: 1e-4}  # against latents computed elsewhere
SELF_BOUND = {torch.float64: 1e-10, torch.float32: 1e-5}  # against this library on one process


@dataclass(frozen=True)
class Check:
    """One row of the table. `ok` None means skipped, and `note` says why."""

    case: str
    ranks: int
    strategy: str
    error: float | None
    ok: bool | None
    note: str = ""


@dataclass(frozen=True)
class Case:
    """Everything one run of the sampler needs."""

    name: str
    model: CausalDiT
    grid: LatentGrid
    embeds: Tensor
    noise: Callable[[], Noise]
    frames: int
    stream: StreamConfig
    sampler: SamplerConfig
    initial: Tensor | None = None

    def run(self, parallel: SequenceParallel) -> Tensor:
        """The generated latents, (B, F, C, H, W)."""
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
        )
        return torch.cat([chunk.latents for chunk in chunks], 1)


def run_verification(
    folder: Path | None,
    ranks: Sequence[int],
    strategies: Sequence[str],
    dtype: torch.dtype,
    device: str = "cpu",
) -> list[Check]:
    """Runs every reference case of `folder`, or the self-check without one, and starts the processes itself.

    Args:
        ranks: the rank counts to try.
        strategies: names of `STRATEGIES`, or "all".
        dtype: float64, float32 or bfloat16.

    Raises:
        CheckpointError: the folder or a file in it cannot be read, or holds no case.
        ConfigError: an unknown strategy, a rank count below 1, or more ranks than GPUs.
    """
    names = STRATEGIES if "all" in strategies else tuple(strategies)
    for name in names:
        if name not in STRATEGIES:
            raise ConfigError(f"unknown strategy {name!r}; there are: all, {', '.join(STRATEGIES)}")
    if not ranks or min(ranks) < 1:
        raise ConfigError(f"rank counts must be at least 1, not {list(ranks)}")
    if device == "cuda" and max(ranks) > torch.cuda.device_count():
        raise ConfigError(f"{max(ranks)} ranks need as many GPUs; this machine has {torch.cuda.device_count()}")
    if folder is not None:
        _case_files(folder)
    work = _check_self if folder is None else _check_folder
    checks = []
    for count in ranks:
        checks += run_ranks(work, count, folder, names, dtype, device=device)
    return checks


def _check_folder(
    group: dist.ProcessGroup | None, device: str, folder: Path, strategies: Sequence[str], dtype: torch.dtype
) -> list[Check]:
    checks = []
    for path, kind in _case_files(folder):
        if kind != "dmd":
            ranks = 1 if group is None else group.size()
            note = f"kind {kind!r} is not known to this version"
            checks += [Check(path.stem, ranks, strategy, None, None, note) for strategy in strategies]
            continue
        case, latents = load_case(path, dtype, device)
        checks += _check_strategies(case, latents, group, device, strategies, REFERENCE_BOUND)
    return checks


def _check_self(
    group: dist.ProcessGroup | None, device: str, _: None, strategies: Sequence[str], dtype: torch.dtype
) -> list[Check]:
    checks = []
    for case in self_check_cases(dtype, device):
        single = case.run(SequenceParallel.single(device=device))
        checks += _check_strategies(case, single, group, device, strategies, SELF_BOUND)
        if group is None and case.initial is None:
            error = _relative_error(*block_causal_pair(case))
            name = f"{case.name}, one forward over all"
            checks.append(Check(name, 1, "single", error, error <= SELF_BOUND.get(dtype, _half_bound(case, device))))
    return checks


def _check_strategies(
    case: Case,
    expected: Tensor,
    group: dist.ProcessGroup | None,
    device: str,
    strategies: Sequence[str],
    bounds: dict[torch.dtype, float],
) -> list[Check]:
    checks = []
    for strategy in strategies:
        parallel = SequenceParallel(group, strategy, device)
        try:
            parallel.strategy(case.grid, case.model.config.num_heads)
        except ConfigError as reason:
            checks.append(Check(case.name, parallel.size, strategy, None, None, str(reason)))
            continue
        bound = bounds.get(case.model.dtype)
        if bound is None:
            bound = _half_bound(case, device)
        error = _relative_error(case.run(parallel), expected)
        checks.append(Check(case.name, parallel.size, strategy, error, error <= bound))
    return checks


def _half_bound(case: Case, device: str) -> float:
    """Half precision may err twice what it costs one process, measured against float64 on the same case."""
    precise = replace(case, model=_converted(case.model, torch.float64))
    single = SequenceParallel.single(device=device)
    return 2 * _relative_error(case.run(single), precise.run(single))


def _relative_error(result: Tensor, expected: Tensor) -> float:
    result, expected = result.double().cpu(), expected.double().cpu()
    error = ((result - expected).norm() / expected.norm()).item()
    return error if error == error else float("inf")


def _converted(model: CausalDiT, dtype: torch.dtype) -> CausalDiT:
    copy = CausalDiT(model.config).to(model.device, dtype).eval().requires_grad_(False)
    copy.load_state_dict(model.state_dict())
    return copy


def _case_files(folder: Path) -> list[tuple[Path, str]]:
    """The case files of a folder with their kinds, in order of name."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder of reference cases")
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        metadata = _metadata(path)
        if "case" in metadata:
            found.append((path, json.loads(metadata["case"])["kind"]))
    if not found:
        raise CheckpointError(f"{folder} holds no reference case (a .safetensors file with metadata 'case')")
    return found


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as reason:
        raise CheckpointError(f"cannot read {path}: {reason}") from reason


def load_case(path: Path, dtype: torch.dtype, device: str = "cpu") -> tuple[Case, Tensor]:
    """One reference case of kind dmd with the weights that it names by equal sizes, and the latents to match.

    Raises:
        CheckpointError: the file, a tensor in it or its weights are missing or unreadable.
    """
    spec = json.loads(_metadata(path)["case"])
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if not name.startswith("call.")}
    model = load_model(_weights_for(path.parent, spec["cfg"]), dtype=dtype, device=device)
    window, given = spec["local_attn_size"], spec["initial_frames"]
    renoise = [tensors[name] for name in sorted(tensors) if name.startswith("renoise.")]

    def noise() -> Noise:
        draws = iter(renoise)

        def draw(chunk: Chunk, step: int) -> Tensor:
            if step == 0:
                return tensors["noise"][:, chunk.start - given : chunk.stop - given]
            return next(draws).unflatten(0, (spec["batch"], chunk.frames))

        return draw

    case = Case(
        name=path.stem,
        model=model,
        grid=LatentGrid.from_latent(spec["latent_height"], spec["latent_width"]),
        embeds=tensors["prompt_embeds"],
        noise=noise,
        frames=spec["num_frames"],
        stream=StreamConfig(
            None if window == -1 else window, spec["sink_size"], spec["chunk_frames"], spec["independent_first_frame"]
        ),
        sampler=SamplerConfig(tuple(spec["denoising_step_list"]), spec["timestep_shift"]),
        initial=tensors.get("initial_latent"),
    )
    return case, tensors["latents"][:, given:]


def _weights_for(folder: Path, sizes: dict[str, int]) -> Path:
    for path in sorted(folder.glob("*.safetensors")):
        config = _metadata(path).get("config")
        if config and json.loads(config) == sizes:
            return path
    raise CheckpointError(f"{folder} holds no weights of the sizes {sizes}")


def self_check_cases(dtype: torch.dtype, device: str = "cpu") -> Iterator[Case]:
    """A small random model over every way to cut a stream: odd grid, window, sink, lone first frame, given frames."""
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
    }
    for seed, (name, (frames, stream)) in enumerate(plans.items()):
        shape = (2 if name == "random-sink" else 1, config.in_channels, grid.latent_height, grid.latent_width)
        draw = torch.Generator().manual_seed(seed)
        extend = name == "random-extend"
        yield Case(
            name=name,
            model=model,
            grid=grid,
            embeds=torch.randn(shape[0], config.text_len, config.text_dim, generator=draw),
            noise=partial(seeded_noise, seed, shape),
            frames=frames,
            stream=stream,
            sampler=SamplerConfig((1000, 500) if extend else (1000,)),
            initial=torch.randn(1, 5, *shape[1:], generator=draw) if extend else None,
        )


def block_causal_pair(case: Case) -> tuple[Tensor, Tensor]:
    """(streamed, whole): a one-step video chunk by chunk with the cache, and from one forward over all its frames."""
    streamed = case.run(SequenceParallel.single(device=str(case.model.device)))
    stream = case.stream
    chunks = list(
        split_into_chunks(case.frames, stream.chunk_frames, independent_first_frame=stream.independent_first_frame)
    )
    draw = case.noise()
    noise = torch.cat([draw(chunk, 0) for chunk in chunks], 1).to(streamed)
    velocity = block_causal_velocity(
        case.model, case.embeds, case.grid, chunks, streamed, noise, 1000.0, window=stream.window, sink=stream.sink
    )
    return streamed, noise - velocity
