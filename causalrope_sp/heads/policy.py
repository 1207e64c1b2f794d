"""How many latent frames each attention head of each layer sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from causalrope_sp.checks import check_whole, shown
from causalrope_sp.errors import ConfigError

LARGEST = 4096  # layers of a model, and heads of a layer
SKIP = 0  # the window of a head whose output is zero
Window = int | None  # latent frames, current chunk included; None for the whole window of the stream


@dataclass(frozen=True)
class HeadPolicy:
    """The window of every head, in latent frames.

    A head with a window of w frames sees the stream's sink and the newest of the other frames, w in all, its chunk
    included, as if the stream had this window. Its frames keep the positions in time that they have in the whole
    window.

    Args:
        windows: by layer and head: a number of latent frames, `SKIP` for a head that attends nothing, whose output is
            zero, or None for a head that sees the whole window of the stream.

    Raises:
        ConfigError: there are no layers or heads, layers differ in their number of heads, or a window is no whole
            number of at least 0.
    """

    windows: tuple[tuple[Window, ...], ...]

    def __post_init__(self) -> None:
        layers = self.windows
        if not 1 <= len(layers) <= LARGEST or not all(1 <= len(layer) <= LARGEST for layer in layers):
            raise ConfigError(f"heads: expected 1 to {LARGEST} layers of 1 to {LARGEST} heads, got {_sizes(layers)}")
        other = next((number for number, layer in enumerate(layers) if len(layer) != len(layers[0])), None)
        if other is not None:
            raise ConfigError(
                f"heads: expected {len(layers[0])} heads in layer {other}, as in layer 0, got {len(layers[other])}"
            )
        checked = tuple(
            tuple(
                None if window is None else check_whole(f"heads: the window of layer {layer}, head {head}", window, 0)
                for head, window in enumerate(windows)
            )
            for layer, windows in enumerate(layers)
        )
        object.__setattr__(self, "windows", checked)

    @property
    def shortened(self) -> int:
        """How many heads have a window of their own."""
        return sum(window is not None for layer in self.windows for window in layer)

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

    def share_seen(self, window: int) -> float:
        """Returns the share of the keys of a window of `window` frames that heads see."""
        seen = self.frames(window)
        return sum(map(sum, seen)) / (len(seen) * len(seen[0]) * window)


def heads_of(given: Any) -> HeadPolicy:
    """Makes a policy of a JSON object with the field `windows`.

    Raises:
        ConfigError: it is none, or a window is wrong.
    """
    windows = given.get("windows") if isinstance(given, Mapping) else None
    if not isinstance(windows, list) or not all(isinstance(layer, list) for layer in windows):
        raise ConfigError(f'heads: expected an object with "windows", a list of lists, got {shown(given)}')
    return HeadPolicy(tuple(map(tuple, windows)))


def _sizes(layers: tuple[tuple[Window, ...], ...]) -> str:
    return f"{len(layers)} layers of {max(map(len, layers), default=0)} heads"
