"""Are the numbers right on this machine? Reference cases, or a self-check, at any rank count and strategy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

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
REFERENCE_BOUND = {torch.float64: 1e-6, torch.float32: 1e-4}  # against latents computed elsewhere
SELF_BOUND = {torch.float64: 1e-10, torch.float32: 1e-5}  # against this library on one process
HALF_BOUND = 0.03  # half precision: at most twice what it costs one process, and never more than this


@dataclass(frozen=True)
class Check:
    """One row of the table. `ok` None means skipped, and `note` says why."""

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
) -> list[Check]:
    """Runs every reference case of `folder`, or the self-check without one, and starts the processes itself.

    Args:
        ranks: the rank counts to try.
        strategy: a strategy's name, or "all" that the ranks and the model's heads allow.
        dtype: float64, float32 or bfloat16.

    Raises:
        CheckpointError: the folder or a file in it cannot be read, or holds no case.
        ConfigError: an unknown strategy, a rank count below 1, more ranks than GPUs, or nothing that could be checked.
    """
    if strategy != ALL:
        check_name(strategy)
    if not ranks or min(ranks) < 1:
        raise ConfigError(f"rank counts must be at least 1, not {list(ranks)}")
    if device == "cuda" and max(ranks) > torch.cuda.device_count():
        raise ConfigError(f"{max(ranks)} ranks need as many GPUs; this machine has {torch.cuda.device_count()}")
    if folder is not None:
        for path, kind in case_files(folder):
            if kind in KNOWN_KINDS:
                load_case(path, dtype)  # what cannot be read is said before any process is started
    work = _check_self if folder is None else _check_folder
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
    group: dist.ProcessGroup | None, device: str, _: None, strategy: str, dtype: torch.dtype
) -> list[Check]:
    checks = []
    single = SequenceParallel.single(device=device)
    for case, exact in zip(self_check_cases(dtype, device), self_check_cases(torch.float64, device), strict=True):
        expected = (case if dtype in SELF_BOUND else exact).run(single)
        bound = SELF_BOUND.get(dtype) or _half_bound(case, expected, device)
        checks += _check_strategies(case, expected, bound, group, device, strategy)
        if group is None and case.initial is None and case.negative is None:
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
    """The strategies to run on the ranks of the `sp` axis; all of them are the same where it has one rank."""
    if strategy != ALL:
        return [strategy]
    return [SINGLE] if (ranks, cfg) == (1, 2) else strategies(ranks, heads)


def _half_bound(case: Case, expected: Tensor, device: str) -> float:
    cost = _relative_error(case.run(SequenceParallel.single(device=device)), expected)
    return min(2 * cost, HALF_BOUND)


def _relative_error(result: Tensor, expected: Tensor) -> float:
    result, expected = result.double().cpu(), expected.double().cpu()
    error = ((result - expected).norm() / expected.norm()).item()
    return error if error == error else float("inf")


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
