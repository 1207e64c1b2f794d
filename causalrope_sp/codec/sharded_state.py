"""The state of a decoder on spatial shards, gathered to that of a whole picture and cut again, for other ranks."""

from __future__ import annotations

from causalrope_sp.codec.conv_state import ConvState
from causalrope_sp.distributed.halo import SpatialShards


def gather_state(spatial_shards: SpatialShards | None, state: ConvState) -> ConvState | None:
    """Gathers the state of a decoder whose ranks share a picture. Every one of them must call it.

    Args:
        spatial_shards: how the ranks share a picture; None if one rank decodes it.
        state: what this rank's stream has kept.

    Returns:
        On the first of the ranks the state of a stream that decodes whole pictures, in host memory, one tensor after
        the other so that the device holds one more than before; None on the others.

    Raises:
        RankLostError: the collective failed.
    """
    if spatial_shards is None:
        return state.to("cpu")
    frames = {}
    for name in sorted(state.frames):  # a state that was read from a file may have another order
        whole = spatial_shards.gather_to_first(state.frames[name], "decoder state")
        if whole is not None:
            frames[name] = whole.cpu()
    return ConvState(frames) if spatial_shards.first else None


def cut_state(spatial_shards: SpatialShards | None, whole: ConvState) -> ConvState:
    """Cuts this rank's shard out of the state of a stream that decodes whole pictures.

    Args:
        spatial_shards: how the ranks share a picture; None if one rank decodes it.
        whole: the state, of a picture of the same size.

    Returns:
        The state of this rank's shard, as copies, so that the whole need not be kept.
    """
    if spatial_shards is None:
        return whole
    return ConvState({name: spatial_shards.mine(frames).clone() for name, frames in whole.frames.items()})
