"""What policies of sparse attention leave of a stream's work, memory and transfers, by the formulas of `plan`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from heads import split

from causalrope_sp import LatentGrid, SamplerConfig, StreamConfig
from causalrope_sp.codec.wan_vae_config import PUBLISHED
from causalrope_sp.config import PRESETS
from causalrope_sp.distributed.layout import parse_strategy
from causalrope_sp.heads import HeadPolicy
from causalrope_sp.heads.policy import SKIP
from causalrope_sp.planning.cost import plan
from causalrope_sp.planning.counts import cache_bytes, chunk_flops
from causalrope_sp.planning.machines import H100
from causalrope_sp.planning.workload import Workload

ALONE = parse_strategy("single", 1)
STRATEGIES = ("ulysses", "gather-kv", "shard-kv")
COLUMNS = ("attention FLOPs", "cache", "received: ulysses", "gather-kv", "shard-kv", "ρ")
MODELS, SIZES, RANKS = ("wan2.1-1.3b", "wan2.1-14b"), ((480, 832), (720, 1280)), 8
DYNAMIC = 11  # frames: as many as Forcing-KV's dynamic heads keep of 21, 5 and a third of the other 16
ROWS = 4  # of bands
WHOLE, SHORTENED = "published split", f"published split, dynamic heads {DYNAMIC} frames, int8"
TARGETS = {"attention_flops": 0.6, "cache": 0.3}


def attention_of_chunk(work: Workload) -> int:
    """The FLOPs of self-attention in a steady chunk, its context pass included: what is left out if no head attends."""
    config = work.config
    nothing = HeadPolicy(((SKIP,) * config.num_heads,) * config.num_layers)
    return chunk_flops(ALONE, work, 0) - chunk_flops(ALONE, replace(work, heads=nothing), 0)


def shares(work: Workload, dense: Workload, ranks: int) -> dict[str, Any]:
    """Returns which shares of a dense stream a policy leaves of attention FLOPs, of the cache, and of the bytes that a
    rank receives in a chunk; and ρ of `ulysses`."""
    plans, before = ({each.strategy: each for each in plan(of, ranks, H100)} for of in (work, dense))
    return {
        "attention_flops": attention_of_chunk(work) / attention_of_chunk(dense),
        "flops": chunk_flops(ALONE, work, 0) / chunk_flops(ALONE, dense, 0),
        "cache": cache_bytes(ALONE, work, 0) / cache_bytes(ALONE, dense, 0),
        "received": {name: plans[name].bytes_per_chunk / before[name].bytes_per_chunk for name in STRATEGIES},
        "head_imbalance": plans["ulysses"].head_imbalance,
    }


def cells(row: dict[str, Any]) -> list[str | None]:
    """The cells of `COLUMNS`; none of a row without formulas."""
    if "cache" not in row:
        return [None] * len(COLUMNS)
    received = (f"{row['received'][name]:.3f}" for name in STRATEGIES)
    return [f"{row['attention_flops']:.2f}", f"{row['cache']:.2f}", *received, f"{row['head_imbalance']:.3f}"]


def full_size_policies(layers: int, heads: int) -> dict[str, dict[str, Any]]:
    """The options of `StreamConfig`, by name."""
    whole, shortened = ({"heads": split(layers, heads, dynamic=frames)} for frames in (None, DYNAMIC))
    bands = {"heads": split(layers, heads, rows=ROWS)}
    int8, similar = {"cache": "int8"}, {"similar_frames": 4}
    return {
        "int8": int8,
        "similar_frames=4, int8": similar | int8,
        WHOLE: whole,
        f"{WHOLE}, int8": whole | int8,
        f"{WHOLE}, similar_frames=4, int8": whole | similar | int8,
        f"{WHOLE}, dynamic heads bands of {ROWS} rows, int8": bands | int8,
        SHORTENED: shortened | int8,
    }


def full_size() -> list[dict[str, Any]]:
    """Rows of published sizes: window 21, sink 1, chunks of 3, 4 steps, bfloat16, on 8 ranks."""
    rows = []
    for name in MODELS:
        config = PRESETS[name]
        for height, width in SIZES:
            grid = LatentGrid.from_pixels(height, width, PUBLISHED[config.in_channels].scale_factor_spatial)
            options = full_size_policies(config.num_layers, config.num_heads)
            streams = [StreamConfig(21, 1, 3, **each) for each in ({}, *options.values())]
            dense, *works = (Workload.of(config, grid, stream, SamplerConfig(), 21) for stream in streams)
            for label, work in zip(options, works, strict=True):
                size = {"model": name, "height": height, "width": width}
                rows.append({**size, "policy": label, **shares(work, dense, RANKS)})
    return rows


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of 1.3B at 480×832 with windows and int8, with whether each target is met."""
    found = []
    for row in rows:
        if (row["model"], row["height"]) == ("wan2.1-1.3b", 480) and row["policy"] in (f"{WHOLE}, int8", SHORTENED):
            met = {name: row[name] <= most for name, most in TARGETS.items()}
            found.append({"policy": row["policy"], **{name: row[name] for name in TARGETS}, "met": met})
    return found
