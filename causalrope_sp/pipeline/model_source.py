"""Finds the files of a model by its name: an embedded model, a folder, a checkpoint file, or a Hub repository."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from causalrope_sp.errors import CheckpointError, ConfigError
from causalrope_sp.pipeline.load_options import LoadOptions
from causalrope_sp.pipeline.model_config import PATHS, PIPELINE_FILE, ModelConfig, embedded_config, read_fields
from causalrope_sp.text import TextSource
from causalrope_sp.toybox import EMBEDDED
from causalrope_sp.weights import find_preset, inspect_checkpoint

MODEL_INDEX = "model_index.json"  # the file that only diffusers folders have
VAE_FILE = "Wan2.1_VAE.pth"  # in a folder of Wan's own layout
WAN = {"height": 480, "width": 832, "fps": 16}  # settings of models whose files have none
_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:/(.+))?")
_FOLDERS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
_OF_DIFFUSERS = [MODEL_INDEX, PIPELINE_FILE, *(f"{folder}/*" for folder in _FOLDERS)]
_OF_WAN = ["*.json", "*.safetensors", "*.pth", "google/*"]


def find_model(model: str | os.PathLike[str], options: LoadOptions) -> ModelConfig:
    """Returns the configuration of a model, with its settings replaced by those of the options.

    Args:
        model: the name of an embedded model, a folder (diffusers', Wan's, or one with a pipeline.json), a
            pipeline.json, a checkpoint of the transformer alone, or a Hub repository as org/name or org/name/file.
        options: how the model is loaded. `base`, `preset`, `revision`, `cache_dir` and `local_files_only` determine
            which files are used; the others replace settings.

    Raises:
        CheckpointError: the model cannot be read or lacks a part.
        ConfigError: the preset does not exist, or settings contradict each other.
    """
    name = os.fspath(model)
    if name in EMBEDDED:
        if options.base is not None or options.preset is not None:
            raise ConfigError(f"{name} is a whole model: it takes neither base nor preset")
        return embedded_config(name).with_options(options)
    path = _on_disk(name, options)
    try:
        return _config_of(path, options).with_options(options)
    except CheckpointError as reason:
        raise CheckpointError(f"cannot open {name}: {reason}") from reason


def is_on_hub(model: str | os.PathLike[str]) -> bool:
    """Returns whether a name can only be a Hub repository or a file in one."""
    name = os.fspath(model)
    return name not in EMBEDDED and not local_path(name).exists() and _REPOSITORY.fullmatch(name) is not None


def _on_disk(name: str, options: LoadOptions) -> Path:
    """The path of a model, which is downloaded if it is in a Hub repository."""
    path = local_path(name)
    try:
        if path.exists():
            return path
    except OSError as reason:
        raise CheckpointError(f"no model {name!r}: {reason.strerror or reason}") from reason
    if not is_on_hub(name) or path.suffix == ".json":
        raise CheckpointError(
            f"no model {name!r}: not one of {', '.join(EMBEDDED)}, not a file, not a folder, and not a Hub repository "
            "as org/name"
        )
    return download(name, options)


def download(name: str, options: LoadOptions, folders: tuple[str, ...] = ()) -> Path:
    """Downloads a Hub repository, or one file of it, unless it has been downloaded before.

    Args:
        name: org/name or org/name/path/of/a/file.
        options: `revision`, `cache_dir` and `local_files_only` are used.
        folders: the folders of the repository that are downloaded; empty for all files of a model.

    Returns:
        The folder of the repository, or the file.

    Raises:
        CheckpointError: the repository, file or revision does not exist, or has not been downloaded and
            `local_files_only` is set.
    """
    match = _REPOSITORY.fullmatch(name)
    assert match is not None, "is_on_hub has matched the name"
    hub_options: dict[str, Any] = {
        "revision": options.revision,
        "cache_dir": options.cache_dir,
        "local_files_only": options.local_files_only,
    }
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if match[2]:
            return Path(hf_hub_download(match[1], match[2], **hub_options))
        wanted = [f"{folder}/*" for folder in folders] or _OF_DIFFUSERS
        path = Path(snapshot_download(match[1], allow_patterns=wanted, **hub_options))
        if folders or (path / MODEL_INDEX).is_file() or (path / PIPELINE_FILE).is_file():
            return path
        return Path(snapshot_download(match[1], allow_patterns=_OF_WAN, **hub_options))
    except (OSError, ValueError) as reason:  # huggingface_hub's errors are of these two kinds
        hub_message = " ".join(str(reason).split())[:300]
        raise CheckpointError(f"cannot get {name} from the Hub: {hub_message}") from reason


def _config_of(path: Path, options: LoadOptions) -> ModelConfig:
    """The configuration from, in rising priority, the checkpoint's content, its folder, the base, the pipeline.json."""
    source_file, own = path, dict[str, Any]()
    if path.suffix == ".json" and not path.name.endswith(".index.json"):
        own = read_fields(path)
    elif (path / PIPELINE_FILE).is_file():
        source_file = path / PIPELINE_FILE
        own = read_fields(source_file)
    fields, inferred = dict[str, Any](), list[str]()
    folder = path if path.is_dir() else None
    if (path / MODEL_INDEX).is_file():
        fields |= {"transformer": path / "transformer", **_parts_in(path)}
    elif not own:
        fields |= {"transformer": path} | ({} if folder is None else _parts_in(folder))
    if options.base is not None:
        base = _base_fields(options)
        fields |= base
        inferred.append(f"text encoder and VAE of {options.base}")
    fields |= own
    missing = [name for name in PATHS[:2] if name not in fields]
    if missing or "text" not in fields:
        raise CheckpointError(
            f"{path} is a transformer alone: name a folder or repository with the text encoder and the VAE as base "
            "(--base), or run it from Python with load_model and sample_chunks"
            if "transformer" in fields
            else f"{source_file} names no transformer"
        )
    if not {"stream", "sampler"} <= own.keys() or options.preset is not None:
        fields, reason = _with_preset(fields, own, options)
        inferred.insert(0, reason)
    config = ModelConfig.of({**WAN, **fields}, source_file)
    return replace(config, inferred=tuple(inferred))


def _parts_in(folder: Path) -> dict[str, Any]:
    """The fields `codec` and `text` of those parts that a folder of diffusers' or Wan's own layout has."""
    found: dict[str, Any] = {}
    codec = next((path for path in (folder / "vae", folder / VAE_FILE) if path.exists()), None)
    if codec is not None:
        found["codec"] = codec
    text = TextSource(folder)
    if text.is_here():
        found["text"] = text
    return found


def _base_fields(options: LoadOptions) -> dict[str, Any]:
    """The fields that `base` supplies: VAE and text encoder, and of an embedded model also the frames' size and fps."""
    base = os.fspath(options.base or "")
    if base in EMBEDDED:
        whole = embedded_config(base)
        return {name: getattr(whole, name) for name in ("codec", "text", "height", "width", "fps")}
    if is_on_hub(base):
        folder = download(base, replace(options, revision=None), ("vae", "text_encoder", "tokenizer"))
    else:
        folder = local_path(base)
    if not folder.is_dir():
        raise CheckpointError(f"base {base!r} is not a folder, and not a Hub repository as org/name")
    found = _parts_in(folder)
    lacking = [what for what, name in (("VAE", "codec"), ("text encoder", "text")) if name not in found]
    if lacking:
        raise CheckpointError(f"base {base} has no {' and no '.join(lacking)} in it")
    return found


_RUN = ("stream", "sampler")


def _with_preset(fields: dict[str, Any], own: dict[str, Any], options: LoadOptions) -> tuple[dict[str, Any], str]:
    """The fields with stream and sampler of the named or the inferred preset, and the reason as a text."""
    if options.preset is not None:
        preset, why = find_preset(options.preset), "named"
    else:
        report = inspect_checkpoint(fields["transformer"])
        preset, why = report.preset, "; ".join(report.preset.evidence)
    kept: dict[str, Any] = (
        {} if options.preset is not None else {name: own[name] for name in ("stream", "sampler") if name in own}
    )
    steps = ", ".join(f"{step:g}" for step in preset.sampler.steps)
    window = "all frames" if preset.stream.window is None else f"window {preset.stream.window}"
    reason = f"preset {preset.name} ({why}): {window}, steps {steps}, shift {preset.sampler.shift:g}"
    return {**fields, "stream": preset.stream, "sampler": preset.sampler, **kept}, reason


def local_path(path: str | os.PathLike[str]) -> Path:
    """Returns a path with ~ replaced by the home folder."""
    return Path(path).expanduser()


def describe_inferred(name: str | os.PathLike[str], config: ModelConfig) -> str | None:
    """Returns the inferred settings of a model in one line, or None if its files have all settings."""
    return f"{os.fspath(name)}: {'; '.join(config.inferred)}" if config.inferred else None
