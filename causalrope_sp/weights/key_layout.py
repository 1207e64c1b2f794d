"""Key layouts of checkpoints: which stored tensors make up each parameter of `CausalDiT`, and how.

Layouts differ in names alone. Stored tensors become a parameter in the same manner for all of them: projections that
the model fuses are concatenated, the patch convolution becomes a Linear over (pt, ph, pw, C), and tables lose their
leading axis of length 1.

Shapes: D model width, C channels of latents and control, pt, ph, pw the patch.
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
    """Names the weight and the bias of a Linear of the model, and those of the Linears that it is stored as.

    Args:
        name: the Linear's name in the model.
        *stored: the stored Linears' names; several for a fused projection.

    Returns:
        The two parameters' names, each with its stored names.
    """
    return {f"{name}.{part}": tuple(f"{s}.{part}" for s in stored) for part in ("weight", "bias")}


@dataclass(frozen=True)
class Layout:
    """The names that a kind of checkpoint uses for the tensors of a Wan DiT.

    Attributes:
        name: "wan" or "diffusers".
        marker: a module that every block has in this layout and in no other.
        outer: the parameters outside the blocks.
        block: the parameters of a block, without `blocks.N.` in front.
        image_outer: those outside the blocks of a model with image tokens alone.
        image_block: those of a block of such a model.
        config_names: field of `DiTConfig` -> its name in the layout's config.json, where the two differ.
        wide_modules: the modules, by the layout's names, whose parameters stay in float32 in a model of 16 bits.
    """

    name: str
    marker: str
    outer: Names
    block: Names
    image_outer: Names
    image_block: Names
    config_names: Mapping[str, str] = field(default_factory=dict)
    wide_modules: frozenset[str] = frozenset()

    def keeps_wide(self, stored: str) -> bool:
        """Returns whether a tensor of this name is one that stays in float32 in a model of 16 bits."""
        return not self.wide_modules.isdisjoint(stored.split("."))

    def prefixes_in(self, names: Iterable[str]) -> list[str]:
        """Returns the prefixes under which names of this layout occur, sorted, each "" or ending in a dot.

        Args:
            names: the names of all tensors of a checkpoint.

        Returns:
            One prefix for each model; none if the checkpoint has another layout.
        """
        pattern = re.compile(rf"((?:.*\.)?)blocks\.\d+\.{re.escape(self.marker)}\.")
        return sorted({match[1] for name in names if (match := pattern.match(name))})

    def names(self, num_layers: int, image: bool = False) -> Names:
        """Returns every parameter of a model with `num_layers` blocks, with its stored names.

        Args:
            num_layers: how many blocks it has.
            image: whether it has image tokens (`DiTConfig.image_dim`).
        """
        every = {**self.outer, **(self.image_outer if image else {})}
        block = {**self.block, **(self.image_block if image else {})}
        for n in range(num_layers):
            for parameter, stored in block.items():
                every[f"blocks.{n}.{parameter}"] = tuple(f"blocks.{n}.{s}" for s in stored)
        return every


def stored_shape(parameter: str, shape: Shape, pieces: int, config: DiTConfig) -> Shape:
    """Returns the shape of each of the stored tensors that make up a parameter.

    Args:
        parameter: the parameter's name in the model.
        shape: its shape in the model.
        pieces: how many stored tensors make it up.
        config: the model's configuration.
    """
    if parameter == "patch_embedding.weight":
        return (config.dim, config.embedded_channels, *config.patch_size)
    if parameter.endswith("modulation"):
        return (1, *shape)
    return (shape[0] // pieces, *shape[1:])


def stored_tensors(layout: Layout, config: DiTConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts a model's state to the names and shapes of a layout; the inverse of `arrange`.

    Args:
        layout: the layout to write.
        config: the model's configuration.
        state: the model's parameters by name.

    Returns:
        The tensors by their stored names, each contiguous.
    """
    every: dict[str, Tensor] = {}
    for parameter, stored in layout.names(config.num_layers, config.image_dim > 0).items():
        tensor = state[parameter]
        if parameter == "patch_embedding.weight":
            tensor = tensor.unflatten(1, (*config.patch_size, config.embedded_channels)).permute(0, 4, 1, 2, 3)
        pieces = [tensor.unsqueeze(0)] if parameter.endswith("modulation") else tensor.chunk(len(stored))
        every |= {name: piece.contiguous() for name, piece in zip(stored, pieces, strict=True)}
    return every


def arrange(parameter: str, stored: Tensor) -> Tensor:
    """Converts a stored tensor to the model's shape: that of the parameter, or of its piece of a fused one.

    Args:
        parameter: the parameter's name in the model.
        stored: the tensor as the checkpoint has it.

    Returns:
        A view of `stored`, or a copy where the patch convolution is flattened.
    """
    if parameter == "patch_embedding.weight":
        return stored.permute(0, 2, 3, 4, 1).flatten(1)
    return stored.squeeze(0) if parameter.endswith("modulation") else stored
