"""The latents of a whole video, for a caller that decodes them itself."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing

import torch
from torch import Tensor

from causalrope_sp.errors import CausalRopeError
from causalrope_sp.pipeline.decoding import frames_of, run_decode_worker
from causalrope_sp.pipeline.generation import Generation
from causalrope_sp.pipeline.numerics import own_numerics
from causalrope_sp.sampling.chunk import LatentChunk


def whole_latents(call: Generation) -> Tensor:
    """Returns the latent frames that a video decodes from, (1, F, C, H, W); an empty tensor on decode ranks.

    Args:
        call: the call that opens the stream.
    """
    if call.parallel.decodes:
        for _ in run_decode_worker(call.codec, call.parallel, call.grid, call.turns):
            pass
        return torch.empty(0)
    generated, done, chunks = list[Tensor](), 0, _latent_chunks(call)
    with call.turns.taken(), closing(chunks):
        decoder = frames_of(call.codec, call.parallel, call.grid, "inline", call.turns)
        try:
            while done != call.frame_range.length:
                with own_numerics(), torch.inference_mode(), call.turns.chunk():
                    part = next(chunks)
                generated.append(part.latents)
                done = call.frame_range.stop(part.chunk.stop)
            part.check_finite()
        except CausalRopeError:
            decoder.close()  # an error of all ranks; decode ranks wait for the end of the video
            raise
        decoder.close()
    latents = call.conditioning.latents
    image = [] if latents is None or call.conditioning.context_frames else [latents.to(generated[0])]
    return torch.cat([*image, *generated], 1)[:, : call.frame_range.latent_length(done)]


def _latent_chunks(call: Generation) -> Generator[LatentChunk]:
    if call.is_parallel:
        yield from call.parallel_chunks()
        return
    loop = call.open_loop()
    while loop.next_chunk is not None:
        yield loop.step()
