"""Videos that are encoded and decoded with the embedded model: on any number of ranks, damaged, and by its options."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from causalrope_sp import CausalVideoPipeline, ConfigError, PromptError, SequenceParallel
from causalrope_sp.compression import Header, decode, encode
from causalrope_sp.diffusion.noise import keyed_generator
from causalrope_sp.distributed import strategies
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.errors import InputError
from causalrope_sp.heads import HeadPolicy
from causalrope_sp.sampling.chunk_loop import ChunkLoop
from causalrope_sp.toybox.prompts import parse_prompt
from causalrope_sp.toybox.scenes import START_VARIABLES, render

PROMPT, SEED, FRAMES = "a green circle slides right and a blue square bounces", 3, 30


def video(frames: int = FRAMES, seed: int = SEED) -> np.ndarray:
    """The scene where the text encoder puts it."""
    starts = torch.rand(1, START_VARIABLES, generator=keyed_generator(seed))
    pixels = render([parse_prompt(PROMPT)], starts, torch.arange(frames).float(), 64)[0]
    return pixels.movedim(0, -1).mul(255).round().byte().numpy()


def psnr(frames: np.ndarray, truth: np.ndarray) -> float:
    return 10 * math.log10(255**2 / np.square(frames.astype(float) - truth).mean())


@cache
def pipe_of(dtype: str = "float32") -> CausalVideoPipeline:
    return CausalVideoPipeline.from_pretrained("toybox", dtype=dtype)


def encoded(pipe: CausalVideoPipeline | None = None, frames: int = FRAMES, **options: Any) -> list[bytes]:
    prompt = options.pop("prompt", PROMPT)
    return list(encode(pipe or pipe_of(), video(frames), prompt, text_seed=SEED, **options))


def decoded(packets: list[bytes], pipe: CausalVideoPipeline | None = None) -> np.ndarray:
    return np.concatenate([chunk.frames for chunk in decode(pipe or pipe_of(), packets) if chunk.frames is not None])


@pytest.fixture(scope="module")
def packets() -> list[bytes]:
    return encoded()


@pytest.mark.parametrize("frames", [1, 2, 13, 14, FRAMES])
def test_any_number_of_frames_comes_back(frames: int) -> None:
    coded = encoded(frames=frames)
    assert decoded(coded).shape == (frames, 64, 64, 3)
    assert psnr(decoded(coded), video(frames)) > 24


def test_bits_buy_quality(packets: list[bytes]) -> None:
    """More bits give a better picture, and none of them or a wrong prompt a worse one."""
    sizes, quality = [], []
    for options in ({"most": 0}, {"rate": 1.0}, {}, {"rate": 0.001, "atoms": 4096, "most": 64}):
        coded = encoded(**options)
        sizes.append(sum(map(len, coded)))
        quality.append(psnr(decoded(coded), video()))
    assert sizes == sorted(sizes)
    assert quality == sorted(quality)
    wrong = encoded(prompt="a red triangle pulses on a light background", most=0)
    assert psnr(decoded(wrong), video()) < quality[0]


@torch.inference_mode()
def test_a_residual_leads_to_the_codecs_own_latents() -> None:
    """What a fine residual gives is what the codec makes of its own latents, which is as good as it gets."""
    pipe, truth = pipe_of(), video(13)
    pixels = torch.from_numpy(truth).movedim(3, 1)[None].float() / 127.5 - 1
    own = pipe.codec.decoder().decode(pipe.codec.encoder().encode(pixels))[0].movedim(1, -1)
    ceiling = psnr((own.clamp(-1, 1) * 127.5 + 127.5).round().numpy(), truth)
    coarse, fine = (decoded(encoded(frames=13, residual=step)) for step in (0.5, 0.01))
    assert psnr(coarse, truth) < psnr(fine, truth) == pytest.approx(ceiling, abs=0.02)


def test_a_budget_is_kept_to() -> None:
    for bpp in (0.004, 0.02):
        coded = encoded(frames=97, bpp=bpp)
        spent = 8 * sum(map(len, coded[1:])) / (97 * 64 * 64)
        assert 0.75 * bpp < spent < 1.03 * bpp


def test_packets_come_while_frames_are_read() -> None:
    read = 0

    def frames() -> Iterator[np.ndarray]:
        nonlocal read
        for frame in video():
            read += 1
            yield frame

    packets = encode(pipe_of(), frames(), PROMPT, text_seed=SEED)
    next(packets)
    next(packets)
    assert read <= 1 + 4 * 2 + 1, "the first chunk's frames, and one that tells whether it is the last"


def on_ranks(group: dist.ProcessGroup, device: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for strategy in strategies(group.size(), 4):
        parallel = SequenceParallel(group, strategy, device)
        pipe = CausalVideoPipeline.from_pretrained("toybox", dtype="float64", parallel=parallel)
        coded = encoded(pipe)
        alone = [packet for chunk in decode(pipe, coded) if (packet := chunk.frames) is not None]
        found[strategy] = coded, alone
        parallel.close()
    return found


def ranks_of_two_videos(group: dist.ProcessGroup, device: str) -> list[str]:
    """What ranks say whose videos differ, in their pixels and in their lengths."""
    parallel, said = SequenceParallel(group, device=device), []
    pipe = CausalVideoPipeline.from_pretrained("toybox", parallel=parallel)
    own = video(13)
    for frames in (255 - own if parallel.rank else own, own[: 13 - 4 * parallel.rank]):
        try:
            list(encode(pipe, frames, PROMPT, text_seed=SEED))
        except ConfigError as error:
            said.append(str(error))
    return said


def test_ranks_with_different_videos_are_told_so(pool: RankPool) -> None:
    said = pool.run(ranks_of_two_videos, 2)
    assert len(said) == 2
    assert all("ranks differ in the video's chunk" in each for each in said), said


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_send_the_same_bits_and_draw_the_same_video(pool: RankPool, ranks: int) -> None:
    pipe = pipe_of("float64")
    coded = encoded(pipe, exact=True)
    frames = decoded(coded, pipe)
    for strategy, (own, drawn) in pool.run(on_ranks, ranks).items():
        assert own[1:] == coded[1:], strategy
        assert np.array_equal(np.concatenate(drawn), frames), strategy


def test_other_arithmetic_degrades_and_does_not_lose_step(packets: list[bytes]) -> None:
    """The bits are choices, not differences: what bfloat16 rounds otherwise costs decibels, evenly over the video."""
    coded = encoded(frames=97)
    rounded = decoded(coded, pipe_of("bfloat16"))
    exact = decoded(coded)
    truth = video(97)
    halves = [psnr(exact[h], truth[h]) - psnr(rounded[h], truth[h]) for h in (slice(0, 48), slice(48, 96))]
    assert all(loss < 1.0 for loss in halves), halves


@pytest.mark.parametrize("residual", [0.0, 0.3, 1e-3])
def test_what_a_decoder_draws_is_what_the_encoder_saw(residual: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit on the same machine, also where a residual is larger than its numbers can tell."""
    made: list[torch.Tensor] = []
    step = ChunkLoop.step

    def noted(loop: ChunkLoop, *arguments: Any) -> Any:
        found = step(loop, *arguments)
        made.append(found.latents.clone())
        return found

    monkeypatch.setattr(ChunkLoop, "step", noted)
    coded = encoded(frames=25, residual=residual)
    saw, made = made, []
    decoded(coded)
    assert len(saw) == len(made) == 3
    assert all(torch.equal(a, b) for a, b in zip(saw, made, strict=True))


HEADS = HeadPolicy(((5, 5, None, None, None, None),) * 6)


@pytest.mark.parametrize("lossy", [{"cache": "int8"}, {"heads": HEADS}, {"similar_frames": 0.5}], ids=lambda p: min(p))
def test_the_decoder_attends_as_the_encoder_did(packets: list[bytes], lossy: dict[str, Any]) -> None:
    """As the header says, whatever the decoder's pipeline was loaded with."""
    pipe = CausalVideoPipeline.from_pretrained("toybox", **lossy)
    coded = encoded(pipe)
    assert coded[1:] != packets[1:]
    assert np.array_equal(decoded(coded), decoded(coded, pipe))
    assert psnr(decoded(coded), video()) > 28


def test_a_video_is_decoded_with_the_weights_that_it_was_encoded_with() -> None:
    quantized = CausalVideoPipeline.from_pretrained("toybox", weights="fp8")
    coded = encoded(quantized, frames=13)
    header, _ = Header.read(coded[0])
    with pytest.raises(ConfigError, match="weights: expected fp8, with which the video was compressed, got full"):
        decoded(coded)
    as_full = [replace(header, weights="full").pack(), *coded[1:]]
    assert not np.array_equal(decoded(as_full), decoded(coded, quantized))


def test_seeds_draw_other_atoms() -> None:
    assert not np.array_equal(decoded(encoded(seed=9)), decoded(encoded(seed=10)))


def test_loras_do_not_change_and_memory_is_counted_while_a_video_is_coded() -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox")
    packets = encode(pipe, video(), PROMPT, text_seed=SEED)
    next(packets)
    assert len(pipe.open_streams) == 1
    assert pipe.open_streams.planned_bytes > 0
    with pytest.raises(ConfigError, match="cannot change its weights under an open stream where a video is coded"):
        pipe.unload_lora_weights()
    list(packets)
    assert len(pipe.open_streams) == 0


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_a_lost_packet_is_named_and_the_others_go_on(packets: list[bytes], lost: int) -> None:
    assert len(packets) == 4
    kept = [packet for n, packet in enumerate(packets) if n != lost]
    if lost == 3:
        with pytest.raises(InputError, match="cut off: it has 2 whole chunks and no last one"):
            decoded(kept)
        return
    chunks = list(decode(pipe_of(), kept))
    assert [chunk.index for chunk in chunks if chunk.lost] == [lost - 1]
    assert sum(len(chunk.frames) for chunk in chunks if chunk.frames is not None) == FRAMES


def test_a_loss_ends_at_the_next_refresh() -> None:
    coded = encoded(frames=60, refresh=2)
    whole, damaged = list(decode(pipe_of(), coded)), list(decode(pipe_of(), [coded[0], *coded[2:]]))
    same = [np.array_equal(a.frames, b.frames) for a, b in zip(whole, damaged, strict=True)]  # type: ignore[arg-type]
    assert same[:2] == [False, False]
    assert all(same[2:])
    assert sum(len(chunk.frames) for chunk in whole if chunk.frames is not None) == 60


@pytest.mark.parametrize("trial", range(6))
def test_a_whole_packet_with_wrong_content_is_lost(packets: list[bytes], trial: int) -> None:
    from causalrope_sp.compression.bitstream import pack_chunk, read_packet

    own = read_packet(packets[2], 0, 1)
    assert own is not None
    wrong = bytes(np.random.default_rng(trial).integers(0, 256, len(own.content) + 40 * (trial % 2), np.uint8))
    chunks = list(decode(pipe_of(), [*packets[:2], pack_chunk(1, wrong), packets[3]]))
    assert sum(len(chunk.frames) for chunk in chunks if chunk.frames is not None) == FRAMES
    assert [chunk.lost for chunk in chunks] == [False, trial % 2 == 1 or chunks[1].lost, False]


def test_what_does_not_fit_is_refused_by_name(packets: list[bytes]) -> None:
    flow = CausalVideoPipeline.from_pretrained("toybox-flow")
    for pipe, change, said in (
        (pipe_of(), {"model": "00000000"}, "compressed with the model 00000000, and this one is"),
        (pipe_of(), {"height": 128}, "frames of 64×128, and the pipeline was loaded for 64×64"),
        (pipe_of(), {"exact": True}, "exact compression is computed in float64 on a CPU"),
        (pipe_of(), {"settings": {"window": 2}}, "window 2 is smaller"),
        (pipe_of(), {"settings": {"window": 13, "steps": [1000]}}, "must have at least 2"),
        (pipe_of(), {"settings": {"steps": "x"}}, "settings in the header are wrong"),
        (flow, {"settings": {"window": 13, "solver": "euler"}}, "must be renoise"),
        (pipe_of(), {"settings": {"window": 13, "first_steps": [1000.0]}}, "the same steps in all chunks"),
    ):
        header, _ = Header.read(packets[0])
        fields = {**header.__dict__, **change}
        with pytest.raises((ConfigError, InputError), match=said):
            list(decode(pipe, [Header(**fields).pack(), *packets[1:]]))
    with pytest.raises(ConfigError, match="must be renoise"):
        encoded(flow)
    with pytest.raises(ConfigError, match="rate must be above 0"):
        encoded(rate=0)
    with pytest.raises(ConfigError, match="atoms must be a power of two, not 1000"):
        encoded(atoms=1000)
    with pytest.raises(ConfigError, match="UTF-8"):
        encoded(prompt="a red \udcff circle bounces")
    for wrong in ({"rate": "x"}, {"bpp": "1"}, {"atoms": None}, {"residual": 1e-6}):
        with pytest.raises(ConfigError, match="must be"):
            encoded(**wrong)
    for packets_given in (b"".join(packets), [packets[0], None]):
        with pytest.raises((ConfigError, InputError), match="packets must be bytes"):
            decoded(packets_given)  # type: ignore[arg-type]
    with pytest.raises(PromptError):
        encoded(prompt="a dog runs")
    with pytest.raises(InputError, match="no frame"):
        list(encode(pipe_of(), iter(()), PROMPT))
