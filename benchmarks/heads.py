"""Windows of heads on a CPU: a denoise pass with Forcing-KV's published split against the whole window.

    python benchmarks/heads.py            # D 768, 6 heads, 240 tokens a frame, window 21, 12 layers of random weights
    python benchmarks/heads.py --rows 2   # and bands of rows for the heads whose windows stay whole

The velocity of the pass is first compared with that of a stream of whole windows whose every head attends under a mask
of its own. Times are medians of passes that alternate between both streams.
"""

from __future__ import annotations

import json
import statistics
import time

import click
import torch
from masked_attention import attending, windows

from causalrope_sp import Chunk, DiTConfig, LatentGrid, StreamConfig
from causalrope_sp.attention.build import build_strategy
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.config import SamplerConfig
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.distributed.layout import parse_strategy
from causalrope_sp.grid import Shard
from causalrope_sp.heads import HeadPolicy
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.planning.counts import attention_flops
from causalrope_sp.planning.workload import Workload
from causalrope_sp.sampling.pass_inputs import Part
from causalrope_sp.sampling.stream import CausalStream

# how many of the 12 heads of each of Self-Forcing's 30 layers Forcing-KV (arXiv 2605.09681) calls static
STATIC = (5, 4, 5, 4, 3, 8, 4, 6, 8, 4, 3, 4, 8, 1, 6, 1, 3, 8, 1, 4, 8, 6, 1, 3, 1, 2, 5, 6, 6, 6)
WINDOW, SINK, CHUNK, SHORT = 21, 1, 3, 5  # latent frames; SHORT: the sink, the newest frame and the chunk
GRID = LatentGrid(12, 20)
ONE = parse_strategy("ulysses", 1)


def split(
    layers: int,
    heads: int,
    share: float | None = None,
    static: int = SHORT,
    dynamic: int | None = None,
    rows: int | None = None,
) -> HeadPolicy:
    """The published split of so many layers, evenly picked, with layer 0 whole.

    Args:
        layers: the layers of the model.
        heads: its heads.
        share: the share of the heads of every layer but the first that are static, in place of the published ones.
        static: the window of a static head, in latent frames.
        dynamic: that of the other heads; None for the whole window.
        rows: the rows of their bands; None for whole frames.
    """
    picked = [STATIC[layer * len(STATIC) // layers] / 12 if share is None else share for layer in range(layers)]
    counts = [round(each * heads) for each in picked[1:]]

    def table(of_static: int | None, others: int | None) -> tuple[tuple[int | None, ...], ...]:
        return (None,) * heads, *((of_static,) * count + (others,) * (heads - count) for count in counts)

    return HeadPolicy(table(static, dynamic), table(None, rows))


def opened(model: CausalDiT, policy: HeadPolicy | None) -> tuple[CausalStream, Workload]:
    """A stream whose window is full, and its sizes."""
    stream = StreamConfig(WINDOW, SINK, CHUNK, heads=policy)
    work = Workload.of(model.config, GRID, stream, SamplerConfig(), WINDOW, itemsize=4)
    strategy = build_strategy(SequenceParallel.single(device="cpu"), ONE, GRID, work.head_rings(1))
    text = torch.zeros(1, model.config.text_len, model.config.text_dim)
    opened = CausalStream(model, text, GRID, SlidingWindow(WINDOW, SINK), Shard(GRID), strategy)
    generator = torch.Generator().manual_seed(0)
    for n in range(WINDOW // CHUNK + 1):
        x = torch.randn(1, CHUNK, GRID.tokens, model.config.token_dim, generator=generator)
        opened.commit(Part(Chunk(n, n * CHUNK, CHUNK), x, 0.0))
    return opened, work


@click.command()
@click.option("--layers", default=12, show_default=True, help="Give the model this many layers.")
@click.option("--ffn", default=3072, show_default=True, help="Give the feed-forwards this width.")
@click.option("--share", type=float, help="Shorten this share of the heads. The default is the published split.")
@click.option("--rows", type=click.IntRange(1), help="Let the other heads see bands of this many of the 12 rows.")
@click.option("--passes", default=7, show_default=True, help="Measure this many passes of each stream.")
@torch.inference_mode()
def main(layers: int, ffn: int, share: float | None, rows: int | None, passes: int) -> None:
    """Measures a denoise pass with windows of heads against one with whole windows."""
    torch.manual_seed(0)
    model = CausalDiT(DiTConfig(768, ffn, 6, layers, text_dim=64, text_len=64, in_channels=16)).eval()
    policy = split(layers, 6, share, rows=rows)
    chunk = Chunk(WINDOW // CHUNK + 1, WINDOW + CHUNK, CHUNK)
    x = torch.randn(1, CHUNK, GRID.tokens, model.config.token_dim)
    with attending(windows(policy, WINDOW, SINK, GRID)):
        dense, whole = opened(model, None)
        exact = dense.denoise(chunk, x, 1000.0)
    sparse, short = opened(model, policy)
    found = sparse.denoise(chunk, x, 1000.0)
    error = float((found - exact).norm() / exact.norm())
    assert error < 1e-5, f"the velocity differs from that of masks by {error:.1e}"
    times: dict[str, list[float]] = {"whole": [], "heads": []}
    for _ in range(passes):
        for name, stream in (("whole", dense), ("heads", sparse)):
            started = time.perf_counter()
            stream.denoise(chunk, x, 1000.0)
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(each) for name, each in times.items()}
    flops = [attention_flops(ONE, work, 0, CHUNK, WINDOW) for work in (whole, short)]
    print(
        json.dumps(
            {
                "error": error,
                "seconds": {name: round(each, 4) for name, each in medians.items()},
                "speedup": round(medians["whole"] / medians["heads"], 3),
                "attention_flops": round(flops[1] / flops[0], 4),
                "cache_bytes": round(sparse.cache.bytes / dense.cache.bytes, 4),
            }
        )
    )


if __name__ == "__main__":
    main()
