"""A factorised DiT against diffusers' own, on one rank and on several, with and without reuse; its causal form against
one forward under a mask."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import LatteTransformer3DModel, PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from causalrope_kernels import PassOperations
from causalrope_sp import CheckpointError, Chunk, ConfigError, LatentGrid
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.grid import shares
from causalrope_sp.reuse import Broadcast, ReusePolicy
from causalrope_sp.reuse.output_store import computed
from causalrope_sp.spatiotemporal.latte import LatteConfig, LatteDiT, LatteStream, load_latte
from causalrope_sp.spatiotemporal.latte.latte_stream import frame_positions, frame_times
from causalrope_sp.spatiotemporal.model import SpatioTemporalPass
from tests.support.exchange_formulas import received_by_switches
from tests.support.latte_folder import SIZES

GRID = LatentGrid(3, 5)  # not square, not the size that positions were learned at, uneven on 2 ranks
VIDEO = Chunk(0, 0, 5)  # and so are 5 frames on 2 and on 3
STEPS = tuple(950.0 - 100 * n for n in range(10))
PYRAMID = ReusePolicy(
    (Broadcast("self", 2, (100, 800)), Broadcast("temporal", 3, (100, 800)), Broadcast("cross", 5, (100, 800)))
)


def diffusers_model(**sizes: Any) -> LatteTransformer3DModel:
    torch.manual_seed(0)
    model = LatteTransformer3DModel(**{**SIZES, **sizes}).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(1.5)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("latte")
    diffusers_model().save_pretrained(path)
    return path


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def latents(grid: LatentGrid = GRID, batch: int = 2) -> Tensor:
    return random(1, batch, VIDEO.frames, 4, grid.latent_height, grid.latent_width)


TEXT = random(2, 2, 7, 10)


def theirs(model: LatteTransformer3DModel, x_BFCHW: Tensor, t: float) -> Tensor:
    """diffusers' forward, (B, F, C, H, W)."""
    timestep = torch.full((len(x_BFCHW),), t, dtype=torch.float64)
    predicted = model(x_BFCHW.transpose(1, 2), timestep, TEXT[: len(x_BFCHW)], return_dict=False)[0]
    return predicted.transpose(1, 2)


def sampled(predict: Any, x: Tensor) -> Tensor:
    for t in STEPS:
        x = x - 0.1 * predict(x, t)[..., :4, :, :]
    return x


def ours(folder: Path, x: Tensor, parallel: SequenceParallel, reuse: ReusePolicy | None) -> Tensor:
    """Steps as `sampled` makes them, on this rank's frames alone; gathered at the end."""
    stream = LatteStream(load_latte(folder), TEXT, GRID, parallel=parallel, timesteps=STEPS, reuse=reuse)
    tokens = stream.mine(GRID.patchify(x))
    for t in STEPS:
        predicted = stream.denoise(VIDEO, tokens, t).unflatten(-1, (-1, 8))[..., :4]
        tokens = tokens - 0.1 * predicted.flatten(-2)
    return GRID.unpatchify(stream.gather(tokens, VIDEO))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("grid", [GRID, LatentGrid(4, 4), LatentGrid(6, 2)])
def test_a_forward_is_diffusers(folder: Path, grid: LatentGrid) -> None:
    stream = LatteStream(load_latte(folder), TEXT, grid)
    found = grid.unpatchify(stream.denoise(VIDEO, grid.patchify(latents(grid)), 437.0))
    assert relative(found, theirs(diffusers_model(), latents(grid), 437.0)) < 1e-10


@pytest.mark.parametrize("sizes", [{"attention_bias": False}, {"sample_size": 128}, {"out_channels": None}])
def test_other_sizes_are_diffusers(tmp_path: Path, sizes: dict[str, Any]) -> None:
    """128 latent pixels a side scale the positions."""
    model = diffusers_model(**sizes)
    model.save_pretrained(tmp_path)
    found = LatteStream(load_latte(tmp_path), TEXT, GRID).denoise(VIDEO, GRID.patchify(latents()), 437.0)
    assert relative(GRID.unpatchify(found), theirs(model, latents(), 437.0)) < 1e-10


def test_a_picture_is_diffusers(folder: Path) -> None:
    """To a lone frame no time is added."""
    one = latents()[:, :1]
    found = LatteStream(load_latte(folder), TEXT, GRID).denoise(Chunk(0, 0, 1), GRID.patchify(one), 20.0)
    assert relative(GRID.unpatchify(found), theirs(diffusers_model(), one, 20.0)) < 1e-10


def pyramid_of_diffusers() -> Tensor:
    """diffusers' own reuse. Its usual names take attention across frames for spatial, whose pattern is looked at first
    and fits both; here each names its own."""
    model, at = diffusers_model(), [0.0]
    ranges = {rule.kind: rule.every for rule in PYRAMID.rules if isinstance(rule, Broadcast)}
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=ranges["self"],
        temporal_attention_block_skip_range=ranges["temporal"],
        cross_attention_block_skip_range=ranges["cross"],
        spatial_attention_block_identifiers=("^transformer_blocks",),
        temporal_attention_block_identifiers=("^temporal_transformer_blocks",),
        cross_attention_block_identifiers=("^transformer_blocks",),
        current_timestep_callback=lambda: at[0],
    )
    apply_pyramid_attention_broadcast(model, config)

    def predict(x: Tensor, t: float) -> Tensor:
        at[0] = t
        return theirs(model, x, t)

    return sampled(predict, latents())


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    model = diffusers_model()
    return {"plain": sampled(lambda x, t: theirs(model, x, t), latents()), "pyramid": pyramid_of_diffusers()}


def on_ranks(group: dist.ProcessGroup | None, device: str, folder: Path) -> list[dict[str, Any]]:
    """On every rank: the sampled latents and the counted collectives, without and with reuse."""
    mine: dict[str, Any] = {}
    for name, reuse in (("plain", None), ("pyramid", PYRAMID)):
        parallel = SequenceParallel(group, device=device)
        found = ours(folder, latents(), parallel, reuse)
        comm_stats = parallel.comm_stats.take()
        calls = Counter[int]()
        for (_, layer), entry in comm_stats.entries.items():
            calls[layer] += entry.calls
        moved = {kind: (entry.calls, entry.elements) for kind, entry in comm_stats.by_kind().items()}
        mine[name] = {
            "latents": found,
            "moved": moved,
            "layers": calls,
        }
    everyone: list[Any] = [mine]
    if group is not None:
        everyone = [None] * group.size()
        dist.all_gather_object(everyone, mine)
    return everyone


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_many_steps_are_diffusers_with_and_without_reuse(
    pool: RankPool, folder: Path, expected: dict[str, Tensor], ranks: int
) -> None:
    """On uneven ranks too, and on more ranks than frames. A pass makes two switches a layer, and none where attention
    across frames is reused."""
    assert relative(expected["pyramid"], expected["plain"]) > 1e-3, "the cases do not differ"
    found = pool.run(on_ranks, ranks, folder)
    frames, tokens = shares(5, ranks), shares(15, ranks)
    computed = {"plain": 10, "pyramid": sum(n % 3 == 0 or not 100 < t < 800 for n, t in enumerate(STEPS))}
    assert computed["pyramid"] == len({0, 1, 3, 6, 9})
    for rank, seen in enumerate(found):
        for name, passes in computed.items():
            assert relative(seen[name]["latents"], expected[name]) < 1e-10
            if ranks == 1:
                assert seen[name]["moved"] == {}
                continue
            there, back = received_by_switches(frames, tokens, rank, 2 * SIZES["cross_attention_dim"])
            assert seen[name]["moved"]["switch"] == (2 * 2 * passes, 2 * passes * (there + back))
            assert {seen[name]["layers"][layer] for layer in range(2)} == {2 * passes}


def chunk_by_chunk(group: dist.ProcessGroup | None, device: str, folder: Path, window: int) -> Tensor:
    """Predictions of three chunks at t = 0, each committed as it is, through the cache."""
    parallel = SequenceParallel(group, device=device)
    stream = LatteStream(load_latte(folder), TEXT, GRID, parallel=parallel, window=SlidingWindow(window))
    tokens, found = GRID.patchify(random(3, 2, 9, 4, GRID.latent_height, GRID.latent_width)), []
    for n in range(3):
        chunk = Chunk(n, 3 * n, 3)
        mine = stream.mine(tokens[:, chunk.start : chunk.stop])
        found.append(stream.gather(stream.denoise(chunk, mine, 0.0), chunk))
        assert stream.cache is not None
        stream.commit(chunk, mine)
        stream.cache.check_integrity()
    return torch.cat(found, 1)


@pytest.mark.parametrize("window", [9, 6])
def test_chunks_with_a_cache_are_one_forward_under_a_mask(pool: RankPool, folder: Path, window: int) -> None:
    model = load_latte(folder)
    tokens = GRID.patchify(random(3, 2, 9, 4, GRID.latent_height, GRID.latent_width))
    frame = torch.arange(9)
    last = (frame // 3 + 1) * 3  # a chunk's frames attend up to its end, and back over the window
    mask = (frame < last[:, None]) & (frame >= last[:, None] - window)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)

    operations = PassOperations.checked()
    step = SpatioTemporalPass(
        modulation=model.modulation(torch.zeros(1)),
        position_SD=frame_positions(GRID, model.config).double(),
        time_FD=frame_times(range(9), 24).double(),
        text=model.encode_text(TEXT),
        to_tokens=lambda _, x: x.transpose(1, 2).flatten(0, 1),
        to_frames=lambda _, x: x.unflatten(0, (2, -1)).transpose(1, 2),
        attend=attend,
        operations=operations,
        settled=model.settled(operations),
        output=computed,
        timestep=0.0,
        denoised_tokens=tokens.shape[1] * tokens.shape[2],
    )
    whole = model(tokens, step)
    for ranks in (1, 2, 3):
        assert relative(pool.run(chunk_by_chunk, ranks, folder, window), whole) < 1e-12


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"norm_type": "layer_norm"}, "not Latte: its config has norm_type 'layer_norm'"),
        ({"cross_attention_dim": 23}, "not Latte: its cross-attention reads a width of 23, not 24"),
        ({"num_layers": 10**9}, "declares 1000000000 layers, its weights have 2"),
        ({"num_layers": 1}, "declares 1 layers, its weights have 2"),
        ({"caption_channels": 11}, "1 of a wrong shape: caption_projection.linear_1.weight is "),
        ({"patch_size": None}, "the model's config has no patch_size"),
    ],
)
def test_other_checkpoints_are_one_line(folder: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=said) as raised:
        load_latte(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"attn1.to_q.weight": (28, 24), "attn1.to_k.weight": (20, 24)}, "2 of a wrong shape: "),
        ({"attn1.to_out.0.bias": (24, 1)}, "1 of a wrong shape: "),
        ({"scale_shift_table": (6, 4, 6)}, "1 of a wrong shape: "),
    ],
)
def test_every_tensor_has_its_own_shape(folder: Path, tmp_path: Path, shapes: dict[str, Any], said: str) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    for name, shape in shapes.items():
        state[f"transformer_blocks.0.{name}"] = torch.zeros(shape)
    save_file(state, tmp_path / file.name)
    with pytest.raises(CheckpointError, match=said):
        load_latte(tmp_path)


@pytest.mark.parametrize(
    "change", [{"norm_eps": float("inf")}, {"norm_eps": "x"}, {"norm_eps": True}, {"attention_bias": "no"}]
)
def test_wrong_numbers_of_a_latte_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        LatteConfig(**change)


def test_streams_refuse_what_cannot_run(folder: Path) -> None:
    model = load_latte(folder, dtype=torch.float32)
    assert model.dtype == torch.float32
    with pytest.raises(ConfigError, match="the grid's patch"):
        LatteStream(model, TEXT, replace(GRID, patch=(1, 1)))
    with pytest.raises(ConfigError, match="give them"):
        LatteStream(model, TEXT, GRID, reuse=PYRAMID)
    with pytest.raises(ConfigError, match="keeps nothing to look back on"):
        LatteStream(model, TEXT, GRID).commit(VIDEO, GRID.patchify(latents()))
    with pytest.raises(ConfigError, match="divisible by 4"):
        LatteConfig(num_attention_heads=1, attention_head_dim=6)


def test_the_published_model_is_the_default() -> None:
    with torch.device("meta"):
        theirs = LatteTransformer3DModel(
            **{**SIZES, "num_attention_heads": 16, "attention_head_dim": 72, "cross_attention_dim": 1152},
        )
        theirs = LatteTransformer3DModel(
            **{**theirs.config, "num_layers": 28, "caption_channels": 4096, "sample_size": 64, "video_length": 16}
        )
        mine = LatteDiT(LatteConfig())
    assert LatteConfig.of_diffusers(theirs.config) == LatteConfig()
    assert sum(p.numel() for p in mine.parameters()) == sum(p.numel() for p in theirs.parameters())
