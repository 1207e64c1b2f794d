"""The parts of a saved session. Their fields are checked when they are made.

Shapes: B batch, K saved frames, S tokens of a frame, N heads, D head width, L tokens of a text, E its width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from causalrope_kernels.quantized_heads import LARGEST, LARGEST_SCALE, SCALE_DTYPE
from causalrope_sp.checks import check_choice, check_fields, check_flag, check_text, check_whole, shown
from causalrope_sp.codec.conv_state import ConvState
from causalrope_sp.config import DTYPE_NAMES
from causalrope_sp.errors import CheckpointError, ConfigError, printable
from causalrope_sp.sessions.part_checks import check_tensor, writable
from causalrope_sp.weights.finite import all_finite

BRANCHES = ("conditional", "unconditional")
LARGEST_INDEX = 2**53  # of a chunk or latent frame; JSON's numbers are exact up to there
_LARGEST_LAYERS = 2**12
_LARGEST_OFFSET = LARGEST_SCALE * max(LARGEST.values())  # no quantized key is larger
_LONGEST_NAME = 200  # characters of a layer of the decoder
DTYPES = {name: getattr(torch, name) for name in DTYPE_NAMES}

CACHE_DTYPES = DTYPES | {"int8": torch.int8}

ReadLayer = Callable[[str, int, tuple[slice, ...]], Tensor]  # a part of the tensor of a layer of a branch


@dataclass(frozen=True)
class PromptUse:
    """A prompt and the chunk from which it holds.

    Args:
        first_chunk: the number of that chunk.
        prompt: the prompt; None if embeddings were given without a text.
        id: the prompt's number in its session.
    """

    first_chunk: int
    prompt: str | None
    id: int

    def __post_init__(self) -> None:
        check_fields(self, ["first_chunk", "id"], least=0, most=LARGEST_INDEX)
        object.__setattr__(self, "prompt", writable("the prompt", self.prompt))


@dataclass(frozen=True)
class SavedBranch:
    """What the cache of a branch of guidance holds.

    Args:
        name: of the branch, of `BRANCHES`.
        frames: the global time indices of the latent frames whose clean keys and values are saved, in their order in
            the file.
        oldest: frames before this global time index are not in the window, but for a sink.
        kept_shot: where a shot begins; the sinks of shots before it are not in the window.
        pending: the first frame of the newest chunk, or of a part of it, whose context pass has yet to run, and the
            frame after its last one; None if all were written.
        seen: by kind of heads (see `SavedCache.kinds`) the numbers of those of `frames` that they hold; empty where all
            heads hold all.
    """

    name: str
    frames: tuple[int, ...]
    oldest: int = 0
    kept_shot: int = 0
    pending: tuple[int, int] | None = None
    seen: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        check_choice("the name of a branch", self.name, BRANCHES)
        check_fields(self, ["oldest", "kept_shot"], least=0, most=LARGEST_INDEX)
        held = [check_whole("a frame in the cache", frame, 0, LARGEST_INDEX) for frame in self.frames]
        if len(set(held)) < len(held):
            raise ConfigError(f"the cache's frames must be different ones, not {shown(self.frames)}")
        for numbers in self.seen:
            found = [check_whole("a number of a frame that heads hold", n, 0, len(held) - 1) for n in numbers]
            if len(set(found)) < len(found):
                raise ConfigError(f"the frames that heads hold must be different ones, not {shown(numbers)}")
        if self.pending is None:
            return
        bounds = [check_whole("a bound of the pending frames", bound, 0, LARGEST_INDEX) for bound in self.pending]
        if len(bounds) != 2 or bounds[0] >= bounds[1] or any(frame >= bounds[0] for frame in held):
            raise ConfigError(
                f"pending frames must be two bounds behind the frames that are written, not {shown(self.pending)}"
            )


@dataclass(frozen=True)
class SavedCache:
    """The keys and values of a session, whole, of all ranks. A rank reads its own part of each layer.

    Args:
        branches: those of guidance.
        layers: of the model.
        batch: B.
        tokens: S.
        heads: N.
        head_dim: D.
        dtype: of keys and values; int8 for those that are quantized, whose last axis is the bytes of a head's numbers
            and then those of its scale.
        kinds: by layer and head of the model its kind, as a number in `SavedBranch.seen`; empty where all heads hold
            all frames.
        offsets: by branch what was taken off quantized keys, (layers, B, N, D); nothing where it is not set yet.
        reader: reads from the file that holds them; None before they are written.
    """

    branches: tuple[SavedBranch, ...]
    layers: int
    batch: int
    tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    kinds: tuple[tuple[int, ...], ...] = ()
    offsets: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    reader: ReadLayer | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        names = [branch.name for branch in self.branches]
        if not names or names != [name for name in BRANCHES if name in names]:
            raise ConfigError(f"the cache's branches must be of {', '.join(BRANCHES)}, not {shown(names)}")
        check_fields(self, ["layers"], most=_LARGEST_LAYERS)
        check_fields(self, ["batch", "tokens", "heads", "head_dim"], most=LARGEST_INDEX)
        if self.dtype not in CACHE_DTYPES.values():
            raise ConfigError(f"the cache's dtype must be one of {', '.join(CACHE_DTYPES)}, not {shown(self.dtype)}")
        self._check_kinds()
        expected = self.layers, self.batch, self.heads, self.head_dim
        for name, offsets in self.offsets.items():
            if name not in names or self.dtype != torch.int8:
                raise ConfigError(f"the cache has offsets of {printable(name)}, whose keys are not quantized")
            check_tensor(f"the offsets of {name}", offsets, "L B N D", (torch.float32, torch.float64))
            if offsets.shape != expected:
                raise ConfigError(f"the offsets of {name} are {tuple(offsets.shape)}, expected {expected}")
            if offsets.numel() and (most := float(offsets.abs().max())) > _LARGEST_OFFSET:
                raise ConfigError(f"the offsets of {name}: expected at most {_LARGEST_OFFSET:g}, got {most:g}")

    def _check_kinds(self) -> None:
        sizes = [len(of_layer) for of_layer in self.kinds]
        if sizes and sizes != [self.heads] * self.layers:
            expected = f"{self.layers} layers of {self.heads} heads"
            raise ConfigError(f"the kinds of heads must be those of {expected}, not of layers of {shown(sizes)}")
        most = max((kind for of_layer in self.kinds for kind in of_layer), default=-1)
        for branch in self.branches:
            if len(branch.seen) != most + 1:
                raise ConfigError(f"{branch.name} has frames of {len(branch.seen)} kinds of heads, expected {most + 1}")

    def layer_shape(self, branch: SavedBranch) -> tuple[int, ...]:
        """Returns the shape of a layer's keys and values, (2, B, K, S, N, D), or of their bytes."""
        return 2, self.batch, len(branch.frames), self.tokens, self.heads, self.width

    def stored_shape(self, branch: SavedBranch, layer: int) -> tuple[int, ...]:
        """Returns the shape of what is stored of a layer: the same, or where heads hold some of the frames (2, B, R, S,
        D) with the R frames of all heads, head by head."""
        if not self.kinds:
            return self.layer_shape(branch)
        return 2, self.batch, int(self._held(branch, layer).sum()), self.tokens, self.width

    def stored(self, branch: SavedBranch, layer: int, whole: Tensor) -> Tensor:
        """Returns what is stored of a layer, whose keys and values are (2, B, K, S, N, D); others as they are."""
        if not self.kinds or whole.shape != self.layer_shape(branch):
            return whole
        return whole.permute(0, 1, 4, 2, 3, 5)[:, :, self._held(branch, layer)]

    def _held(self, branch: SavedBranch, layer: int) -> Tensor:
        """Which frames each head of a layer holds, (N, K)."""
        held = torch.zeros(len(branch.seen), len(branch.frames), dtype=torch.bool)
        for kind, numbers in zip(held, branch.seen, strict=True):
            kind[list(numbers)] = True
        return held[list(self.kinds[layer])]

    @property
    def width(self) -> int:
        """The length of the last axis of a layer's keys and values."""
        return self.head_dim + (SCALE_DTYPE.itemsize if self.dtype == torch.int8 else 0)

    def layer(self, branch: str, layer: int, tokens: slice = slice(None), heads: slice = slice(None)) -> Tensor:
        """Reads the keys and values of a layer, or some tokens or heads of them, and nothing else.

        Args:
            branch: the name of one of `branches`.
            layer: its number.
            tokens: of a frame.
            heads: of the model.

        Returns:
            Keys and values, (2, B, K, s, n, D), of the branch's `frames`; zeros for those that a head does not hold.

        Raises:
            CheckpointError: they cannot be read, or hold NaN or infinity.
        """
        every = slice(None)
        if not self.kinds:
            return self._finite(branch, layer, (every, every, every, tokens, heads))
        held = self._held(next(each for each in self.branches if each.name == branch), layer)
        first, stop, _ = heads.indices(self.heads)
        rows = slice(int(held[:first].sum()), int(held[:stop].sum()))
        part = self._finite(branch, layer, (every, every, rows, tokens))
        whole = part.new_zeros(2, self.batch, stop - first, held.shape[1], *part.shape[3:])
        whole[:, :, held[first:stop]] = part
        return whole.permute(0, 1, 3, 4, 2, 5)

    def _finite(self, branch: str, layer: int, index: tuple[slice, ...]) -> Tensor:
        assert self.reader is not None, "keys and values are read after they were written"
        part = self.reader(branch, layer, index)
        if part.numel() and not all_finite(part):
            raise CheckpointError(f"the saved keys and values of layer {layer}, {branch}, hold NaN or infinity")
        return part


@dataclass(frozen=True)
class SavedTexts:
    """The texts of a change of the prompt over several chunks that is not over.

    Args:
        embeds: that of the next chunk, and those of the chunks after it, (B, L, E) each.
        recache: whether the window is computed anew under each of the later ones.
        recache_sink: whether those of the sink are.
    """

    embeds: tuple[Tensor, ...]
    recache: bool
    recache_sink: bool

    def __post_init__(self) -> None:
        check_flag("recache of the saved texts", self.recache)
        check_flag("recache_sink of the saved texts", self.recache_sink)
        if len(self.embeds) < 2:
            raise ConfigError(f"a change of the prompt that is not over has two texts and more, not {len(self.embeds)}")


@dataclass(frozen=True)
class SavedDecoder:
    """The state of a codec's decoder, of whole pictures.

    Args:
        codec: the codec's name.
        frames: latent frames that it has decoded.
        state: its state; see `gather_state` and `cut_state`.
    """

    codec: str
    frames: int
    state: ConvState

    def __post_init__(self) -> None:
        check_text("the codec's name", self.codec)
        check_fields(self, ["frames"], least=0, most=LARGEST_INDEX)
        if self.state.started != (self.frames > 0):
            raise ConfigError(f"a decoder of {self.frames} frames has a state of {len(self.state.frames)} layers")
        for name, frames in self.state.frames.items():
            if not 0 < len(name) <= _LONGEST_NAME:
                raise ConfigError(f"the decoder has a layer of the name {printable(name)}")
            check_tensor(f"the decoder's {printable(name)}", frames, "B C T H W", DTYPES.values())
