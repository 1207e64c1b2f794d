"""The parts of a saved session. Their fields are checked when they are made.

Shapes: B batch, K saved frames, S tokens of a frame, N heads, D head width, L tokens of a text, E its width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from causalrope_kernels.quantized_heads import LARGEST, LARGEST_SCALE, SCALE_DTYPE
from causalrope_sp.checks import check_choice, check_fields, check_flag, check_text, check_whole, shown
from causalrope_sp.codec.conv_state import ConvState
from causalrope_sp.config import DTYPE_NAMES
from causalrope_sp.errors import CheckpointError, ConfigError, printable
from causalrope_sp.weights.finite import all_finite

BRANCHES = ("conditional", "unconditional")
LARGEST_INDEX = 2**53  # of a chunk or latent frame; JSON's numbers are exact up to there
_LARGEST_LAYERS = 2**12
_LARGEST_OFFSET = LARGEST_SCALE * max(LARGEST.values())  # no quantized key is larger
_LONGEST_NAME = 200  # characters of a layer of the decoder
DTYPES = {name: getattr(torch, name) for name in DTYPE_NAMES}

CACHE_DTYPES = DTYPES | {"int8": torch.int8}

ReadLayer = Callable[[str, int, slice, slice], Tensor]


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
    """

    name: str
    frames: tuple[int, ...]
    oldest: int = 0
    kept_shot: int = 0
    pending: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_choice("the name of a branch", self.name, BRANCHES)
        check_fields(self, ["oldest", "kept_shot"], least=0, most=LARGEST_INDEX)
        held = [check_whole("a frame in the cache", frame, 0, LARGEST_INDEX) for frame in self.frames]
        if len(set(held)) < len(held):
            raise ConfigError(f"the cache's frames must be different ones, not {shown(self.frames)}")
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
        expected = self.layers, self.batch, self.heads, self.head_dim
        for name, offsets in self.offsets.items():
            if name not in names or self.dtype != torch.int8:
                raise ConfigError(f"the cache has offsets of {printable(name)}, whose keys are not quantized")
            check_tensor(f"the offsets of {name}", offsets, "L B N D", (torch.float32, torch.float64))
            if offsets.shape != expected:
                raise ConfigError(f"the offsets of {name} are {tuple(offsets.shape)}, expected {expected}")
            if offsets.numel() and (most := float(offsets.abs().max())) > _LARGEST_OFFSET:
                raise ConfigError(f"the offsets of {name}: expected at most {_LARGEST_OFFSET:g}, got {most:g}")

    def layer_shape(self, branch: SavedBranch) -> tuple[int, ...]:
        """Returns the shape of a layer's keys and values, (2, B, K, S, N, D), or of their bytes."""
        return 2, self.batch, len(branch.frames), self.tokens, self.heads, self.width

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
            Keys and values, (2, B, K, s, n, D), of the branch's `frames`.

        Raises:
            CheckpointError: they cannot be read, or hold NaN or infinity.
        """
        assert self.reader is not None, "keys and values are read after they were written"
        part = self.reader(branch, layer, tokens, heads)
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


def check_tensor(what: str, tensor: Tensor, axes: str, dtypes: Iterable[torch.dtype], empty: str = "") -> None:
    """Checks the axes and the dtype of a tensor.

    Args:
        what: names it in the message.
        tensor: the tensor.
        axes: the names of its axes.
        dtypes: those that it may have.
        empty: the axes that may be of length 0.

    Raises:
        ConfigError: it has another number of axes, an axis of length 0, or another dtype.
    """
    names, allowed = axes.split(), list(dtypes)
    if tensor.ndim != len(names) or any(n == 0 and a not in empty.split() for n, a in zip(tensor.shape, names)):
        raise ConfigError(f"{what} must be of shape ({', '.join(names)}), not {tuple(tensor.shape)}")
    if tensor.dtype not in allowed:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ConfigError(f"{what} must be in {expected}, not {str(tensor.dtype).removeprefix('torch.')}")


def check_rising(what: str, numbers: Iterable[int], most: int) -> None:
    """Checks whole numbers.

    Args:
        what: what happens at them, for the message.
        numbers: the numbers.
        most: the largest that the last one may be.

    Raises:
        ConfigError: they do not begin at 0, do not rise, or one is larger than `most`.
    """
    found = [check_whole(f"a number of those that {what}", number, 0, most) for number in numbers]
    if found[:1] != [0] or any(a >= b for a, b in pairwise(found)):
        raise ConfigError(f"{what} at rising numbers from 0, not at {shown(found)}")


def writable(what: str, text: str | None) -> str | None:
    """Returns a text without halves of surrogate pairs, which no file can hold.

    Args:
        what: names it in the message.
        text: the text, or None.

    Raises:
        ConfigError: it is neither.
    """
    if text is not None and not isinstance(text, str):
        raise ConfigError(f"{what} must be a text or none, not {shown(text)}")
    return None if text is None else text.encode(errors="replace").decode()
