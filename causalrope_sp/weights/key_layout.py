"""What a checkpoint layout is: which of its tensors make up each parameter of `CausalDiT`, and how.

Layouts differ in names alone. How stored tensors become a parameter is the same for all of them: projections that
the model fuses are concatenated, the patch convolution becomes a Linear over (pt, ph, pw, C), tables lose their
leading axis of one.

Shapes: D model width, C latent channels, pt, ph, pw the patch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from causalrope_sp.config import DiTConfig

Shape = tuple[int, ...]
Names = dict[str, tuple[str, ...]]  # a parameter of the model -> the stored names it is made of, in order


def linear(name: str, *stored: str) -> Names:
    """A Linear of the model and the one or several that it is stored as."""
    return {f"{name}.{part}": tuple(f"{s}.{part}" for s in stored) for part in ("weight", "bias")}


@dataclass(frozen=True)
class Layout:
    """One way to name the tensors of a Wan DiT.

    `marker` is a module that every block has in this layout and in no other; `config_names` holds the fields of
    `DiTConfig` that the layout's config.json calls differently.
    """

    name: str
    marker: str
    outer: Names
    block: Names
    config_names: Mapping[str, str] = field(default_factory=dict)

    def prefixes_in(self, names: Iterable[str]) -> list[str]:
        """What stands before names of this layout, each "" or ending in a dot; none if `names` are not of it."""
        pattern = re.compile(rf"((?:.*\.)?)blocks\.\d+\.{re.escape(self.marker)}\.")
        return sorted({match[1] for name in names if (match := pattern.match(name))})

    def names(self, num_layers: int) -> Names:
        every = dict(self.outer)
        for n in range(num_layers):
            for parameter, stored in self.block.items():
                every[f"blocks.{n}.{parameter}"] = tuple(f"blocks.{n}.{s}" for s in stored)
        return every


def stored_shape(parameter: str, shape: Shape, pieces: int, config: DiTConfig) -> Shape:
    """The shape of each of the stored tensors that make up a parameter of the given shape."""
    if parameter == "patch_embedding.weight":
        return (config.dim, config.in_channels, *config.patch_size)
    if parameter.endswith("modulation"):
        return (1, *shape)
    return (shape[0] // pieces, *shape[1:])


def stored_tensors(layout: Layout, config: DiTConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's state under the names and shapes of a layout: the way back from `arrange`."""
    every: dict[str, Tensor] = {}
    for parameter, stored in layout.names(config.num_layers).items():
        tensor = state[parameter]
        if parameter == "patch_embedding.weight":
            tensor = tensor.unflatten(1, (*config.patch_size, config.in_channels)).permute(0, 4, 1, 2, 3)
        pieces = [tensor.unsqueeze(0)] if parameter.endswith("modulation") else tensor.chunk(len(stored))
        every |= {name: piece.contiguous() for name, piece in zip(stored, pieces, strict=True)}
    return every


def arrange(parameter: str, stored: Tensor) -> Tensor:
    """A stored tensor as the model lays it out: the parameter, or its part of a fused one."""
    if parameter == "patch_embedding.weight":
        return stored.permute(0, 2, 3, 4, 1).flatten(1)
    return stored.squeeze(0) if parameter.endswith("modulation") else stored
