"""Runs reference cases, or a self-check, at several rank counts and strategies, and compares the latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from causalrope_sp.checks import check_choice
from causalrope_sp.config import CacheDtype
from causalrope_sp.diffusion.schedule import guided_steps
from causalrope_sp.distributed import SequenceParallel, strategies
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.distributed.layout import SINGLE, check_name
from causalrope_sp.distributed.mesh import possible_cfg_sizes
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import split_into_chunks
from causalrope_sp.verification.cases import KNOWN_KINDS, Case, case_files, load_case, self_check_cases
from causalrope_sp.verification.reference import block_causal_velocity

if TYPE_CHECKING:
    import torch.distributed as dist

ALL = "all"
# Bounds of the relative error of latents.
REFERENCE_BOUND = {torch.float64: 1e-6, torch.float32: 1e-4}  # against the latents of a reference case
SELF_BOUND = {torch.float64: 1e-10, torch.float32: 1e-5}  # against this library on one process
EIGHT_BITS_BOUND = SELF_BOUND | {torch.float32: 1e-3}  # a number at the border of two may be rounded another way
HALF_BOUND = 0.03  # in half precision: at most twice the error of one process, and never more than this


@dataclass(frozen=True)
class Check:
    """One comparison, a row of the table.

    Args:
        case: the case's name.
        ranks: the rank count.
        strategy: the strategy's name.
        error: relative error of the latents; None if the case was skipped.
        ok: whether the error is within its bound; None if the case was skipped.
        note: why it was skipped.
    """

    case: str
    ranks: int
    strategy: str
    error: float | None
    ok: bool | None
    note: str = ""


def run_verification(
    folder: Path | None,
    ranks: Sequence[int],
    strategy: str,
    dtype: torch.dtype,
    device: str = "cpu",
    cache: CacheDtype = "model",
) -> list[Check]:
    """Runs every reference case of a folder, or the self-check, and starts the processes itself.

    Args:
        folder: the folder of reference cases; None runs the self-check.
        ranks: the rank counts to run at.
        strategy: a strategy's name, or "all" for every one that the ranks and the model's heads allow.
        dtype: float64, float32 or bfloat16.
        device: "cpu" or "cuda".
        cache: how keys and values are stored in the self-check.

    Returns:
        One check for each case, rank count and strategy.

    Raises:
        CheckpointError: the folder or a file in it cannot be read, or the folder holds no case.
        ConfigError: a folder is to be checked with a cache in 8 bits, the strategy is unknown, a rank count is below 1,
            there are more ranks than GPUs, or nothing could be checked.
    """
    check_choice("device", device, ("cpu", "cuda"))
    if folder is not None and cache != "model":
        raise ConfigError(f"reference cases were made in the model's own dtype, not with a cache in {cache}")
    if strategy != ALL:
        check_name(strategy)
    if not ranks or min(ranks) < 1:
        raise ConfigError(f"rank counts must be at least 1, not {list(ranks)}")
    if device == "cuda" and max(ranks) > torch.cuda.device_count():
        raise ConfigError(f"{max(ranks)} ranks need as many GPUs; this machine has {torch.cuda.device_count()}")
    if folder is not None:
        for path, kind in case_files(folder):
            if kind in KNOWN_KINDS:
                load_case(path, dtype)  # a file that cannot be read is reported before any process is started
    work = partial(_check_self, cache) if folder is None else _check_folder
    checks: list[Check] = []
    with RankPool(device) as pool:
        for count in ranks:
            checks += pool.run(work, count, folder, strategy, dtype)
    if all(check.ok is None for check in checks):
        raise ConfigError(f"nothing could be checked: {checks[0].note}")
    return checks


def _check_folder(
    group: dist.ProcessGroup | None, device: str, folder: Path, strategy: str, dtype: torch.dtype
) -> list[Check]:
    checks = []
    for path, kind in case_files(folder):
        if kind not in KNOWN_KINDS:
            ranks = 1 if group is None else group.size()
            note = f"kind {kind!r} is not known to this version"
            checks += [Check(path.stem, ranks, name, None, None, note) for name in _names(strategy, ranks, ranks)]
            continue
        case, latents = load_case(path, dtype, device)
        bound = REFERENCE_BOUND.get(dtype) or _half_bound(case, latents, device)
        checks += _check_strategies(case, latents, bound, group, device, strategy)
    return checks


def _check_self(
    cache: CacheDtype, group: dist.ProcessGroup | None, device: str, _: None, strategy: str, dtype: torch.dtype
) -> list[Check]:
    checks = []
    single, bounds = SequenceParallel.single(device=device), SELF_BOUND if cache == "model" else EIGHT_BITS_BOUND
    for cases in zip(self_check_cases(dtype, device), self_check_cases(torch.float64, device), strict=True):
        case, exact = (replace(each, stream=replace(each.stream, cache=cache)) for each in cases)
        expected = (case if dtype in bounds else exact).run(single)
        bound = bounds.get(dtype) or _half_bound(case, expected, device)
        checks += _check_strategies(case, expected, bound, group, device, strategy)
        if cache == "model" and group is None and case.initial is None and case.negative is None:
            streamed, whole = block_causal_pair(case)
            error = _relative_error(streamed, whole)
            checks.append(Check(f"{case.name}, one forward over all", 1, "single", error, error <= bound))
    return checks


def _check_strategies(
    case: Case,
    expected: Tensor,
    bound: float,
    group: dist.ProcessGroup | None,
    device: str,
    strategy: str,
) -> list[Check]:
    checks, ranks, heads = [], 1 if group is None else group.size(), case.model.config.num_heads
    sizes = possible_cfg_sizes(any(guided_steps(case.sampler)), ranks)
    for count, name in [(n, name) for n in sizes for name in _names(strategy, ranks // n, heads, n)]:
        label = name if count == 1 else f"{count}×{name}"
        try:
            parallel = SequenceParallel(group, name, device, cfg=count)
            result = case.run(parallel)
        except ConfigError as reason:
            checks.append(Check(case.name, ranks, label, None, None, str(reason)))
            continue
        error = _relative_error(result, expected)
        checks.append(Check(case.name, ranks, label, error, error <= bound))
    return checks


def _names(strategy: str, ranks: int, heads: int, cfg: int = 1) -> list[str]:
    """Returns the strategies to run on the ranks of the `sp` axis; with one rank all are the same, so one is run."""
    if strategy != ALL:
        return [strategy]
    return [SINGLE] if (ranks, cfg) == (1, 2) else strategies(ranks, heads)


def _half_bound(case: Case, expected: Tensor, device: str) -> float:
    """Returns the bound in half precision: twice the error of one process, at most `HALF_BOUND`."""
    cost = _relative_error(case.run(SequenceParallel.single(device=device)), expected)
    return min(2 * cost, HALF_BOUND)


def _relative_error(result: Tensor, expected: Tensor) -> float:
    result, expected = result.double().cpu(), expected.double().cpu()
    error = ((result - expected).norm() / expected.norm()).item()
    return error if error == error else float("inf")


def block_causal_pair(case: Case) -> tuple[Tensor, Tensor]:
    """Computes a one-step video twice: chunk by chunk with the cache, and by one forward over all its frames.

    Args:
        case: a case of one denoising step, without initial latents and guidance.

    Returns:
        The streamed latents and those of the one forward, each (B, F, C, H, W).
    """
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
