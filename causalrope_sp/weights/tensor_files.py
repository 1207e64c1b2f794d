"""The tensors of a checkpoint by name, from one safetensors file, several with an index, or torch files.

Names, shapes and dtypes come from the headers; a tensor's data is read on request.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from causalrope_sp.errors import CheckpointError, printable
from causalrope_sp.io.json_files import parse_object, read_object
from causalrope_sp.weights.messages import one_line, some
from causalrope_sp.weights.models_beside import refuse_experts
from causalrope_sp.weights.torch_files import open_tensors
from causalrope_sp.weights.wrappings import PARTS

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INDEX = ".index.json"
SAFETENSORS = (".safetensors",)
TORCH = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class Stored:
    """A tensor as its file describes it.

    Attributes:
        shape: its shape.
        dtype: its dtype; safetensors' name of it where it is none of DTYPES.
        home: the open file, or dictionary of tensors, that holds it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    home: Any


class WeightFiles:
    """An open checkpoint.

    Args:
        path: a file, the index of a sharded checkpoint, or a folder with one checkpoint in it.
        part: the key of the dictionary to take from a torch file that holds several.
        parts: the keys to try where there is no `part`, the preferred first.

    Attributes:
        path: as passed.
        files: the files of weights, shards in order.
        tensors: the tensors by their stored names.
        metadata: that of the first safetensors file which has any.
        parts: the keys of the nested dictionaries that were opened, outermost first.
        auxiliary: the keys of dictionaries next to those, which were not opened.
        beside: the numbers, texts and settings next to the tensors: a safetensors file's metadata, or what lies beside
            the opened dictionaries of a torch file.

    Raises:
        CheckpointError: there is nothing at `path`, it is no checkpoint, is truncated, or is a pickle that holds
            more than tensors.
    """

    def __init__(self, path: Path, part: str | None = None, parts: tuple[str, ...] = PARTS) -> None:
        self.path = path
        self.tensors: dict[str, Stored] = {}
        self.metadata: Mapping[str, str] = {}
        self.parts: tuple[str, ...] = ()
        self.auxiliary: tuple[str, ...] = ()
        self.beside: Mapping[str, Any] = {}
        try:
            if not path.exists():
                raise CheckpointError(f"{path}: no such file or folder")
            self.files = _weight_files(path)
            for file in self.files:
                if _is_safetensors(file):
                    self._open_safetensors(file)
                else:
                    self._open_torch(file, part, parts)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error

    def read(self, name: str) -> Tensor:
        """Returns a tensor as a view of its file.

        Raises:
            CheckpointError: it cannot be read.
        """
        home = self.tensors[name].home
        try:
            tensor: Tensor = home[name] if isinstance(home, dict) else home.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: {printable(name)} cannot be read ({one_line(error)})") from error
        return tensor

    def take(self, name: str) -> Tensor:
        """Returns a tensor and forgets it, so that a file that was read whole gives its memory back piece by piece.

        Raises:
            CheckpointError: it cannot be read.
        """
        tensor, home = self.read(name), self.tensors[name].home
        if isinstance(home, dict):
            del home[name]
        return tensor

    def numbers(self, names: Iterable[str]) -> Counter[torch.dtype]:
        """Counts the numbers of each dtype in some tensors.

        Args:
            names: the tensors' stored names.

        Returns:
            How many numbers there are of each dtype.

        Raises:
            CheckpointError: a tensor has a dtype that no model computes in.
        """
        sizes: Counter[torch.dtype] = Counter()
        for name in sorted(names):
            dtype = self.tensors[name].dtype
            if not isinstance(dtype, torch.dtype) or dtype not in DTYPES.values():
                raise CheckpointError(f"{self.path}: {name} is stored as {dtype}, not as float64, 32, 16 or bfloat16")
            sizes[dtype] += prod(self.tensors[name].shape)
        return sizes

    def declared_config(self, name: str = "config.json") -> dict[str, Any]:
        """Reads the configuration in the JSON file next to the weights and in their metadata, which takes precedence.

        Args:
            name: the name of the JSON file.

        Returns:
            The declared fields; empty if there are none.

        Raises:
            CheckpointError: the file or the metadata is not a JSON object.
        """
        auxiliary = self.files[0].parent / name
        declared = read_json(auxiliary) if auxiliary.is_file() else {}
        if "config" in self.metadata:
            declared |= json_object(self.metadata["config"], f"{self.path}: metadata `config`")
        return declared

    def _open_safetensors(self, file: Path) -> None:
        try:
            home = safe_open(file, "pt")
            slices = {name: home.get_slice(name) for name in home.keys()}
            described = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
        except SafetensorError as error:
            raise CheckpointError(f"{file}: truncated or not a safetensors file ({one_line(error)})") from error
        for name, (shape, dtype) in described.items():
            self._add(file, name, Stored(shape, DTYPES.get(dtype, dtype), home))
        self.metadata = self.metadata or home.metadata() or {}
        self.beside = self.metadata

    def _open_torch(self, file: Path, part: str | None, parts: tuple[str, ...]) -> None:
        nested = open_tensors(file, part, parts)
        self.parts, self.auxiliary, self.beside = nested.parts, nested.auxiliary, nested.beside
        for name, tensor in nested.content.items():
            self._add(file, name, Stored(tuple(tensor.shape), tensor.dtype, nested.content))

    def _add(self, file: Path, name: str, stored: Stored) -> None:
        if name in self.tensors:
            raise CheckpointError(f"{file}: {printable(name)} is in another file of {self.path} too")
        self.tensors[name] = stored


def _weight_files(path: Path) -> Sequence[Path]:
    """Returns the files that hold the weights at `path`, shards in order.

    A pipeline folder of diffusers keeps its DiT in the folder `transformer`.
    """
    if path.is_file():
        return _shards(path) if path.name.endswith(INDEX) else [path]
    refuse_experts(path)
    choices = _choices(path)
    if not choices and (path / "transformer").is_dir():
        choices = _choices(path / "transformer")
    if not choices:
        other = ", only GGUF files, which are not read" if next(path.glob("*.gguf"), None) else ""
        raise CheckpointError(f"{path}: holds no weights (no {', no '.join((*SAFETENSORS, *TORCH))}){other}")
    if len(choices) > 1:
        raise CheckpointError(f"{path}: holds several checkpoints, name one of them: {some(choices)}")
    return next(iter(choices.values()))


def _choices(folder: Path) -> dict[str, Sequence[Path]]:
    """Returns the checkpoints in a folder by name; torch files only if it holds no safetensors."""
    for suffixes in (SAFETENSORS, TORCH):
        indexes = sorted(file for suffix in suffixes for file in folder.glob(f"*{suffix}{INDEX}"))
        choices = {index.name: _shards(index) for index in indexes}
        sharded = {shard for shards in choices.values() for shard in shards}
        singles = sorted({file for suffix in suffixes for file in folder.glob(f"*{suffix}")} - sharded)
        choices |= {file.name: [file] for file in singles}
        if choices:
            return choices
    return {}


def _shards(index: Path) -> Sequence[Path]:
    """Returns the files that an index names, sorted."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if not _lies_in(index.parent, name):
            raise CheckpointError(f"{index}: names {printable(name)}, which is not a file in {index.parent}")
    return [index.parent / name for name in names]


def _lies_in(folder: Path, name: str) -> bool:
    """Returns whether `name` is a file of the folder itself, reached through no path or link into another folder.

    Links of the Hub's cache are allowed, from snapshots/REVISION into the blobs of the same repository.
    """
    try:
        if Path(name).name != name or "\\" in name or not (folder / name).is_file():
            return False
        target, home = (folder / name).resolve(strict=True), folder.resolve(strict=True)
        repository = next((above.parent for above in home.parents if above.name == "snapshots"), None)
        return target.parent == home or (repository is not None and target.parent == repository / "blobs")
    except (OSError, ValueError):  # a name that no file can have
        return False


def _is_safetensors(file: Path) -> bool:
    """Tells by the first bytes: a length of 8 bytes and a JSON header, or what torch.save writes."""
    with file.open("rb") as stream:
        start = stream.read(9)
    if start.startswith(b"GGUF"):
        raise CheckpointError(f"{file}: a GGUF file, a format that is not read; name what it was made of")
    if start[8:] == b"{":
        return True
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return False
    if file.suffix == ".safetensors":
        return True
    raise CheckpointError(f"{file}: neither a safetensors file nor one of torch.save")


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        CheckpointError: the file cannot be read, is longer than 64 MiB, or is not a JSON object.
    """
    try:
        return read_object(file)
    except ValueError as error:
        raise CheckpointError(f"{file}: {one_line(error)}") from error


def json_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Parses a JSON object.

    Args:
        text: the JSON text.
        where: its origin, for messages.

    Raises:
        CheckpointError: it is not JSON, or not an object.
    """
    try:
        return parse_object(text)
    except ValueError as error:
        raise CheckpointError(f"{where}: {one_line(error)}") from error
