"""The tensors of a checkpoint by name, from one safetensors file, several with an index, torch files, or GGUF.

Names, shapes and dtypes come from the headers; a tensor's data is read, and dequantized, on request.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from causalrope_sp.errors import CheckpointError, printable
from causalrope_sp.weights.gguf_files import GgufHome, open_gguf
from causalrope_sp.weights.messages import one_line
from causalrope_sp.weights.networks import network, prefixes_of
from causalrope_sp.weights.stored_formats import NOMINAL, dequantized, find_quantized, is_no_weight
from causalrope_sp.weights.torch_files import open_tensors
from causalrope_sp.weights.weight_paths import json_object, kind_of, read_json, weight_files
from causalrope_sp.weights.wrappings import PARTS, bare_names, choose_prefix

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A tensor as its file describes it.

    Attributes:
        shape: its shape.
        dtype: the dtype in which it is read, of quantized numbers bfloat16; safetensors' name of one that is none of
            DTYPES.
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
        tensors: the tensors by their stored names, without scales of others and what is no weight.
        passed_by: what the file holds that is no weight, by name: counters, tables, a tokenizer.
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
        self.passed_by: list[str] = []
        self._names: dict[str, str] = {}  # of those that are called otherwise than in the file
        try:
            if not path.exists():
                raise CheckpointError(f"{path}: no such file or folder")
            self.files = weight_files(path)
            for file in self.files:
                match kind_of(file):
                    case "safetensors":
                        self._open_safetensors(file)
                    case "torch":
                        self._open_torch(file, part, parts)
                    case "gguf":
                        self._open_gguf(file)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        self._stored = dict(self.tensors)
        self._quantized, hidden = find_quantized(self.tensors, self.raw)
        self.passed_by += [name for name in self.tensors if is_no_weight(name)]
        for name in {*hidden, *self.passed_by} & self.tensors.keys():
            del self.tensors[name]
        for name in self._quantized.keys() & self.tensors.keys():
            self.tensors[name] = replace(self.tensors[name], dtype=NOMINAL)

    def read(self, name: str) -> Tensor:
        """Returns a tensor as a view of its file, or dequantized to float32.

        Raises:
            CheckpointError: it cannot be read.
        """
        quantized = self._quantized.get(name)
        if quantized is not None:
            scale = None if quantized.scale is None else self.raw(quantized.scale)
            return dequantized(self.raw(name), scale)
        home = self._stored[name].home
        return home.get_tensor(self._names.get(name, name)) if isinstance(home, GgufHome) else self.raw(name)

    def raw(self, name: str) -> Tensor:
        """Returns a tensor as it is stored, scales included, as a view of its file.

        Raises:
            CheckpointError: it cannot be read.
        """
        home, name = self._stored[name].home, self._names.get(name, name)
        if isinstance(home, GgufHome):
            return home.raw(name)
        try:
            tensor: Tensor = home[name] if isinstance(home, dict) else home.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: {printable(name)} cannot be read ({one_line(error)})") from error
        return tensor

    def fp8(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Returns the e4m3 numbers of a matrix, (N, K), and the float32 scale of each row, as they are stored.

        Returns:
            None if it is stored otherwise.

        Raises:
            CheckpointError: it cannot be read.
        """
        quantized, shape = self._quantized.get(name), self.tensors[name].shape
        if quantized is None or quantized.dtype != torch.float8_e4m3fn or len(shape) != 2:
            return None
        scale = torch.ones(1) if quantized.scale is None else self.raw(quantized.scale).float()
        return self.raw(name), scale.flatten().expand(shape[0])

    def of_network(self, kind: str) -> WeightFiles:
        """Returns the files as those of one network alone, its tensors under their names without prefix and wrappings.

        Args:
            kind: one of `networks.MARKS`; files without such a network are returned as they are.

        Raises:
            CheckpointError: they hold several such networks.
        """
        names = bare_names(self.tensors, self.path)
        prefixes = prefixes_of(kind, names)
        if not prefixes:
            return self
        found = network(choose_prefix(prefixes, None, self.path), names)
        renamed = {**found.own, **{name: name for name in found.rest}}
        files = copy.copy(self)
        files.tensors = {short: self.tensors[name] for short, name in renamed.items()}
        files._stored = {**self._stored, **{short: self._stored[name] for short, name in renamed.items()}}
        files._quantized = {short: self._quantized[name] for short, name in renamed.items() if name in self._quantized}
        files._names = renamed
        return files

    def take(self, name: str) -> Tensor:
        """Returns a tensor and forgets it, so that a file that was read whole gives its memory back piece by piece.

        Raises:
            CheckpointError: it cannot be read.
        """
        tensor, home = self.read(name), self._stored[name].home
        if isinstance(home, dict):
            del home[self._names.get(name, name)]
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
        self.passed_by += nested.passed_by
        for name, tensor in nested.content.items():
            self._add(file, name, Stored(tuple(tensor.shape), tensor.dtype, nested.content))

    def _open_gguf(self, file: Path) -> None:
        home = open_gguf(file)
        for name, (shape, dtype) in home.described.items():
            self._add(file, name, Stored(shape, dtype, home))
        self.metadata = self.metadata or home.metadata

    def _add(self, file: Path, name: str, stored: Stored) -> None:
        if name in self.tensors:
            raise CheckpointError(f"{file}: {printable(name)} is in another file of {self.path} too")
        self.tensors[name] = stored
