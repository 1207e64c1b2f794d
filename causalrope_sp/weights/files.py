"""The tensors of a checkpoint by name, from one safetensors file, several with an index, or a torch file.

Names, shapes and dtypes come from the headers; a tensor's data is read when it is asked for.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from causalrope_sp.errors import CheckpointError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INDEX = ".safetensors.index.json"
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
# Training scripts keep the averaged and the raw weights side by side; the averaged ones are meant for use.
NESTED_UNDER = ("generator_ema", "generator", "state_dict", "model")


@dataclass(frozen=True)
class Stored:
    """A tensor as its file describes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str  # a safetensors name where it is none of DTYPES
    home: Any  # the open file that `read` takes it from


class WeightFiles:
    """An open checkpoint.

    Raises:
        CheckpointError: nothing there, not a checkpoint, truncated, or a pickle that holds more than tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, Stored] = {}
        self.metadata: Mapping[str, str] = {}
        try:
            if not path.exists():
                raise CheckpointError(f"{path}: no such file or folder")
            for file in _weight_files(path):
                if _is_safetensors(file):
                    self._open_safetensors(file)
                else:
                    self._open_torch(file)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error

    def read(self, name: str) -> Tensor:
        home = self.tensors[name].home
        tensor: Tensor = home[name] if isinstance(home, dict) else home.get_tensor(name)
        return tensor

    def numbers(self, names: Iterable[str]) -> Counter[torch.dtype]:
        """How many numbers of each dtype the named tensors hold.

        Raises:
            CheckpointError: one of them is of no dtype that a model computes in.
        """
        sizes: Counter[torch.dtype] = Counter()
        for name in sorted(names):
            dtype = self.tensors[name].dtype
            if not isinstance(dtype, torch.dtype) or dtype not in DTYPES.values():
                raise CheckpointError(f"{self.path}: {name} is stored as {dtype}, not as float64, 32, 16 or bfloat16")
            sizes[dtype] += prod(self.tensors[name].shape)
        return sizes

    def declared_config(self) -> dict[str, Any]:
        """What the file's metadata says about the model, before what a config.json beside it says.

        Raises:
            CheckpointError: either is not a JSON object.
        """
        beside = (self.path if self.path.is_dir() else self.path.parent) / "config.json"
        declared = _read_json(beside) if beside.is_file() else {}
        if "config" in self.metadata:
            declared |= _json_object(self.metadata["config"], f"{self.path}: metadata `config`")
        return declared

    def _open_safetensors(self, file: Path) -> None:
        try:
            home = safe_open(file, "pt")
            slices = {name: home.get_slice(name) for name in home.keys()}
            described = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
        except SafetensorError as error:
            raise CheckpointError(f"{file}: truncated or not a safetensors file ({_one_line(error)})") from error
        for name, (shape, dtype) in described.items():
            self._add(file, name, Stored(shape, DTYPES.get(dtype, dtype), home))
        self.metadata = self.metadata or home.metadata() or {}

    def _open_torch(self, file: Path) -> None:
        tensors = _state_dict(_load_tensors_only(file), file)
        for name, tensor in tensors.items():
            self._add(file, name, Stored(tuple(tensor.shape), tensor.dtype, tensors))

    def _add(self, file: Path, name: str, stored: Stored) -> None:
        if name in self.tensors:
            raise CheckpointError(f"{file}: {name} is in another file of {self.path} too")
        self.tensors[name] = stored


def _weight_files(path: Path) -> Sequence[Path]:
    """The files that hold the weights at `path`: itself, or what the folder holds, shards in order."""
    if path.is_file():
        return _shards(path) if path.name.endswith(INDEX) else [path]
    choices = {index.name: _shards(index) for index in sorted(path.glob("*" + INDEX))}
    sharded = {shard for shards in choices.values() for shard in shards}
    singles = sorted(set(path.glob("*.safetensors")) - sharded)
    if not choices and not singles:
        singles = sorted(file for file in path.iterdir() if file.suffix in TORCH_SUFFIXES)
    choices |= {file.name: [file] for file in singles}
    if not choices:
        raise CheckpointError(f"{path}: holds no weights (no .safetensors, no {', no '.join(TORCH_SUFFIXES)})")
    if len(choices) > 1:
        raise CheckpointError(f"{path}: holds several checkpoints, name one of them: {', '.join(choices)}")
    return next(iter(choices.values()))


def _shards(index: Path) -> Sequence[Path]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: names {name}, which is not in {index.parent}")
    return [index.parent / name for name in names]


def _is_safetensors(file: Path) -> bool:
    """Judged by the first bytes: a JSON header behind its length, or what torch.save writes."""
    with file.open("rb") as stream:
        start = stream.read(9)
    if start[8:] == b"{":
        return True
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return False
    if file.suffix == ".safetensors":
        return True
    raise CheckpointError(f"{file}: neither a safetensors file nor one of torch.save")


def _load_tensors_only(file: Path) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # what torch warns of, the line below says
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named:
            raise CheckpointError(
                f"{file}: refused, because it holds Python objects ({named[1]}) and loading those can run code; "
                "save the tensors alone"
            ) from error
        raise CheckpointError(f"{file}: not a torch file of tensors alone") from error
    except Exception as error:  # torch.load raises whatever a broken archive trips over
        raise CheckpointError(f"{file}: truncated or not a torch file ({_one_line(error)})") from error


def _state_dict(content: Any, file: Path) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, not tensors by name")
    nested = next((content[name] for name in NESTED_UNDER if isinstance(content.get(name), dict)), content)
    for name, value in nested.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{file}: {name} is a {type(value).__name__}, not a tensor")
    return nested


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return _json_object(file.read_bytes(), str(file))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error


def _json_object(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{where}: not JSON ({_one_line(error)})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: not a JSON object")
    return content


def _one_line(error: Exception) -> str:
    """The first sentence of an error of another library; torch's go on for a paragraph."""
    return (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
