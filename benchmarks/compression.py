"""Rate and distortion of the codec with toybox as its prior, beside x264, x265, SVT-AV1 and quantized latents.

    python benchmarks/compression.py [--scenes 24] [--frames 49] [--plot docs/compression.png]

Scenes are rendered from texts and starts that no training has seen. Every bit is counted: header, text, starts, chunk
numbers and checksums. The others' are counted with their container (mp4) and without (the packets alone). PSNR and SSIM
are of RGB; `judge` is the share of objects whose colour, shape and motion are right. The last line is JSON.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import av
import click
import constriction
import numpy as np
import torch
from printed import finish, print_table
from torch import Tensor
from torch.nn.functional import conv2d

from causalrope_sp import CausalVideoPipeline
from causalrope_sp.compression import decode, encode
from causalrope_sp.toybox.judge import judge, summarize
from causalrope_sp.toybox.prompts import SceneSpec
from causalrope_sp.toybox.scenes import START_VARIABLES, random_scene, render

SEED, SIZE, FPS = 24_000, 64, 16
RATES = (10.0, 1.0, 0.1, 0.03)
CRFS, SVT_CRFS = (36, 44, 51), (46, 58, 63)
QUIET = {"preset": "placebo", "x265-params": "log-level=none"}
PEERS = {  # encoder: its options, pixel formats and qualities
    "libx264": ({"preset": "placebo"}, ("yuv420p", "yuv444p"), CRFS),
    "libx265": (QUIET, ("yuv420p", "yuv444p"), CRFS),
    "libsvtav1": ({"preset": "0"}, ("yuv420p",), SVT_CRFS),
}
LARGEST = 1 << 14  # of a quantized latent
AT = (25.0, 28.0, 30.0)  # dB at which rates are compared


Scenes = list[tuple[SceneSpec, str, np.ndarray]]


def scenes_of(count: int, frames: int) -> Scenes:
    """Scenes with the texts that tell them, starts in hundredths, and their videos."""
    generator, found = torch.Generator().manual_seed(SEED), []
    for _ in range(count):
        spec, starts = random_scene(generator), torch.rand(START_VARIABLES, generator=generator)
        video = render([spec], starts[None], torch.arange(frames).float(), SIZE)[0].movedim(0, -1)
        numbers = " ".join(str(int(100 * float(start))) for start in starts[: 3 * len(spec.objects)])
        found.append((spec, f"{spec.prompt()} at {numbers}", video.mul(255).round().byte().numpy()))
    return found


def psnr(frames: np.ndarray, truth: np.ndarray) -> float:
    return 10 * math.log10(255**2 / max(1e-9, float(np.square(frames.astype(float) - truth).mean())))


def ssim(frames: np.ndarray, truth: np.ndarray) -> float:
    """Wang et al. 2004, a Gaussian window of 11 pixels and σ 1.5, mean over frames and channels."""
    line = torch.exp(-(torch.arange(11.0) - 5).square() / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2)[None, None]
    x, y = (torch.from_numpy(z).movedim(-1, 1).flatten(0, 1)[:, None].double() for z in (frames, truth))

    def mean(z: Tensor) -> Tensor:
        return conv2d(z, window.double())

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


Result = tuple[float, float, np.ndarray]  # bytes with the container, bytes without, frames
Code = Callable[[str, np.ndarray], Result]  # of a prompt and a video


def by_prior(pipe: CausalVideoPipeline, prompt: str, video: np.ndarray, **options: Any) -> Result:
    packets = list(encode(pipe, video, prompt, **options))
    size = sum(map(len, packets))
    return size, size, np.concatenate([np.asarray(chunk.frames) for chunk in decode(pipe, packets)])


def coded_bytes(encoder: str, data: bytes) -> int:
    """The bytes of a packet or of parameter sets, but for what x264 and x265 tell of themselves (SEI)."""
    if encoder == "libsvtav1" or b"\0\0\1" not in data:
        return len(data)
    units = data.split(b"\0\0\1")[1:]
    kinds = [unit[0] & 31 if encoder == "libx264" else unit[0] >> 1 & 63 for unit in units]
    return sum(3 + len(unit.rstrip(b"\0")) for unit, kind in zip(units, kinds, strict=True) if kind not in (6, 39, 40))


def by_peer(encoder: str, options: dict[str, str], pixels: str, crf: int, _prompt: str, video: np.ndarray) -> Result:
    file, bare = io.BytesIO(), 0
    with av.open(file, "w", "mp4") as container:
        stream: Any = container.add_stream(encoder, FPS, options={**options, "crf": str(crf)})
        stream.width = stream.height = SIZE
        stream.pix_fmt = pixels
        for number in range(len(video) + 1):
            frame = None
            if number < len(video):
                frame = av.VideoFrame.from_ndarray(video[number], "rgb24")
                frame = frame.reformat(format=pixels, dst_colorspace="ITU709")
            for packet in stream.encode(frame):
                bare += coded_bytes(encoder, bytes(packet))
                container.mux(packet)
        bare += coded_bytes(encoder, bytes(stream.codec_context.extradata or b""))
    file.seek(0)
    with av.open(file, "r") as coded:
        found = [f.reformat(format="rgb24", src_colorspace="ITU709").to_ndarray() for f in coded.decode(video=0)]
    return len(file.getvalue()), bare, np.stack(found)


def by_latents(pipe: CausalVideoPipeline, step: float, _prompt: str, video: np.ndarray) -> Result:
    """Latents predicted from the frame before by one factor a channel, quantized, with a Laplace distribution each."""
    with torch.inference_mode():
        pixels = torch.from_numpy(video).movedim(3, 1)[None].float() / 127.5 - 1
        latents = pipe.codec.encoder().encode(pixels)[0].double()
        size, before, drawn = 8.0, torch.zeros_like(latents[0]), []
        follow = (latents[1:] * latents[:-1]).sum((0, 2, 3)) / latents[:-1].square().sum((0, 2, 3))
        factor = (follow * 127).round().clamp(-128, 127)[:, None, None] / 127
        for frame in latents:
            levels = ((frame - factor * before) / step).round()
            size += 2.0 * len(levels)
            for channel in levels.numpy():
                scale = max(0.05, float(abs(channel).mean()))
                coder = constriction.stream.queue.RangeEncoder()
                model = constriction.stream.model.QuantizedLaplace(-LARGEST, LARGEST, 0.0, scale)
                coder.encode(channel.ravel().clip(-LARGEST, LARGEST).astype(np.int32), model)
                size += 4 * len(coder.get_compressed())
            before = factor * before + step * levels
            drawn.append(before)
        frames = pipe.codec.decoder().decode(torch.stack(drawn)[None].float())[0].clamp(-1, 1)
    return size, size, (frames * 127.5 + 127.5).round().byte().movedim(1, -1).numpy()


def rate_at(curve: list[dict[str, Any]], key: str, quality: float) -> float | None:
    """Bits a pixel at a PSNR, between two points of a curve in the logarithm of the rate; None outside it."""
    points = sorted((point["psnr"], math.log(point[key])) for point in curve)
    for (low, a), (high, b) in pairwise(points):
        if low <= quality <= high:
            return math.exp(a + (b - a) * (quality - low) / max(1e-9, high - low))
    return None


def measured(scenes: Scenes, code: Code) -> dict[str, float]:
    """Means over the scenes."""
    bpp, bare, quality, alike, verdicts, started = [], [], [], [], [], time.process_time()
    for spec, prompt, video in scenes:
        whole, packets, frames = code(prompt, video)
        bpp.append(8 * whole / video[..., 0].size)
        bare.append(8 * packets / video[..., 0].size)
        quality.append(psnr(frames, video))
        alike.append(ssim(frames, video))
        verdicts += judge(frames, spec)
    means = {"bpp": bpp, "bare": bare, "psnr": quality, "ssim": alike}
    seconds = (time.process_time() - started) / len(scenes)
    return {n: float(np.mean(v)) for n, v in means.items()} | summarize(verdicts) | {"seconds": seconds}


@click.command()
@click.option("--scenes", default=24, show_default=True)
@click.option("--frames", default=49, show_default=True)
@click.option("--plot", help="Draw the curves and frames at equal rate to this file.")
def main(scenes: int, frames: int, plot: str | None) -> None:
    torch.set_num_threads(1)
    pipe, given = CausalVideoPipeline.from_pretrained("toybox"), scenes_of(scenes, frames)
    curves: dict[str, list[dict[str, Any]]] = {}
    wrong = {prompt: given[n - 1][1] for n, (_, prompt, _) in enumerate(given)}
    controls: dict[str, Code] = {
        "text alone": partial(by_prior, pipe, most=0),
        "another scene's text": lambda p, v: by_prior(pipe, wrong[p], v),
        "codec ceiling": partial(by_latents, pipe, 1e-3),
    }
    lines = []

    def tell(name: str, setting: object, point: dict[str, float]) -> None:
        curves.setdefault(name, []).append({**point, "setting": setting})
        shown = (f"{point[key]:.4f}" for key in ("bpp", "bare"))
        rest = (f"{point[key]:.3f}" for key in ("ssim", "color", "shape", "motion", "seconds"))
        lines.append((name, setting, *shown, f"{point['psnr']:.2f}", *rest))
        print(lines[-1], flush=True)

    for rate in RATES:
        tell("ours", f"rate {rate:g}", measured(given, partial(by_prior, pipe, rate=rate)))
    for name, code in controls.items():
        tell(name, "", measured(given, code))
    for encoder, (options, formats, qualities) in PEERS.items():
        for pixels in formats:
            for crf in qualities:
                point = measured(given, partial(by_peer, encoder, options, pixels, crf))
                tell(f"{encoder} {pixels}", f"crf {crf}", point)
    for step in (0.4, 0.8, 1.2):
        tell("quantized latents", f"step {step:g}", measured(given, partial(by_latents, pipe, step)))
    columns = ["coder", "setting", "bpp", "without container", "PSNR", "SSIM", "colour", "shape", "motion", "seconds"]
    print_table(columns, lines)
    at = {name: [rate_at(curve, key, db) for db in AT for key in ("bpp", "bare")] for name, curve in curves.items()}
    heads = [f"{db:g} dB, {kind}" for db in AT for kind in ("whole", "bare")]
    shown = ((name, *(f"{rate:.4f}" if rate else None for rate in rates)) for name, rates in at.items() if any(rates))
    print_table(["bits a pixel at", *heads], shown)
    if plot is not None:
        draw(plot, curves, pipe, given[1])
    finish("compression", scenes=scenes, frames=frames, curves=curves, rates=at)


def draw(path: str, curves: dict[str, list[dict[str, Any]]], pipe: CausalVideoPipeline, scene: Any) -> None:
    """The curves, and below them frames of one scene at about the same rate."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(9, 7))
    grid = figure.add_gridspec(3, 6, height_ratios=[3, 1, 1], hspace=0.45)
    axes = figure.add_subplot(grid[0, :])
    for name, curve in curves.items():
        if len(curve) > 1:
            axes.plot([p["bare"] for p in curve], [p["psnr"] for p in curve], "o-", ms=3, label=name)
    axes.set_xscale("log")
    axes.set_xlabel("bits a pixel, without a container")
    axes.set_ylabel("PSNR, dB")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    _, prompt, video = scene
    ours = by_prior(pipe, prompt, video, rate=0.3)
    peers = [by_peer("libx264", PEERS["libx264"][0], "yuv420p", crf, prompt, video) for crf in range(28, 52, 2)]
    peer = min(peers, key=lambda found: abs(found[1] - ours[1]))
    for row, (name, found) in enumerate((("ours", ours), ("x264", peer)), 1):
        for column, number in enumerate(np.linspace(0, len(video) - 1, 5).astype(int)):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(found[2][number])
            axes.axis("off")
            axes.set_title(
                f"{name}, {8 * found[1] / video[..., 0].size:.4f} bpp" if not column else "", fontsize=7, loc="left"
            )
    for row in (1, 2):
        axes = figure.add_subplot(grid[row, 5])
        axes.imshow(video[-1])
        axes.axis("off")
        axes.set_title("the video itself", fontsize=7)
    figure.savefig(path, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
