"""Small saved sessions, with numbers of every dtype that one may hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causalrope_sp.codec.conv_state import ConvState
from causalrope_sp.config import DiTConfig, SamplerConfig, StreamConfig
from causalrope_sp.grid import Chunk
from causalrope_sp.sessions import (
    PromptUse,
    SavedBranch,
    SavedCache,
    SavedDecoder,
    SavedSession,
    SavedTexts,
    write_session,
)

DIGEST = "0123456789abcdef"
MODEL = DiTConfig(
    dim=30, ffn_dim=8, num_heads=3, num_layers=2, text_dim=4, text_len=5, in_channels=3, patch_size=(1, 1, 1)
)
HERE: dict[str, Any] = {  # what `check_fits` is given for the sessions that are made here
    "model_digest": DIGEST,
    "loras": ("style.safetensors (weight 0.5)",),
    "model": MODEL,
    "stride": 8,
    "codec": "wan",
}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def small_session(dtype: torch.dtype = torch.float32, **changes: Any) -> SavedSession:
    """Makes a session before its chunk 6, at latent frame 12, one of which is not decoded: three prompts, a change of
    the prompt that is not over, a sink, a gap behind it, and a second shot; no cache and no decoder."""
    saved = SavedSession(
        model_digest=DIGEST,
        height=16,
        width=24,
        dtype=str(dtype).removeprefix("torch."),
        stream=StreamConfig(window=7, sink=1, chunk_frames=2, rope="relative"),
        sampler=SamplerConfig(steps=(1000, 500), guidance_scale=3.0),
        seed=-5,
        text_seed=3,
        num_frames=None,
        first_chunk=1,
        shown=4,
        next_chunk=6,
        next_frame=12,
        prompts=(PromptUse(0, "a red circle", 0), PromptUse(2, None, 3), PromptUse(6, "ein Würfel fällt", 4)),
        embeds={3: random(1, 5, 4, dtype=dtype, seed=1), 4: random(1, 5, 4, dtype=dtype, seed=2)},
        latents=random(1, 7, 3, 2, 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32),
        chunks=(Chunk(0, 0, 1), Chunk(3, 6, 2), Chunk(4, 8, 2), Chunk(5, 10, 2)),
        texts=SavedTexts(tuple(random(1, 5, 4, dtype=dtype, seed=n) for n in (5, 6, 2)), True, False),
        negative_prompt="blurred",
        negative_embeds=random(1, 5, 4, dtype=dtype, seed=3),
        shots=(0, 10),
        conditioning=random(1, 1, 3, 2, 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32),
        context_frames=1,
        reuse="a policy",
        loras=("style.safetensors (weight 0.5)",),
        history=2,
        kept_chunks=9,
    )
    return replace(saved, **changes)


def small_cache(dtype: torch.dtype = torch.float32) -> SavedCache:
    """The cache of `small_session`, with guidance; the branches hold different frames."""
    return SavedCache(
        branches=(
            SavedBranch("conditional", (0, 6, 8, 9), 6, 0, (10, 12)),
            SavedBranch("unconditional", (10, 0, 9, 11, 8)),
        ),
        layers=2,
        batch=1,
        tokens=6,
        heads=3,
        head_dim=10,
        dtype=dtype,
    )


def layers_of(cache: SavedCache) -> Iterator[Tensor]:
    """Keys and values of a cache."""
    for number, branch in enumerate(cache.branches):
        for layer in range(cache.layers):
            yield random(*cache.layer_shape(branch), dtype=cache.dtype, seed=10 + number * cache.layers + layer)


def small_decoder(dtype: torch.dtype = torch.float32) -> SavedDecoder:
    """A decoder's state, of two layers."""
    state = {"decoder.a": random(1, 3, 2, 2, 3, dtype=dtype), "decoder.b.0": random(1, 2, 2, 4, 6, dtype=dtype)}
    return SavedDecoder("wan", 12, ConvState(state))


def whole_session(dtype: torch.dtype = torch.bfloat16) -> SavedSession:
    """Makes a session with a cache and a decoder's state."""
    return small_session(dtype, cache=small_cache(dtype), decoder=small_decoder())


def write_whole(path: Path, dtype: torch.dtype = torch.bfloat16) -> SavedSession:
    """Writes `whole_session` to a file."""
    saved = whole_session(dtype)
    write_session(path, saved, layers_of(small_cache(dtype)))
    return saved
