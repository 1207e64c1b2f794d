"""What a whole video costs each rank: FLOPs, collectives and memory, from sizes alone.

Counts are exact and tested against torch's FLOP counter and `CommStats`; times are counts divided by a machine's rates.

Shapes: B batch entries of a pass on a rank, F frames of the video, f those of a rank, S tokens of a frame, s those of a
rank, L text tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from causalrope_sp.grid import shares
from causalrope_sp.planning.machines import Machine
from causalrope_sp.reuse.policy import Kind, ReusePlan, ReusePolicy
from causalrope_sp.spatiotemporal.model import MLP_RATIO, SpatioTemporalDiT


@dataclass(frozen=True)
class VideoWork:
    """A whole video.

    Args:
        model: the model, which may be on the meta device.
        frames: F, latent frames.
        tokens: S.
        text: L of every text.
        batch: B over both branches of guidance.
        timesteps: of the passes.
        itemsize: bytes of a number.
        reuse: the reuse policy, or None.
    """

    model: SpatioTemporalDiT
    frames: int
    tokens: int
    text: int
    batch: int
    timesteps: tuple[float, ...]
    itemsize: int
    reuse: ReusePolicy | None = None

    @property
    def layers(self) -> int:
        """How many layers the model has."""
        return len(self.model.spatial)

    @property
    def dim(self) -> int:
        """D."""
        return self.model.head.in_features

    @property
    def plan(self) -> ReusePlan:
        """Which outputs the passes reuse."""
        policy = self.reuse or ReusePolicy()
        return ReusePlan(policy, self.timesteps, self.layers, self.model.kinds)

    def computed(self, step: int) -> dict[Kind, int]:
        """Returns in how many layers a pass computes each kind of output."""
        return {kind: self.plan.computed(step, kind) for kind in self.model.kinds}


@dataclass(frozen=True)
class VideoCost:
    """The cost of a video on some ranks: numbers of the rank with the most of each.

    Args:
        ranks: how many ranks there are.
        cfg: the size of the `cfg` axis.
        flops: of all passes.
        collectives: of all passes, those of guidance included.
        bytes: that are received in them.
        weights_bytes: of the transformer.
        stored_bytes: the most that outputs for reuse occupy at once.
        compute_s: seconds of the slowest rank's products, predicted.
        communication_s: seconds of its collectives, predicted.
    """

    ranks: int
    cfg: int
    flops: int
    collectives: int
    bytes: int
    weights_bytes: int
    stored_bytes: int
    compute_s: float
    communication_s: float

    @property
    def name(self) -> str:
        """Such as 2×dynamic where the branches of guidance run at once."""
        return "dynamic" if self.cfg == 1 else f"{self.cfg}×dynamic"

    @property
    def video_s(self) -> float:
        """Seconds to denoise the video; nothing overlaps."""
        return self.compute_s + self.communication_s


def layer_flops(work: VideoWork, batch: int, frames: int, tokens: int) -> tuple[dict[Kind, int], dict[Kind, int]]:
    """Returns the FLOPs of one layer of a pass by kind of output: of linear layers, and of attention.

    Args:
        work: the video.
        batch: B on this rank.
        frames: f.
        tokens: s.
    """
    d, own, switched = work.dim, batch * frames * work.tokens, batch * work.frames * tokens
    square, mlp = 2 * d * d, 2 * MLP_RATIO * 2 * d * d
    linear: dict[Kind, int] = {
        "self": 4 * square * own,
        "cross": 2 * square * own,
        "mlp": mlp * own,
        "temporal": 4 * square * switched,
        "temporal-cross": 2 * square * own,
        "temporal-mlp": mlp * own,
    }
    attention: dict[Kind, int] = {
        "self": 4 * d * own * work.tokens,
        "cross": 4 * d * own * work.text,
        "temporal": 4 * d * switched * work.frames,
        "temporal-cross": 4 * d * own * work.text,
    }
    return linear, attention


def pass_flops(work: VideoWork, step: int, batch: int, frames: int, tokens: int) -> tuple[int, int]:
    """Returns the FLOPs of a pass on a rank with its blocks' and the tokens' linear layers, and those of attention. The
    embedding of the timestep is not counted."""
    linear, attention = layer_flops(work, batch, frames, tokens)
    computed = work.computed(step)
    ends = work.model.patch_embedding.weight.numel() + work.model.head.weight.numel()
    return (
        2 * batch * frames * work.tokens * ends + sum(linear[kind] * count for kind, count in computed.items()),
        sum(attention.get(kind, 0) * count for kind, count in computed.items()),
    )


def received(work: VideoWork, batch: int, frames: Sequence[int], tokens: Sequence[int], rank: int) -> int:
    """Returns the elements that a rank receives in both switches of a layer.

    Args:
        work: the video.
        batch: B on a rank.
        frames: the frames of each rank.
        tokens: the tokens of a frame of each rank.
        rank: the rank.
    """
    there = (work.frames - frames[rank]) * tokens[rank]
    back = frames[rank] * (work.tokens - tokens[rank])
    return batch * work.dim * (there + back)


def video_cost(work: VideoWork, ranks: int, cfg: int, on: Machine) -> VideoCost:
    """Returns the cost of a video.

    Args:
        work: the video.
        ranks: how many ranks there are.
        cfg: the size of the `cfg` axis.
        on: the machine.
    """
    sp, batch = ranks // cfg, work.batch // cfg
    frames, tokens, steps = shares(work.frames, sp), shares(work.tokens, sp), range(len(work.timesteps))
    flops, seconds, stored = [], [], []
    for rank in range(sp):
        found = [pass_flops(work, step, batch, frames[rank], tokens[rank]) for step in steps]
        linear, attention = (sum(column) for column in zip(*found, strict=True))
        flops.append(linear + attention)
        seconds.append(linear / on.matmul + attention / on.attention)
        stored.append(work.plan.stored * batch * frames[rank] * work.tokens * work.dim * work.itemsize)
    temporal = sum(work.computed(step)["temporal"] for step in steps)
    calls = 2 * temporal if sp > 1 else 0
    moved = temporal * max(received(work, batch, frames, tokens, rank) for rank in range(sp)) if sp > 1 else 0
    if cfg > 1:
        calls += len(steps)
        moved += len(steps) * batch * max(frames) * work.tokens * work.model.head.out_features
    size = moved * work.itemsize
    return VideoCost(
        ranks,
        cfg,
        max(flops),
        calls,
        size,
        sum(parameter.numel() for parameter in work.model.parameters()) * work.itemsize,
        max(stored),
        max(seconds),
        size / on.link + calls * on.latency,
    )


def saved(plain: VideoCost, reusing: VideoCost) -> Mapping[str, float]:
    """Returns the shares of FLOPs and of received bytes that reuse saves."""
    return {
        "flops": 1 - reusing.flops / plain.flops,
        "bytes": 1 - reusing.bytes / plain.bytes if plain.bytes else 0.0,
    }
