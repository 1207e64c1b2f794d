"""The memory of an open stream between two chunks: what each further session takes, beside the weights that all share.

Every number is exact, and that of the steady state, in which the window and the history are full. What else a stream
keeps, tables of angles and of timesteps, is less than a hundredth of it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import ceil

from causalrope_sp.planning.workload import Workload


@dataclass(frozen=True)
class SessionMemory:
    """The bytes of one session on the rank with most of each.

    Args:
        cache: the rings of both branches of guidance, and the undo buffer of an open chunk.
        history: the keys and values that the chunks of the history evicted.
        text: the embeddings of a prompt, and the keys and values of cross-attention that are computed from them.
        latents: the clean latents from which a window is computed anew, with their control.
        decoder: the state of the codec's decoder, and what it was before each chunk of the history.
        outputs: module outputs that are kept for reuse.
        graphs: the pool of CUDA graphs.
    """

    cache: int
    history: int
    text: int
    latents: int
    decoder: int
    outputs: int
    graphs: int

    @property
    def bytes(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


def undo_frames(work: Workload) -> int:
    """Returns how many latent frames of evicted keys and values a history has beside the undo buffer of the open chunk:
    those of its chunks, and of one that may be open again."""
    return (work.history + 1 if work.history else 0) * work.chunk_frames


def kept_frames(work: Workload) -> int:
    """Returns of how many latent frames clean latents are kept: whole chunks that reach into the window, so many chunks
    more, and those of the sink."""
    more = max(work.history, work.kept_chunks)
    return (ceil(work.window / work.chunk_frames) + more) * work.chunk_frames + work.sink_frames


def text_bytes(work: Workload, branches: int) -> int:
    """Returns the bytes of the prompts of so many branches of guidance: their embeddings, and what every layer's
    cross-attention reads."""
    config, prompts = work.config, 2 if work.guided else 1
    read = 2 * config.num_layers * config.dim * branches
    return work.batch * config.text_len * (prompts * config.text_dim + read) * work.itemsize


def latents_bytes(work: Workload, tokens: int) -> int:
    """Returns the bytes of the clean latents that a rank with so many tokens of a frame keeps, and of their control."""
    return work.batch * kept_frames(work) * tokens * work.config.embedded_dim * max(4, work.itemsize)
