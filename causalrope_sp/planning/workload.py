"""A stream as the cost model sees it: its sizes, and the modules that each pass computes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from itertools import takewhile

from causalrope_sp.codec.wan_vae_config import WAN_2_1
from causalrope_sp.config import NEWEST, CacheDtype, DiTConfig, SamplerConfig, StreamConfig
from causalrope_sp.diffusion.schedule import branch_timesteps, guided_steps, model_timesteps
from causalrope_sp.grid import LatentGrid, split_into_chunks
from causalrope_sp.heads.policy import HeadPolicy
from causalrope_sp.heads.rings import HeadRings
from causalrope_sp.reuse.policy import CAUSAL_KINDS, Kind, ReusePlan, ReusePolicy


@dataclass(frozen=True)
class Workload:
    """The sizes of a stream.

    Args:
        config: the sizes of the model.
        grid: the latent frame in tokens.
        window: the window in latent frames.
        chunk_frames: the latent frames of a chunk.
        steps: the denoise passes of a chunk in the conditional branch.
        batch: B.
        itemsize: the bytes of a number in weights, cache and activations.
        fp8: whether the matrices of the blocks are stored in 8 bits.
        fp8_activations: whether they are multiplied with activations in 8 bits, too.
        guided: how many of the passes are guided, so that the unconditional branch, with a cache of its own, makes a
            pass too.
        reuse: the reuse plan of each branch, or empty.
        wide: how many of the parameters are float32 if the others have 16 bits.
        sink_frames: the latent frames of the chunks that have frames of the sink.
        history: how many chunks can be taken back bit for bit, those that are made ahead counted.
        kept_chunks: of how many chunks beyond the window clean latents are kept.
        recomputed: the context passes before each chunk that compute its window anew: the frames of each, and those
            that it attends; None if the window only slides.
        models: how many models share the steps by noise level, each with weights, a cache and context passes of its
            own.
        cache: how keys and values are stored, of `StreamConfig`.
        similar: how many frames of a full window passes after a chunk's first attend; None for all (`similar_frames`).
            Heads with a window of their own attend that.
        heads: what each attention head sees, or None for the whole window.
        sink: the frames of the sink.
        temporal_stride: the pixel frames of a latent frame, which only the frame rate depends on.
    """

    config: DiTConfig
    grid: LatentGrid
    window: int
    chunk_frames: int
    steps: int
    batch: int = 1
    itemsize: int = 2
    fp8: bool = False
    fp8_activations: bool = False
    guided: int = 0
    reuse: tuple[ReusePlan, ...] = ()
    wide: int = 0
    recomputed: tuple[tuple[int, int], ...] | None = None
    sink_frames: int = 0
    history: int = 0
    kept_chunks: int = 0
    models: int = 1
    similar: int | None = None
    cache: CacheDtype = "model"
    heads: HeadPolicy | None = None
    sink: int = 0
    temporal_stride: int = WAN_2_1.scale_factor_temporal

    @classmethod
    def of(
        cls,
        config: DiTConfig,
        grid: LatentGrid,
        stream: StreamConfig,
        sampler: SamplerConfig,
        window: int,
        batch: int = 1,
        itemsize: int = 2,
        reuse: ReusePolicy | None = None,
    ) -> Workload:
        """Makes the workload of a stream from its configuration.

        Args:
            config: the sizes of the model.
            grid: the latent frame in tokens.
            stream: the options of the stream.
            sampler: the options of the sampler.
            window: the window in latent frames; a chunk is at most as long.
            batch: B.
            itemsize: the bytes of a number in weights, cache and activations.
            reuse: the reuse policy, or None.
        """
        chunk, guided = min(stream.chunk_frames, window), sum(guided_steps(sampler))
        plans: tuple[ReusePlan, ...] = ()
        if reuse is not None:
            reuse.check(model_timesteps(sampler), config.num_layers)
            branches = (False, True) if guided else (False,)  # conditional, unconditional
            timesteps = [branch_timesteps(sampler, unconditional) for unconditional in branches]
            plans = tuple(ReusePlan.of_causal(reuse, each, config.num_layers) for each in timesteps)
        again = _recomputed(window, stream.sink, chunk) if stream.window_policy == "recomputed" else None
        steps = len(sampler.steps)
        return cls(
            config,
            grid,
            window,
            chunk,
            steps,
            batch,
            itemsize,
            guided=guided,
            reuse=plans,
            recomputed=again,
            sink_frames=_sink_frames(stream),
            cache=stream.cache,
            similar=_similar(stream, window, chunk),
            heads=stream.heads,
            sink=stream.sink,
        )

    def head_rings(self, columns: int) -> HeadRings:
        """Returns the rings of the cache, and where the heads are, if so many ranks share them."""
        c = self.config
        sizes = c.num_layers, c.num_heads, columns, self.window
        return head_rings(self.heads, *sizes, self.sink, self.chunk_frames, self.similar, self.grid.rows)

    @property
    def choosing(self) -> int:
        """How many heads of all layers choose frames by similarity: those that see the whole window."""
        if self.heads is None:
            return self.config.num_layers * self.config.num_heads
        return sum(map(len, self.heads.whole(self.window)))

    @property
    def seen(self) -> int:
        """The frames of a full window that passes after a chunk's first attend, and its context pass, with heads that
        see all of it."""
        return self.window if self.similar is None else self.similar

    @property
    def more_context(self) -> tuple[tuple[int, int], ...]:
        """The context passes of a chunk beside the one that its first pass shares: the frames of each, and those that
        it attends. Every further model has one, and each computes its window anew where the stream does."""
        again = (self.recomputed or ()) * self.models
        return again + ((self.chunk_frames, self.window),) * (self.models - 1)

    @property
    def passes(self) -> list[int]:
        """The denoise passes of a chunk in each branch of guidance."""
        return [self.steps, self.guided] if self.guided else [self.steps]

    def computed(self, step: int, branch: int = 0) -> dict[Kind, int]:
        """Returns in how many layers a pass computes each kind of module; the other layers reuse its output.

        Args:
            step: the number of the pass in its chunk.
            branch: 0 for the conditional, 1 for the unconditional branch of guidance.
        """
        every = self.config.num_layers
        return {kind: self.reuse[branch].computed(step, kind) if self.reuse else every for kind in CAUSAL_KINDS}

    @cached_property
    def linear_flops(self) -> int:
        """FLOPs a token of all linear layers. Layers that run once per frame or per prompt are left out."""
        return self.linear_flops_of(self.computed(0))

    def linear_flops_of(self, computed: dict[Kind, int]) -> int:
        """Returns the FLOPs a token of the linear layers of a pass that computes these modules (see `computed`)."""
        c = self.config
        weights = {"self": 4 * c.dim, "cross": 2 * c.dim, "mlp": 2 * c.ffn_dim}  # a layer's, by output of width `dim`
        layers = sum(2 * c.dim * weights[kind] * count for kind, count in computed.items())
        return layers + 2 * c.dim * c.embedded_dim + self.head_flops

    @property
    def head_flops(self) -> int:
        """FLOPs a token of the head."""
        return 2 * self.config.dim * self.config.token_dim

    @property
    def left_out_flops(self) -> int:
        """FLOPs a token that a context pass leaves out: the last layer after self-attention, and the head."""
        c = self.config
        return 2 * c.dim * (3 * c.dim + 2 * c.ffn_dim) + 4 * c.text_len * c.dim + self.head_flops

    @cached_property
    def parameters(self) -> int:
        """The parameters of the model."""
        c = self.config
        d, layer = c.dim, 0
        layer += 3 * d * d + 3 * d + d * d + d + 2 * d  # self-attention with its norms
        layer += d * d + d + 2 * d * d + 2 * d + d * d + d + 2 * d  # cross-attention
        layer += (2 * d * d + 3 * d) * (c.image_dim > 0)  # its keys and values of image tokens
        layer += 2 * d + 2 * d * c.ffn_dim + c.ffn_dim + d + 6 * d  # its norm, the feed-forward, the modulation
        outer = (c.embedded_dim + c.text_dim + c.freq_dim) * d + 3 * d  # embeddings of patch, text and time,
        outer += 2 * (d * d + d) + 6 * d * d + 6 * d  # the second layers of two of them, the projection of time,
        outer += c.token_dim * d + c.token_dim + 2 * d  # the head,
        i = c.image_dim
        outer += i * i + 3 * i + i * d + 3 * d if i else 0  # and the embedding of image tokens
        return c.num_layers * layer + outer

    @property
    def matrices(self) -> int:
        """The parameters in all matrices of the blocks."""
        c = self.config
        return c.num_layers * c.dim * ((10 if c.image_dim else 8) * c.dim + 2 * c.ffn_dim)

    @property
    def linear_inputs(self) -> int:
        """The numbers that the matrices of all blocks read for a token."""
        c = self.config
        return c.num_layers * (5 * c.dim + c.ffn_dim)

    @property
    def all_weights_bytes(self) -> int:
        """The bytes of the weights of all models on the device."""
        return self.models * self.weights_bytes

    @property
    def weights_bytes(self) -> int:
        """The bytes of one model's weights on the device."""
        c, full = self.config, self.parameters * self.itemsize + (2 * self.wide if self.itemsize == 2 else 0)
        scales = 4 * c.num_layers * ((11 if c.image_dim else 9) * c.dim + c.ffn_dim)
        return full - (self.itemsize - 1) * self.matrices + scales if self.fp8 else full


head_rings = cache(HeadRings.of)  # a plan asks for those of every rank


def _recomputed(window: int, sink: int, chunk: int) -> tuple[tuple[int, int], ...]:
    """The frames of each context pass before a chunk of a steady stream, and those that it attends. The frames that
    stay are those of the sink and the newest ones; the newest chunk's pass is fused with the next chunk's first."""
    passes, stop = [], window - 2 * chunk  # in the ring, and the sink before it
    while stop > sink:
        frames = min(stop - sink, chunk)
        passes.append((frames, stop))
        stop -= frames
    return tuple(reversed(passes))


def _similar(stream: StreamConfig, window: int, chunk: int) -> int | None:
    """The frames that are attended of a full window; of a share those that are on average."""
    similar = stream.similar_frames
    if similar is None:
        return None
    always = stream.sink + NEWEST + chunk
    if 0 < similar < 1:
        return min(window, max(always, round((1 - similar) * window)))
    return min(window, always + int(similar))


def _sink_frames(stream: StreamConfig) -> int:
    chunks = split_into_chunks(None, stream.chunk_frames, independent_first_frame=stream.independent_first_frame)
    return sum(chunk.frames for chunk in takewhile(lambda chunk: chunk.start < stream.sink, chunks))
