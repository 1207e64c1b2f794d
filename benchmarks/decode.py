"""Times the Wan VAE's decoder against diffusers', and compares the modes of decoding: milliseconds of a pipeline a
chunk, denoising and decoding, and to the first frames. Gates: the decoders' frames agree to 1e-5, relative; the frames
of every mode differ from those of one rank with inline decoding by at most one of 255 levels.

    python benchmarks/decode.py [--vae toybox,wan2.1] [--runs 5] [--ranks 1,2] [--size 64x64] [--chunks 8]

It runs on the CPU, one thread a rank, on as many cores as there are. The floor of a chunk is its arithmetic at the rate
of a large convolution; this library's decoder does less arithmetic. `rule` is the number of decode ranks by DeDiVAE's
balance, computed from the times that one rank takes to denoise and to decode a chunk.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from decode_peers import PEERS, compare
from printed import finish, print_table, stop

from causalrope_sp import CausalVideoPipeline, SequenceParallel
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.toybox import WEIGHTS

if TYPE_CHECKING:
    import torch.distributed as dist

PROMPT = "a red circle bounces and a blue square slides right"
SKIPPED = 2  # chunks that are not timed: the first one has fewer frames, and their window is not full yet


def run_stream(
    group: dist.ProcessGroup | None, device: str, model_config: str, chunks: int, decode: Any, decoders: int
) -> tuple[dict[str, float], np.ndarray | None]:
    """Returns the milliseconds to the first frames and the median milliseconds of a chunk; on rank 0 also the video."""
    parallel = SequenceParallel(group, device=device, decode_ranks=decoders)
    pipe = CausalVideoPipeline.from_pretrained(model_config, parallel=parallel, decode=decode)
    took, parts, started = list[float](), list[np.ndarray](), time.perf_counter()
    for chunk in pipe.stream(PROMPT, num_frames=9 + 12 * (chunks - 1)):
        took.append(1e3 * (time.perf_counter() - started))
        if chunk.frames is not None:
            parts.append(chunk.frames)
        started = time.perf_counter()
    times = {"first_ms": took[0], "chunk_ms": float(np.median(took[SKIPPED:]))}
    return times, np.concatenate(parts) if parts else None


def alone(model_config: str, chunks: int) -> tuple[float, float]:
    """Returns the milliseconds that one rank takes to denoise a chunk, and to decode it."""
    pipe = CausalVideoPipeline.from_pretrained(model_config)
    decoder, spent = pipe.codec.decoder(), list[float]()
    latents = torch.randn(
        1, 3, pipe.codec.channels, pipe.settings().grid.latent_height, pipe.settings().grid.latent_width
    )
    with torch.inference_mode():
        for _ in range(chunks):
            started = time.perf_counter()
            decoder.decode(latents)
            spent.append(1e3 * (time.perf_counter() - started))
    decode_ms = float(np.median(spent[SKIPPED:]))
    return run_stream(None, "cpu", model_config, chunks, "inline", 0)[0]["chunk_ms"] - decode_ms, decode_ms


def resized(folder: Path, size: str) -> str:
    """Writes a model configuration of toybox at another size: its video is meaningless there, its times are not."""
    height, width = (int(side) for side in size.split("x"))
    model_config = json.loads((WEIGHTS / "toybox.json").read_text()) | {"height": height, "width": width}
    model_config |= {
        "transformer": str(WEIGHTS / model_config["transformer"]),
        "codec": str(WEIGHTS / model_config["codec"]),
    }
    (folder / "pipeline.json").write_text(json.dumps(model_config))
    return str(folder)


def variants(ranks: int) -> list[tuple[str, int]]:
    """Returns (decode, decode ranks) of every mode that so many ranks can run."""
    many = [("spatial", 0)] if ranks > 1 else []
    return [("inline", 0), ("overlap", 0), *many, *(("inline", decoders) for decoders in range(1, ranks))]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--vae", "vaes", default="toybox,wan2.1", show_default=True, help="Decoders to time against diffusers'.")
@click.option("--runs", default=5, show_default=True, type=click.IntRange(1), help="Chunks by each decoder.")
@click.option("--ranks", default="1,2", show_default=True)
@click.option("--size", default="64x64", show_default=True, help="Height x width in pixels.")
@click.option("--chunks", default=8, show_default=True, type=click.IntRange(SKIPPED + 1))
def main(vaes: str, runs: int, ranks: str, size: str, chunks: int) -> None:
    torch.set_num_threads(1)
    if unknown := set(vaes.split(",")) - PEERS.keys():
        stop(f"--vae: expected some of {', '.join(PEERS)}, got {', '.join(sorted(unknown))}")
    decoders = [compare(name, runs) for name in vaes.split(",")]
    print("CPU milliseconds to decode a chunk of 3 latent frames, one thread\n")
    print_table([name.replace("_", " ") for name in decoders[0]], [list(found.values()) for found in decoders])
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, RankPool() as pool:
        model_config = resized(Path(folder), size)
        _, expected = run_stream(None, "cpu", model_config, chunks, "inline", 0)
        assert expected is not None
        denoise_ms, decode_ms = alone(model_config, chunks)
        for count in (int(word) for word in ranks.split(",")):
            rule = count * decode_ms / (decode_ms + denoise_ms)
            for decode, workers in variants(count):
                times, video = pool.run(run_stream, count, model_config, chunks, decode, workers)
                off = int(np.abs(video.astype(int) - expected).max())
                assert off <= 1, f"{decode} with {workers} decode ranks of {count}: frames differ by {off}"
                mode = f"{workers} decode ranks" if workers else decode
                fps = 12e3 / times["chunk_ms"]
                rows.append({"ranks": count, "variant": mode, "rule": round(rule, 2), "fps": round(fps, 1)} | times)
    print(f"toybox at {size}, on one rank {denoise_ms:.0f} ms a chunk to denoise, {decode_ms:.0f} ms to decode\n")
    columns = ("ranks", "variant", "rule", "fps", "first ms", "chunk ms")
    print_table(columns, [[round(v, 2) if isinstance(v, float) else v for v in row.values()] for row in rows])
    times_alone = {"denoise_ms": round(denoise_ms, 2), "decode_ms": round(decode_ms, 2)}
    finish("decode", decoders=decoders, size=size, **times_alone, rows=rows)


if __name__ == "__main__":
    main()
