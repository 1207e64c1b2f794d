"""Saving and loading a VIN as a safetensors file: parameters under their own names; its sizes and its
`ParallelChunksConfig` in the metadata.

There is no published layout. The metadata also holds the sizes of the DiT that the VIN was trained with, so that a file
for another DiT is refused before it runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from causalrope_sp.checks import check_names
from causalrope_sp.config import DiTConfig
from causalrope_sp.devices import on_meta
from causalrope_sp.errors import CheckpointError
from causalrope_sp.io.json_files import parse_object
from causalrope_sp.io.saved_tensors import save_tensors
from causalrope_sp.vin.network import VideoInterfaceNetwork, at_least_float32, sizes
from causalrope_sp.vin.vin_config import ParallelChunksConfig, VINConfig
from causalrope_sp.weights.finite import all_finite
from causalrope_sp.weights.tensor_files import DTYPES

C = TypeVar("C", VINConfig, ParallelChunksConfig)
LAYOUT, OLD_LAYOUT = "causalrope_sp-vin-2", "causalrope_sp-vin-1"
TENSORS_OF_LAYER = 10  # at least
LONGEST = 200  # characters of the list of parameters that do not fit


def save_vin(vin: VideoInterfaceNetwork, chunks: ParallelChunksConfig, path: str | PathLike[str]) -> None:
    """Writes a VIN and the settings of its parallel chunks to one safetensors file.

    Args:
        vin: the network.
        chunks: how its videos are cut into parallel chunks, and how these are fused and guided.
        path: the file to write.

    Raises:
        OutputError: a folder, a device or a pipe has the path.
    """
    metadata = {
        "layout": LAYOUT,
        "vin": json.dumps(asdict(vin.config)),
        "chunks": json.dumps(asdict(chunks)),
        "dit": json.dumps(sizes(vin.dit)),
    }
    save_tensors({name: x.contiguous() for name, x in vin.state_dict().items()}, path, metadata)


def inspect_vin(path: str | PathLike[str], dit: DiTConfig) -> tuple[VideoInterfaceNetwork, ParallelChunksConfig]:
    """Reads what a file says of a VIN, but no weights.

    Args:
        path: a file that `save_vin` wrote.
        dit: sizes of the DiT that will attend the global tokens.

    Returns:
        The network on the meta device, where it has shapes alone, and the settings of its parallel chunks.

    Raises:
        CheckpointError: the file cannot be read or holds no VIN, the VIN is for a DiT of other sizes than `dit`, or
            weights are missing, unexpected or of a wrong shape.
    """
    with _errors_of(path), _opened(path) as file:
        return _empty(path, file, dit)


def read_vin_settings(path: str | PathLike[str]) -> tuple[VINConfig, ParallelChunksConfig]:
    """Reads the settings of a VIN, whatever its DiT is.

    Args:
        path: a file that `save_vin` wrote.

    Returns:
        The sizes of the network, and the settings of its parallel chunks.

    Raises:
        CheckpointError: the file cannot be read, or its metadata describe no VIN.
    """
    with _errors_of(path), _opened(path) as file:
        config, chunks, _ = _settings(path, file.metadata() or {})
    return config, chunks


def load_vin(
    path: str | PathLike[str], dit: DiTConfig, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[VideoInterfaceNetwork, ParallelChunksConfig]:
    """Loads a VIN and the settings of its parallel chunks from a file.

    Args:
        path: a file that `save_vin` wrote.
        dit: sizes of the DiT that will attend the global tokens.
        dtype: the dtype of the loaded parameters; that of frequencies is float32 at least.
        device: where they are loaded to.

    Returns:
        The network, in eval mode and without gradients, and the settings of its parallel chunks.

    Raises:
        CheckpointError: the file cannot be read or holds no VIN, the VIN is for a DiT of other sizes than `dit`, or
            weights are missing, unexpected, of a wrong shape, NaN or infinite.
    """
    with _errors_of(path), _opened(path) as file:
        vin, chunks = _empty(path, file, dit)
        state = {name: file.get_tensor(name) for name in file.keys()}
    for name, tensor in state.items():
        if tensor.dtype not in DTYPES.values():
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}, not float64, 32, 16 or bfloat16")
    state = {
        name: tensor.to(device, at_least_float32(dtype) if name == "frequencies" else dtype)
        for name, tensor in state.items()
    }
    broken = [name for name, tensor in state.items() if not all_finite(tensor)]
    if broken:
        raise CheckpointError(f"{path}: NaN or infinite: {', '.join(broken)}")
    vin.load_state_dict(state, strict=True, assign=True)
    return vin.eval().requires_grad_(False), chunks


@contextmanager
def _errors_of(path: str | PathLike[str]) -> Iterator[None]:
    """Turns what reading a file raises into a CheckpointError that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, SafetensorError, TypeError, ValueError, RuntimeError, OverflowError) as reason:
        raise CheckpointError(f"{path}: cannot be read as a Video Interface Network: {reason}") from reason


def _opened(path: str | PathLike[str]) -> safe_open:
    """Opens a file; a folder or a pipe, which would never end, is refused first."""
    if Path(path).exists() and not Path(path).is_file():
        raise CheckpointError(f"{path}: cannot be read as a Video Interface Network: it is no regular file")
    return safe_open(path, "pt")


def _empty(
    path: str | PathLike[str], file: safe_open, dit: DiTConfig
) -> tuple[VideoInterfaceNetwork, ParallelChunksConfig]:
    """Returns the network that a file's metadata describes, on the meta device, and the settings of its parallel
    chunks. Raises CheckpointError if it describes none or one for another DiT, or if the tensors are others than its
    parameters."""
    config, chunks, stored = _settings(path, file.metadata() or {})
    if wrong := [f"{name} {stored.get(name)}, not {x}" for name, x in sizes(dit).items() if stored.get(name) != x]:
        raise CheckpointError(f"{path}: for another DiT than this one: {'; '.join(wrong)}")
    if TENSORS_OF_LAYER * (config.layers + config.position_layers) > len(file.keys()):
        raise CheckpointError(f"{path}: holds {len(file.keys())} tensors, too few for its layers: {asdict(config)}")
    with on_meta():
        vin = VideoInterfaceNetwork(config, dit)
    _check_shapes(path, vin, {name: file.get_slice(name).get_shape() for name in file.keys()})
    return vin, chunks


def _settings(
    path: str | PathLike[str], metadata: dict[str, str]
) -> tuple[VINConfig, ParallelChunksConfig, dict[str, Any]]:
    """Returns what a file's metadata says: the sizes of the VIN, the settings of its parallel chunks, and the sizes of
    its DiT."""
    layout = metadata.get("layout")
    if layout == OLD_LAYOUT:
        raise CheckpointError(
            f"{path}: a Video Interface Network in the earlier layout {OLD_LAYOUT}, whose learned tokens read "
            "before they see the text: it cannot be run any more; examples/train_vin.py makes a new one"
        )
    if layout != LAYOUT:
        raise CheckpointError(f"{path}: not a Video Interface Network: its layout is not {LAYOUT}")
    try:
        network, cut, stored = (parse_object(metadata.get(name, "null")) for name in ("vin", "chunks", "dit"))
    except ValueError as reason:
        raise CheckpointError(
            f"{path}: its metadata lacks the sizes of a Video Interface Network: {reason}"
        ) from reason
    return _config_of(VINConfig, network), _config_of(ParallelChunksConfig, cut), stored


def _config_of(kind: type[C], given: dict[str, Any]) -> C:
    """Makes a configuration of what a file says; raises ConfigError if it lacks fields, or has others."""
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    check_names(kind.__name__, given, [field.name for field in fields(kind)], needed)
    return kind(**given)


def _check_shapes(path: str | PathLike[str], vin: VideoInterfaceNetwork, stored: dict[str, list[int]]) -> None:
    """Raises CheckpointError unless the file holds exactly the network's parameters, in their shapes."""
    expected = {name: list(tensor.shape) for name, tensor in vin.state_dict().items()}
    wrong = [f"{name} is missing" for name in expected if name not in stored]
    wrong += [f"{name} is left over" for name in stored if name not in expected]
    wrong += [f"{n} is {stored[n]}, not {shape}" for n, shape in expected.items() if stored.get(n, shape) != shape]
    if wrong:
        text = "; ".join(wrong)
        shortened = text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(wrong)} in all)"
        raise CheckpointError(f"{path}: {shortened}")
