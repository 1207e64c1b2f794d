"""Streams many chunks through a codec: milliseconds a chunk, and the growth of the process's peak memory. Gate: the
frames and the latents of all chunks are bit for bit those of one call.

    python benchmarks/codec_streaming.py [--codec-weights FILE] [--chunks 40] [--latent 8x8]
"""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from causalrope_sp.codec import load_codec
from causalrope_sp.toybox import WEIGHTS

GATE_CHUNKS = 4


@click.command()
@click.option("--codec-weights", type=click.Path(path_type=Path), default=WEIGHTS / "codec", help="A file or folder.")
@click.option("--chunks", default=40, show_default=True)
@click.option("--chunk-frames", default=3, show_default=True, help="Latent frames a chunk.")
@click.option("--latent", default="8x8", show_default=True, help="Height x width of the latent.")
@click.option("--threads", default=torch.get_num_threads(), show_default="all")
def main(codec_weights: Path, chunks: int, chunk_frames: int, latent: str, threads: int) -> None:
    torch.set_num_threads(threads)
    codec = load_codec(codec_weights)
    height, width = (int(side) for side in latent.split("x"))
    latents = torch.randn(1, chunk_frames * GATE_CHUNKS, codec.channels, height, width)
    video = codec.decoder().decode(latents)
    decoder, encoder = codec.decoder(), codec.encoder()
    assert torch.equal(torch.cat([decoder.decode(part) for part in latents.split(chunk_frames, 1)], 1), video)
    stride = codec.temporal_stride
    first = 1 + stride * (chunk_frames - 1)
    cut = [first] + [stride * chunk_frames] * (GATE_CHUNKS - 1)
    encoded = torch.cat([encoder.encode(part) for part in video.split(cut, 1)], 1)
    assert torch.equal(encoded, codec.encoder().encode(video))

    chunk = latents[:, :chunk_frames]
    pixels = video[:, -stride * chunk_frames :].contiguous()
    encoder = codec.encoder()
    encoder.encode(pixels[:, :1])
    runs = {"decode": (codec.decoder().decode, chunk), "encode": (encoder.encode, pixels)}
    rate = matmul_rate()
    print(f"gate: {GATE_CHUNKS} chunks are bit for bit one call, {codec.name} codec, {threads} threads")
    results = {}
    other = codec.encoder()
    other.encode(pixels[:, :1])
    again = {"decode": codec.decoder().decode, "encode": other.encode}
    for name, (step, x) in runs.items():
        step(x)
        flop = flops(codec, again[name], x)
        floor = 1000 * flop / rate
        print(f"{name}: floor {floor:.1f} ms a chunk ({flop / 1e9:.2f} GFLOP at {rate / 1e9:.0f} GFLOP/s)")
        results[name] = {"floor_ms": round(floor, 2), **timed(step, x, chunks)}
    print(json.dumps({"codec": codec.name, "latent": latent, "chunk_frames": chunk_frames, "chunks": chunks} | results))


def flops(codec: Any, step: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Counts the FLOPs of a steady chunk where autograd records, since there each layer is one convolution."""
    module = getattr(codec, "vae", None) or codec.model
    module.requires_grad_(True)
    step(x)
    with FlopCounterMode(display=False) as counter:
        step(x)
    module.requires_grad_(False)
    return counter.get_total_flops()


@torch.inference_mode()
def timed(step: Callable[[Tensor], Tensor], x: Tensor, chunks: int) -> dict[str, float]:
    """Returns the median milliseconds of the first and of the last quarter of the chunks, and by how many MiB the peak
    memory of the process grew in between."""
    took, peak = list[float](), 0
    for n in range(chunks):
        start = time.perf_counter()
        step(x)
        took.append(1000 * (time.perf_counter() - start))
        if n == chunks // 4:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    quarter = max(1, chunks // 4)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    first, last = statistics.median(took[:quarter]), statistics.median(took[-quarter:])
    print(f"  first quarter {first:.1f} ms a chunk, last quarter {last:.1f} ms, peak memory +{grown / 1024:.1f} MiB")
    return {
        "first_quarter_ms": round(first, 2),
        "last_quarter_ms": round(last, 2),
        "peak_grew_mib": round(grown / 1024, 2),
    }


def matmul_rate() -> float:
    """Measures the FLOP a second of a large float32 product."""
    a, best = torch.randn(1024, 1024), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


if __name__ == "__main__":
    main()
