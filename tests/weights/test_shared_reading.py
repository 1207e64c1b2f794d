"""Ranks that load a model together: each parameter is read once, all ranks end up with all of them, and none hangs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from causalrope_sp import CausalDiT, CausalRopeError, SequenceParallel, load_model
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.weights import save_model
from causalrope_sp.weights.digest import digest
from causalrope_sp.weights.readers import owners
from causalrope_sp.weights.tensor_files import WeightFiles
from tests.support.checkpoints import CONFIG

RANKS = (1, 2, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`good`, `other` with other weights, `broken` with a NaN in a parameter that the last rank reads, `short` without
    its end."""
    place = tmp_path_factory.mktemp("models")
    for name, seed in (("good", 0), ("other", 1), ("broken", 0)):
        torch.manual_seed(seed)
        model = CausalDiT(CONFIG).to(torch.bfloat16).requires_grad_(False)
        if name == "broken":
            model.get_parameter("blocks.1.ffn.down.bias")[3] = torch.nan
        save_model(model, place / name)
    (place / "short").write_bytes((place / "good").read_bytes()[:-8])
    return place


def everyone(mine: Any) -> list[Any]:
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, mine)
    return said


def load_together(group: dist.ProcessGroup | None, device: str, file: Path, options: dict[str, Any]) -> list[Any]:
    parallel, reads = SequenceParallel(group, "gather-kv", device), Counter[str]()
    take = WeightFiles.take

    def counted(self: WeightFiles, name: str) -> torch.Tensor:
        reads[name] += 1
        return take(self, name)

    WeightFiles.take = counted  # type: ignore[method-assign]
    try:
        model = load_model(file, readers=parallel.denoisers, **options)
    finally:
        WeightFiles.take = take  # type: ignore[method-assign]
    entry = parallel.comm_stats.by_kind().get("weights")
    moved = (entry.calls, entry.bytes) if entry else (0, 0)
    found = digest(model), reads, moved, sum(p.nbytes for p in model.parameters()), len(list(model.parameters()))
    return [found] if group is None else everyone(found)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("options", [{}, {"weights": "fp8", "dtype": torch.float32}])
def test_every_rank_has_the_model_and_every_tensor_was_read_once(
    pool: RankPool, folder: Path, ranks: int, options: dict[str, Any]
) -> None:
    found = pool.run(load_together, ranks, folder / "good", options)
    assert {made[0] for made in found} == {digest(load_model(folder / "good", **options))}
    reads = sum((made[1] for made in found), Counter[str]())
    assert set(reads) == set(WeightFiles(folder / "good").tensors)
    assert set(reads.values()) == {1}
    size, tensors = found[0][3:]
    shares = [size - received for _, _, (_, received), _, _ in found]  # what was not received was read
    if ranks > 1:
        assert all(calls == tensors for _, _, (calls, _), _, _ in found)
        assert sum(shares) == size
        assert max(shares) < 1.2 * size / ranks


def fail_together(group: dist.ProcessGroup, device: str, files: list[Path], options: dict[str, Any]) -> list[Any]:
    parallel = SequenceParallel(group, "gather-kv", device)
    with pytest.raises(CausalRopeError) as caught:
        load_model(files[parallel.rank], readers=parallel.denoisers, **options)
    return everyone((type(caught.value).__name__, str(caught.value)))


@pytest.mark.parametrize(
    ("files", "error", "told"),
    [
        (("good", "nowhere", "good"), "CheckpointError", "nowhere: no such file"),
        (("good", "good", "short"), "CheckpointError", "short: truncated or not a safetensors file"),
        (("broken", "broken", "broken"), "CheckpointError", "1 NaN or infinite in bfloat16: blocks.1.ffn.2.bias"),
        (("good", "other", "good"), "ConfigError", "ranks differ in weights: "),
    ],
)
def test_what_is_wrong_on_one_rank_is_said_on_every_one(
    pool: RankPool, folder: Path, files: tuple[str, ...], error: str, told: str
) -> None:
    found = pool.run(fail_together, 3, [folder / name for name in files], {})
    for kind, message in found:
        assert kind == error
        assert told in message
        assert "\n" not in message
    assert len({message.partition(" (on rank")[0] for _, message in found}) == 1


def test_a_lora_is_merged_by_whoever_reads(pool: RankPool, folder: Path, tmp_path: Path) -> None:
    down, up = torch.randn(2, CONFIG.dim), torch.randn(CONFIG.ffn_dim, 2)
    save_file({"blocks.0.ffn.0.lora_A.weight": down, "blocks.0.ffn.0.lora_B.weight": up}, tmp_path / "lora")
    options: dict[str, Any] = {"loras": [tmp_path / "lora"], "dtype": torch.float32}
    found = pool.run(load_together, 2, folder / "good", options)
    assert {made[0] for made in found} == {digest(load_model(folder / "good", **options))}


def test_reading_is_shared_by_bytes() -> None:
    assert owners([5, 1, 1, 1, 1, 1, 4], 2) == [0, 1, 1, 1, 1, 1, 0]
    assert owners([3, 3], 1) == [0, 0]
