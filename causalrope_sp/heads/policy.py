"""How many latent frames each attention head of each layer sees, and which rows of tokens of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from causalrope_sp.checks import check_whole, shown
from causalrope_sp.errors import ConfigError

LARGEST = 4096  # layers of a model, and heads of a layer
SKIP = 0  # the window of a head whose output is zero
Window = int | None  # latent frames, current chunk included; None for the whole window of the stream
Rows = int | None  # of tokens, above and below; None for whole frames


@dataclass(frozen=True)
class HeadPolicy:
    """The window of every head, in latent frames, and the rows that it sees of each.

    A head with a window of w frames sees the stream's sink and the newest of the other frames, w in all, its chunk
    included, as if the stream had this window. Its frames keep the positions in time that they have in the whole
    window.

    A head with n rows sees the tokens near a query alone: of every frame of its window, its own included, those of the
    query's band of rows and of the bands above and below it. Bands are n rows of tokens high, from the top of the
    frame; the last one may be lower. So a query sees the n nearest rows on both sides, or more.

    Args:
        windows: by layer and head: a number of latent frames, `SKIP` for a head that attends nothing, whose output is
            zero, or None for a head that sees the whole window of the stream.
        rows: by layer and head the rows of a band, or None for a head that sees whole frames; empty if all do.

    Raises:
        ConfigError: there are no layers or heads, layers differ in their number of heads, a window is no whole number
            of at least 0, or the rows are no whole numbers of at least 1, or of other numbers of layers or heads.
    """

    windows: tuple[tuple[Window, ...], ...]
    rows: tuple[tuple[Rows, ...], ...] = ()

    def __post_init__(self) -> None:
        layers = self.windows
        if not 1 <= len(layers) <= LARGEST or not all(1 <= len(layer) <= LARGEST for layer in layers):
            raise ConfigError(f"heads: expected 1 to {LARGEST} layers of 1 to {LARGEST} heads, got {_sizes(layers)}")
        other = next((number for number, layer in enumerate(layers) if len(layer) != len(layers[0])), None)
        if other is not None:
            raise ConfigError(
                f"heads: expected {len(layers[0])} heads in layer {other}, as in layer 0, got {len(layers[other])}"
            )
        object.__setattr__(self, "windows", _checked("window", layers, 0))
        if self.rows and len(self.rows) != len(layers):
            raise ConfigError(f"heads: expected rows of {len(layers)} layers, as the windows, got {len(self.rows)}")
        for number, (own, rows_of_layer) in enumerate(zip(layers, self.rows, strict=False)):
            if len(own) != len(rows_of_layer):
                raise ConfigError(
                    f"heads: expected rows of {len(own)} heads in layer {number}, as the windows, "
                    f"got {len(rows_of_layer)}"
                )
        rows = _checked("number of rows", self.rows, 1)
        object.__setattr__(self, "rows", rows if any(n is not None for layer in rows for n in layer) else ())

    @property
    def rows_of_heads(self) -> tuple[tuple[Rows, ...], ...]:
        """The rows of every head, by layer."""
        return self.rows or tuple((None,) * len(layer) for layer in self.windows)

    @property
    def shortened(self) -> int:
        """How many heads have a window or rows of their own."""
        pairs = zip(self.windows, self.rows_of_heads, strict=True)
        return sum(seen != (None, None) for windows, rows in pairs for seen in zip(windows, rows, strict=True))

    @property
    def fields(self) -> dict[str, Any]:
        """The policy as JSON has it, which `heads_of` reads."""
        return {"windows": self.windows, "rows": self.rows} if self.rows else {"windows": self.windows}

    def check_stream(self, chunk_frames: int, sink: int) -> None:
        """Checks that every window holds a chunk and the sink.

        Args:
            chunk_frames: latent frames of a chunk.
            sink: latent frames of the sink.

        Raises:
            ConfigError: a window is smaller.
        """
        for layer, windows in enumerate(self.windows):
            for head, window in enumerate(windows):
                if window is not None and window != SKIP and window < chunk_frames + sink:
                    raise ConfigError(
                        f"heads: expected a window of at least chunk + sink = {chunk_frames} + {sink} latent frames in "
                        f"layer {layer}, head {head}, got {window}"
                    )

    def check_model(self, layers: int, heads: int) -> None:
        """Checks that the policy is of a model's size.

        Args:
            layers: the layers of the model.
            heads: its attention heads.

        Raises:
            ConfigError: it has another number of layers or heads.
        """
        own = len(self.windows), len(self.windows[0])
        if own != (layers, heads):
            raise ConfigError(f"heads: expected windows of {layers} layers × {heads} heads, got {own[0]} × {own[1]}")

    def frames(self, window: int) -> tuple[tuple[int, ...], ...]:
        """Returns how many latent frames each head of each layer sees in a stream with a window of `window` frames."""
        return tuple(tuple(window if w is None else min(w, window) for w in layer) for layer in self.windows)

    def whole(self, window: int) -> tuple[tuple[int, ...], ...]:
        """Returns the numbers of each layer's heads that see the whole of a window of `window` frames."""
        frames = self.frames(window)
        return tuple(tuple(head for head, seen in enumerate(layer) if seen == window) for layer in frames)

    def share_of_frames(self, window: int) -> float:
        """Returns the share of the frames of a window of `window` frames that heads see, their mean. It is that of the
        keys, too, if no head has rows."""
        seen = self.frames(window)
        return sum(map(sum, seen)) / (len(seen) * len(seen[0]) * window)


def heads_of(given: Any) -> HeadPolicy:
    """Makes a policy of a JSON object with the field `windows`, and `rows` if there are any.

    Raises:
        ConfigError: it is none, or a window or a number of rows is wrong.
    """
    windows = given.get("windows") if isinstance(given, Mapping) else None
    if not isinstance(windows, list) or not all(isinstance(layer, list) for layer in windows):
        raise ConfigError(f'heads: expected an object with "windows", a list of lists, got {shown(given)}')
    rows = given.get("rows", [])
    if not isinstance(rows, list) or not all(isinstance(layer, list) for layer in rows):
        raise ConfigError(f'heads: expected a list of lists as "rows", got {shown(rows)}')
    return HeadPolicy(tuple(map(tuple, windows)), tuple(map(tuple, rows)))


def _sizes(layers: tuple[tuple[int | None, ...], ...]) -> str:
    return f"{len(layers)} layers of {max(map(len, layers), default=0)} heads"


def _checked(name: str, layers: tuple[tuple[int | None, ...], ...], least: int) -> tuple[tuple[int | None, ...], ...]:
    return tuple(
        tuple(
            None if value is None else check_whole(f"heads: the {name} of layer {layer}, head {head}", value, least)
            for head, value in enumerate(values)
        )
        for layer, values in enumerate(layers)
    )
