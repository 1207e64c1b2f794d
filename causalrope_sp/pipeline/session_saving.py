"""What a session is between two chunks, collected from all ranks and written to a file by rank 0."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from causalrope_sp.pipeline.output import ChunkDecoder
from causalrope_sp.pipeline.prompt_changes import PromptChange, prompt_at
from causalrope_sp.pipeline.saved_cache import describe_cache, gather_layers
from causalrope_sp.sampling.steered_loop import SteeredLoop
from causalrope_sp.sessions import PromptUse, SavedDecoder, SavedSession, SavedTexts, write_session


def save_session(
    path: str | PathLike[str],
    loop: SteeredLoop,
    decoder: ChunkDecoder,
    codec: str,
    prompts: Sequence[PromptChange],
    fields: Callable[[], dict[str, Any]],
    shown: int,
    *,
    cache: bool,
) -> None:
    """Writes a session from rank 0. All ranks that denoise must call it.

    Args:
        path: the file; that of rank 0 counts.
        loop: the stream of latents.
        decoder: the decoder of its chunks.
        codec: the name of its codec.
        prompts: the prompts so far.
        fields: makes the other fields of the `SavedSession`.
        shown: how many chunks were decoded.
        cache: whether keys and values and the decoder's state are saved.

    Raises:
        OutputError: the file cannot be written; every rank raises it.
        ConfigError: the session is one that cannot be saved.
        CheckpointError: the model's files cannot be read any more.
    """
    ranks, first = loop.parallel.denoisers, loop.parallel.rank == 0
    latents = _gather(loop, [part.tokens_BFSE for part in loop.kept])
    controls = [part.control_BFSE for part in loop.kept]
    control = _gather(loop, [own for own in controls if own is not None])
    described = describe_cache(loop) if cache else None
    state = decoder.frames.gather_state() if cache else None

    def describe() -> SavedSession | None:
        if not first:
            return None
        starts = {part.chunk.index: part.chunk.start for part in loop.kept}
        decoded = starts.get(loop.first_chunk + shown, loop.position[1]) - decoder.frame_range.prefix
        return SavedSession(
            **fields(),
            **_fields_of(loop, prompts),
            shown=shown,
            latents=torch.cat(latents, 1),
            control=torch.cat(control, 1) if control else None,
            cache=described,
            decoder=None if state is None else SavedDecoder(codec, decoded, state),
        )

    saved = ranks.run_collectively(describe)

    def write() -> None:
        layers = iter(()) if described is None else gather_layers(loop, described)
        if saved is None:
            deque(layers, maxlen=0)  # this rank's part in gathering them
        else:
            write_session(path, saved, layers)

    ranks.run_collectively(write)


def _fields_of(loop: SteeredLoop, prompts: Sequence[PromptChange]) -> dict[str, Any]:
    """The fields of a `SavedSession` that say where the stream stands, and its texts."""
    chunks = tuple(part.chunk for part in loop.kept)
    made = {chunk.index - loop.first_chunk for chunk in chunks}
    needed = {0, prompts[-1].prompt_id, *(prompt_at(prompts, n).prompt_id for n in made if n >= 0)}
    return {
        "first_chunk": loop.first_chunk,
        "next_chunk": loop.position[0],
        "next_frame": loop.position[1],
        "prompts": tuple(PromptUse(p.first_chunk, p.prompt, p.prompt_id) for p in prompts),
        "embeds": {p.prompt_id: p.embeds.cpu() for p in prompts if p.prompt_id in needed and p.embeds is not None},
        "texts": _texts_of(loop),
        "chunks": chunks,
        "shots": loop.branches.branches[0].stream.cache.window.shots,
    }


def _gather(loop: SteeredLoop, parts: Sequence[Tensor]) -> list[Tensor]:
    """Tokens of chunks as whole latent frames, chunk by chunk, in host memory on rank 0."""
    found, grid = list[Tensor](), loop.context.grid
    for tokens_BFSE in parts:
        whole = grid.unpatchify(loop.parallel.gather_tokens(tokens_BFSE, grid))
        if loop.parallel.rank == 0:
            found.append(whole.cpu())
    return found


def _texts_of(loop: SteeredLoop) -> SavedTexts | None:
    """The texts of a change over several chunks that is not over."""
    if not loop.later_texts:
        return None
    later, (_, recache, recache_sink) = [text for text, *_ in loop.later_texts], loop.later_texts[0]
    texts = tuple(text.cpu() for text in (loop.text, *later))
    return SavedTexts(texts, recache, recache_sink)
