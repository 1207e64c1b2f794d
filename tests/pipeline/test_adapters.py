"""LoRAs that are loaded into a pipeline, weighted and taken out again: the bits are those of loading with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from causalrope_sp import CausalVideoPipeline, CheckpointError, ConfigError, SequenceParallel
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.weights import Lora
from causalrope_sp.weights.digest import digest
from tests.support.loras import save_lora

PROMPT = "a red circle slides right"


@pytest.fixture
def loras(tmp_path: Path) -> tuple[Path, Path]:
    modules = ("blocks.0.self_attn.q", "blocks.1.cross_attn.o")
    first, second = (save_lora(tmp_path / f"{n}.safetensors", module, n) for n, module in enumerate(modules))
    return first, second


def opened(**options: Any) -> CausalVideoPipeline:
    return CausalVideoPipeline.from_pretrained("toybox", device="cpu", **options)


def bits(pipe: CausalVideoPipeline) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in pipe.model.state_dict().items()}


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(tensor.float(), second[name].float()) for name, tensor in first.items())


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"weights": "fp8"}], ids=["float32", "bfloat16", "fp8"])
def test_bits_are_those_of_loading_and_return(loras: tuple[Path, Path], options: dict[str, Any]) -> None:
    first, second = loras
    pipe = opened(**options)
    plain, places = bits(pipe), {name: tensor.data_ptr() for name, tensor in pipe.model.state_dict().items()}
    pipe.load_lora_weights(first, adapter_name="first")
    assert same(bits(pipe), bits(opened(loras=[first], **options)))
    pipe.load_lora_weights(f"{second}:0.5")
    assert pipe.get_active_adapters() == ["first", "default_0"]
    assert same(bits(pipe), bits(opened(loras=[first, Lora(second, 0.5)], **options)))
    pipe.set_adapters(["first", "default_0"], [0.25, -1.0])
    assert same(bits(pipe), bits(opened(loras=[Lora(first, 0.25), Lora(second, -1.0)], **options)))
    pipe.set_adapters("default_0")
    assert pipe.get_active_adapters() == ["default_0"]
    assert same(bits(pipe), bits(opened(loras=[Lora(second, -1.0)], **options)))
    pipe.unload_lora_weights()
    assert pipe.get_active_adapters() == []
    assert same(bits(pipe), plain)
    assert {name: tensor.data_ptr() for name, tensor in pipe.model.state_dict().items()} == places


def test_loras_of_the_loading_stay(loras: tuple[Path, Path]) -> None:
    pipe = opened(loras=[loras[0]])
    before = bits(pipe)
    pipe.load_lora_weights(loras[1])
    assert same(bits(pipe), bits(opened(loras=list(loras))))
    pipe.unload_lora_weights()
    assert same(bits(pipe), before)


def test_a_video_changes_and_is_the_same_again(loras: tuple[Path, Path]) -> None:
    pipe = opened()
    pipe.set_progress_bar_config(disable=True)

    def latents() -> Tensor:
        return pipe(PROMPT, num_frames=5, output_type="latent").frames

    plain = latents()
    pipe.load_lora_weights(loras[0])
    assert not torch.equal(latents(), plain)
    pipe.unload_lora_weights()
    assert torch.equal(latents(), plain)


def test_a_lora_that_does_not_fit_leaves_the_model_as_it_was(loras: tuple[Path, Path], tmp_path: Path) -> None:
    pipe = opened()
    pipe.load_lora_weights(loras[0])
    before = bits(pipe)
    broken = save_lora(tmp_path / "nan.safetensors", "blocks.0.self_attn.q", 5, float("nan"))
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        pipe.load_lora_weights(broken)
    with pytest.raises(CheckpointError, match="fit no parameter"):
        pipe.load_lora_weights(save_lora(tmp_path / "other.safetensors", "blocks.99.self_attn.q", 5))
    assert pipe.get_active_adapters() == ["default_0"]
    assert same(bits(pipe), before)


def test_what_a_broken_lora_has_merged_before_it_breaks_is_taken_out(loras: tuple[Path, Path], tmp_path: Path) -> None:
    pipe = opened()
    plain = bits(pipe)
    good, bad = load_file(loras[0]), load_file(save_lora(tmp_path / "nan", "blocks.1.cross_attn.o", 5, float("nan")))
    save_file(good | bad, tmp_path / "both.safetensors")
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        pipe.load_lora_weights(tmp_path / "both.safetensors")
    assert same(bits(pipe), plain)


def test_wrong_names_are_refused(loras: tuple[Path, Path]) -> None:
    pipe = opened()
    pipe.load_lora_weights(loras[0], "a")
    for call, told in (
        (lambda: pipe.load_lora_weights(loras[1], "a"), "adapter_name must be new, and 'a' is loaded"),
        (lambda: pipe.set_adapters(["a", "b"]), "adapter_names must be of the loaded LoRAs, a, not 'b'"),
        (lambda: pipe.set_adapters("a", [1.0, 2.0]), "adapter_weights must be 1, as many as the names, not 2"),
        (lambda: pipe.set_adapters("a", float("nan")), "adapter_weights must be a finite number"),
        (lambda: pipe.load_lora_weights(loras[1], ""), "adapter_name must be a text that is not empty"),
        (lambda: pipe.set_adapters([["a"]]), r"adapter_names must be of the loaded LoRAs, a, not \['a'\]"),  # type: ignore[list-item]
        (lambda: pipe.set_adapters("a", 1e300), r"the weight of a LoRA must be a .* that float32 has, not 1e\+300"),
        (lambda: pipe.load_lora_weights(None), "the path of a LoRA must be that of its file or folder, not None"),  # type: ignore[arg-type]
        (lambda: pipe.load_lora_weights(b"a"), "the path of a LoRA must be .*, not b'a'"),  # type: ignore[arg-type]
        (lambda: pipe.load_lora_weights(""), "the path of a LoRA must be .*, not ''"),
    ):
        with pytest.raises(ConfigError, match=told):
            call()


def change_on_ranks(group: dist.ProcessGroup | None, device: str, first: Path, second: Path) -> list[Any]:
    """The weights' digest as opened, with a LoRA, after ranks that give different files, and without it; and what each
    rank hears where one alone has a wrong argument."""
    parallel = SequenceParallel(group, "gather-kv", device)
    pipe = CausalVideoPipeline.from_pretrained("toybox", parallel=parallel)
    seen: list[Any] = [digest(pipe.model)]
    pipe.load_lora_weights(first)
    seen.append(digest(pipe.model))
    try:
        pipe.load_lora_weights(second if parallel.rank else first)
    except ConfigError as error:
        seen += [digest(pipe.model), "LoRAs" if "LoRAs" in str(error) else str(error)]
    wrong: list[Any] = [
        lambda: pipe.load_lora_weights(first, "" if parallel.rank else "second"),
        lambda: pipe.set_adapters("default_0", None if parallel.rank else [1.0, 2.0]),
        lambda: pipe.unload_lora_weights(recache="no" if parallel.rank else False),  # type: ignore[arg-type]
    ]
    for call in wrong:
        with pytest.raises(ConfigError) as told:
            call()
        by_rank: list[Any] = [None] * parallel.size
        dist.all_gather_object(by_rank, str(told.value), group)
        seen.append(by_rank)
    pipe.unload_lora_weights()
    return [*seen, digest(pipe.model)]


def test_ranks_change_their_loras_together(pool: RankPool, loras: tuple[Path, Path]) -> None:
    plain, with_first = digest(opened().model), digest(opened(loras=[loras[0]]).model)
    *seen, last = pool.run(change_on_ranks, 2, *loras)
    assert [*seen[:4], last] == [plain, with_first, with_first, "LoRAs", plain]
    for by_rank, rank, said in zip(
        seen[4:],
        (1, 0, 1),
        ("adapter_name must be a text", "adapter_weights must be 1, as many as the names, not 2", "recache must be"),
        strict=True,
    ):
        assert by_rank[rank].startswith(said)
        assert by_rank[1 - rank] == f"{by_rank[rank]} (on rank {rank})"
