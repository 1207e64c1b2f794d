"""The file of a saved session: safetensors, with the fields that are no tensors as JSON in its metadata.

    format    "causalrope_sp session"
    version   of this layout, a whole number
    library   the version of the library that wrote it
    session   the fields, a JSON object

Its tensors are `latents`, `control`, `embeds/ID`, `negative_embeds`, `texts/NUMBER`, `conditioning`,
`cache/BRANCH/LAYER`, `offsets/BRANCH` and `decoder/LAYER`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from causalrope_sp.errors import CheckpointError, ConfigError, printable
from causalrope_sp.sessions.saved_parts import ReadLayer, SavedBranch, SavedCache
from causalrope_sp.sessions.saved_session import SavedSession
from causalrope_sp.sessions.session_metadata import CACHE, fields_of, layer_name, session_of, tensors_of
from causalrope_sp.sessions.tensor_writer import NAMES, TensorPlan, write_tensors
from causalrope_sp.weights.finite import all_finite
from causalrope_sp.weights.messages import one_line, problem, some
from causalrope_sp.weights.tensor_files import WeightFiles
from causalrope_sp.weights.weight_paths import json_object

FORMAT, VERSION = "causalrope_sp session", 1


def write_session(path: str | PathLike[str], saved: SavedSession, layers: Iterable[Tensor] = ()) -> None:
    """Writes a session to a file, under a temporary name until it is complete.

    Args:
        path: the file. Where there is one already, it stays as it is until the new one is complete.
        saved: the session; its cache is written from `layers`.
        layers: keys and values of the whole model, (2, B, K, S, N, D), layer by layer of each of the cache's branches;
            nothing without a cache. Each is written before the next one is taken. All are taken even if writing fails,
            since other ranks may take part in making them.

    Raises:
        ConfigError: a layer is not as the session's cache says, or there are fewer or more.
        OutputError: the file cannot be written: a full disk, another process that writes it, a folder of that name. The
            file that was there stays, and nothing else is left.
    """
    tensors, cache = tensors_of(saved), saved.cache
    layers_of = _layers(cache)
    plans = [TensorPlan(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    if cache is not None:
        plans += [TensorPlan(name, cache.stored_shape(*layer), cache.dtype) for name, layer in layers_of.items()]
    plans.sort(key=lambda plan: -plan.dtype.itemsize)  # those of equal width keep their order
    more = iter(layers)

    def values() -> Iterator[Tensor]:
        for plan in plans:
            tensor = tensors[plan.name] if plan.name in tensors else next(more, None)
            if tensor is None:
                return
            if cache is not None and plan.name in layers_of:
                tensor = cache.stored(*layers_of[plan.name], tensor)
            yield tensor
        yield from more

    metadata = {"format": FORMAT, "version": str(VERSION), "library": saved.library}
    write_tensors(path, plans, values(), {**metadata, "session": json.dumps(fields_of(saved))})


def read_session(path: str | PathLike[str]) -> SavedSession:
    """Reads a session from a file. Tensors are views of the file; keys and values are read by `SavedCache.layer`.

    Args:
        path: the file.

    Returns:
        The session.

    Raises:
        CheckpointError: the file cannot be read, is no saved session, is one of a later version, is truncated, or holds
            what no session has: fields or tensors that are missing, unknown, contradict each other, or are not finite.
    """
    if Path(path).is_dir():
        raise CheckpointError(f"{path}: a folder, not a saved session")
    files = WeightFiles(Path(path))
    metadata = files.metadata
    if len(files.files) > 1 or metadata.get("format") != FORMAT or not re.fullmatch("[1-9][0-9]{0,8}", _version(files)):
        raise CheckpointError(f"{path}: not a saved session")
    if int(_version(files)) > VERSION:
        raise CheckpointError(
            f"{path}: a saved session of version {_version(files)}, written by causalrope_sp "
            f"{printable(metadata.get('library', ''))}; this causalrope_sp reads version {VERSION}: update it"
        )
    fields = json_object(metadata.get("session", ""), f"{path}: metadata `session`")
    tensors = {name: _read(files, name) for name in files.tensors if not name.startswith(CACHE)}
    try:
        saved = session_of(fields, tensors, _reader(files))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    _check_layers(files, files.tensors.keys() - tensors.keys(), saved.cache)
    broken = [name for name, tensor in tensors.items() if tensor.numel() and not all_finite(tensor)]
    if broken:
        raise CheckpointError(f"{path}: {len(broken)} with NaN or infinity: {some(broken)}")
    return saved


def _version(files: WeightFiles) -> str:
    return files.metadata.get("version", "")


def _read(files: WeightFiles, name: str) -> Tensor:
    """Returns a tensor as a view of its file."""
    dtype = files.tensors[name].dtype
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{files.path}: {printable(name)} is stored as {dtype}, which no session has")
    return files.read(name)


def _layers(cache: SavedCache | None) -> dict[str, tuple[SavedBranch, int]]:
    """The branch and number of each layer by the name of its tensor, in the order in which they are written."""
    if cache is None:
        return {}
    return {layer_name(of.name, layer): (of, layer) for of in cache.branches for layer in range(cache.layers)}


def _check_layers(files: WeightFiles, held: Iterable[str], cache: SavedCache | None) -> None:
    """Checks that the tensors which are no others are the layers of the cache."""
    layers, found = _layers(cache), set(held)
    misshapen = []
    for name in found & layers.keys():
        assert cache is not None, "it has the layer"
        stored, shape = files.tensors[name], cache.stored_shape(*layers[name])
        if (stored.shape, NAMES.get(stored.dtype, stored.dtype)) != (shape, NAMES[cache.dtype]):
            misshapen.append(f"{name} is {stored.shape} in {stored.dtype}, expected {shape} in {cache.dtype}")
    wrong = problem(sorted(layers.keys() - found), sorted(found - layers.keys()), sorted(misshapen))
    if wrong:
        raise CheckpointError(f"{files.path}: tensors are wrong: {wrong}")


def _reader(files: WeightFiles) -> ReadLayer:
    """Makes the function that reads parts of keys and values."""

    def read(branch: str, layer: int, part: tuple[slice, ...]) -> Tensor:
        name = layer_name(branch, layer)
        try:
            found: Tensor = files.tensors[name].home.get_slice(name)[part]
        except SafetensorError as error:
            raise CheckpointError(f"{files.path}: {name} cannot be read ({one_line(error)})") from error
        return found

    return read
