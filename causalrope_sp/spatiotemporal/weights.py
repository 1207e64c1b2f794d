"""Loading of a DiT with alternating blocks from a folder with config.json and the weights."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from causalrope_sp.devices import on_meta
from causalrope_sp.errors import CheckpointError, ConfigError
from causalrope_sp.spatiotemporal.model import SpatioTemporalDiT
from causalrope_sp.weights.finite import all_finite, refuse_broken
from causalrope_sp.weights.key_layout import Names
from causalrope_sp.weights.messages import one_line, problem
from causalrope_sp.weights.tensor_files import WeightFiles

PATCH = "patch_embedding.weight"
Model = TypeVar("Model", bound=SpatioTemporalDiT)


@dataclass(frozen=True)
class StoredModel:
    """How a checkpoint stores a model.

    Attributes:
        kind: the model's name, for messages.
        names: returns every parameter of the model with its stored names; called once `layers` is known to be right.
        patch: the stored shape of the patch convolution, (D, C, patch).
        layers: how many layers the config declares.
        layer_marker: the first and the last part of the name of a tensor that each layer has once.
        ignored: stored names that are not needed.
    """

    kind: str
    names: Callable[[], Names]
    patch: tuple[int, ...]
    layers: int
    layer_marker: tuple[str, str]
    ignored: Collection[str] = ()


def load_dit(
    files: WeightFiles,
    path: Path,
    stored: StoredModel,
    build: Callable[[], Model],
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> Model:
    """Loads a model.

    Args:
        files: the folder's weights.
        path: the folder, for messages.
        stored: how they are stored.
        build: makes the model.
        dtype: the model's dtype; None keeps the one of most of the checkpoint's numbers.
        device: the model's device.

    Returns:
        The model in eval mode, without gradients.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of a wrong shape, or holds NaN or infinity.
        ConfigError: `dtype` is not a floating-point dtype.
    """
    first, last = stored.layer_marker
    layers = sum(name.startswith(first) and name.endswith(last) for name in files.tensors)
    if stored.layers != layers:
        raise CheckpointError(f"{path} ({stored.kind}): declares {stored.layers} layers, its weights have {layers}")
    try:
        with on_meta():
            model = build()
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(
            f"{path} ({stored.kind}): declares a model that cannot be built: {one_line(error)}"
        ) from error
    names = stored.names()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wanted = {name for made_of in names.values() for name in made_of}
    present = set(files.tensors)
    misshapen = []
    for parameter, made_of in names.items():
        shape = shapes[parameter]
        expected = stored.patch if parameter == PATCH else (shape[0] // len(made_of), *shape[1:])
        found = {name: files.tensors[name].shape for name in made_of if name in present}
        misshapen += [f"{name} is {shape}, expected {expected}" for name, shape in found.items() if shape != expected]
    wrong = problem(sorted(wanted - present), sorted(present - wanted - set(stored.ignored)), misshapen)
    if wrong:
        raise CheckpointError(f"{path} ({stored.kind}): {wrong}")
    dtype = dtype or files.numbers(wanted).most_common(1)[0][0]
    if not dtype.is_floating_point:
        raise ConfigError(f"a model computes in a floating-point dtype, not in {dtype}")
    state: dict[str, Tensor] = {}
    for parameter, made_of in names.items():
        joined = torch.cat([_as_linear(parameter, files.take(name)) for name in made_of])
        state[parameter] = joined.to(device, dtype, copy=True)
    refuse_broken(path, [name for name, tensor in state.items() if not all_finite(tensor)], dtype)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _as_linear(parameter: str, stored: Tensor) -> Tensor:
    """Returns the patch convolution, (D, C, patch), as a Linear over (patch, C), and any other tensor as it is."""
    return stored.movedim(1, -1).flatten(1) if parameter == PATCH else stored
