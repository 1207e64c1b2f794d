"""Reading of torch.save's files as tensors alone: no code of a file is run, and its declared sizes are checked."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causalrope_sp.errors import CheckpointError, printable
from causalrope_sp.weights.messages import one_line
from causalrope_sp.weights.quantized_formats import quantized_class
from causalrope_sp.weights.wrappings import Nested, innermost, is_setting


def open_tensors(file: Path, part: str | None, parts: tuple[str, ...]) -> Nested:
    """Opens a torch file, memory-mapped where its format allows.

    Args:
        file: the file.
        part: the key of the dictionary to take where there are several.
        parts: the keys to try where there is no `part`, the preferred first.

    Returns:
        The tensors by name, and the keys of the dictionaries that held them.

    Raises:
        CheckpointError: the file is truncated, compressed, declares more than it holds, or holds more than tensors.
    """
    mapped = _is_sound_archive(file)
    nested = innermost(_load_tensors_only(file, mapped), part, parts)
    if not isinstance(nested.content, dict):
        raise CheckpointError(f"{file}: holds a {type(nested.content).__name__}, not tensors by name")
    found = {str(name): value for name, value in nested.content.items()}
    state = {name: value for name, value in found.items() if not is_setting(value)}
    for name, value in state.items():
        _check_tensor(file, name, value)
    if sum(tensor.numel() * tensor.element_size() for tensor in state.values()) > file.stat().st_size:
        raise CheckpointError(f"{file}: declares more numbers than the file can hold")
    state = {name: tensor.detach() for name, tensor in state.items()}  # parameters would record what is done to them
    passed_by = {name: value for name, value in found.items() if name not in state}
    return Nested(state, nested.parts, nested.auxiliary, {**nested.beside, **passed_by}, tuple(passed_by))


def _is_sound_archive(file: Path) -> bool:
    """Returns whether a file is a zip archive, which torch.save writes since torch 1.6, or of the older format.

    torch.save never compresses its records, and a compressed one could decompress to any size.
    """
    try:
        if not zipfile.is_zipfile(file):
            return False
        with zipfile.ZipFile(file) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
            size = sum(entry.file_size for entry in archive.infolist())
    except Exception as error:  # zipfile raises errors of many kinds for a broken archive
        raise CheckpointError(f"{file}: truncated or not a torch file ({one_line(error)})") from error
    if packed:
        raise CheckpointError(f"{file}: its record {printable(packed[0])} is compressed, which torch.save never does")
    if size > file.stat().st_size:
        raise CheckpointError(f"{file}: declares records that are larger than the file")
    return True


def _load_tensors_only(file: Path, mapped: bool) -> Any:
    """Loads a file with torch's unpickler that admits no code."""
    try:
        with warnings.catch_warnings(action="ignore"):  # the errors below say what torch warns of
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named and (quantized := quantized_class(named[1])):
            raise CheckpointError(f"{file}: {quantized}") from error
        if named:
            raise CheckpointError(
                f"{file}: refused: it holds Python objects ({printable(named[1])}), whose loading can run code; "
                "save the tensors alone"
            ) from error
        raise CheckpointError(f"{file}: not a torch file of tensors alone") from error
    except Exception as error:  # torch.load raises errors of many kinds for a broken archive
        raise CheckpointError(f"{file}: truncated or not a torch file ({one_line(error)})") from error


def _check_tensor(file: Path, name: str, value: Any) -> None:
    """Raises CheckpointError if a value is not a dense tensor on the CPU."""
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{file}: {printable(name)} is a {type(value).__name__}, not a tensor")
    if type(value) not in (Tensor, torch.nn.Parameter):  # a subclass has numbers of its own kind
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise CheckpointError(f"{file}: {quantized_class(kind) or f'{printable(name)} is a {printable(kind)}'}")
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_nested:
        raise CheckpointError(f"{file}: {printable(name)} is no plain tensor of numbers")
