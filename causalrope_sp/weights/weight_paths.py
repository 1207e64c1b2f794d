"""Which files hold the weights at a path, by names and indexes, and of which kind each is; JSON files beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from causalrope_sp.errors import CheckpointError, printable
from causalrope_sp.io.json_files import parse_object, read_object
from causalrope_sp.io.magic import MEDIA_BYTES, media_of
from causalrope_sp.weights.messages import one_line, some
from causalrope_sp.weights.models_beside import refuse_experts

Kind = Literal["safetensors", "torch", "gguf"]
INDEX = ".index.json"
SAFETENSORS = (".safetensors",)
TORCH = (".pt", ".pth", ".bin", ".ckpt")
GGUF = (".gguf",)


def weight_files(path: Path) -> Sequence[Path]:
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
        suffixes = ", no ".join((*SAFETENSORS, *TORCH, *GGUF))
        raise CheckpointError(f"{path}: holds no weights (no {suffixes}){_models_inside(path)}")
    if len(choices) > 1:
        several = f"{path}: holds several checkpoints, name one of them: {some(choices)}"
        raise CheckpointError(several + _models_inside(path))
    return next(iter(choices.values()))


def _models_inside(path: Path) -> str:
    """What to say of the folders in a folder that are whole models."""
    names = ("pipeline.json", "model_index.json")
    models = sorted({file.parent for name in names for file in path.glob(f"*/{name}") if file.is_file()})
    return f"; to open a whole model in it name {some(models)}" if models else ""


def _choices(folder: Path) -> dict[str, Sequence[Path]]:
    """Returns the checkpoints in a folder by name: its safetensors, or else its torch files, or else GGUF."""
    for suffixes in (SAFETENSORS, TORCH, GGUF):
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


def kind_of(file: Path) -> Kind:
    """Tells the kind of a file by its first bytes: 8 bytes and a JSON header, what torch.save writes, or GGUF's name.

    Raises:
        CheckpointError: it is none of these.
    """
    with file.open("rb") as stream:
        start = stream.read(MEDIA_BYTES)
    if start.startswith(b"GGUF"):
        return "gguf"
    if start[8:9] == b"{":
        return "safetensors"
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return "torch"
    if (media := media_of(start)) is not None:
        raise CheckpointError(f"{file}: {media}, and no checkpoint")
    if file.suffix == ".safetensors":
        return "safetensors"
    raise CheckpointError(f"{file}: neither a safetensors file nor one of torch.save nor GGUF")


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
