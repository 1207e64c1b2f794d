"""Finds the files of a model by its name: an embedded model, a folder, a checkpoint file, or a Hub repository."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from causalrope_sp.codec.codec_footprint import codec_footprint
from causalrope_sp.errors import CheckpointError, ConfigError
from causalrope_sp.pipeline.experts import experts_in
from causalrope_sp.pipeline.image_encoder import WAN_FILES
from causalrope_sp.pipeline.load_options import LoadOptions
from causalrope_sp.pipeline.model_config import PATHS, PIPELINE_FILE, ModelConfig, embedded_config, read_fields
from causalrope_sp.pipeline.option_checks import check_path
from causalrope_sp.text import TextSource
from causalrope_sp.toybox import EMBEDDED
from causalrope_sp.weights import find_preset, inspect_checkpoint
from causalrope_sp.weights.infer import WAN_HEAD_DIM
from causalrope_sp.weights.model_presets import Preset
from causalrope_sp.weights.models_beside import EXPERTS, models_beside, parts_left_out
from causalrope_sp.weights.scheduler_file import with_index, with_scheduler

MODEL_INDEX = "model_index.json"  # the file that only diffusers folders have
VAE_FILES = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth")  # in folders of Wan's own layout
SCHEDULER_FILE = "scheduler/scheduler_config.json"
# Settings of models whose files have none: of Wan 2.1, and by the VAE's stride of others (Wan 2.2 5B has 16).
WAN = {"height": 480, "width": 832, "fps": 16}
BY_STRIDE = {16: {"height": 704, "width": 1280, "fps": 24}}
_NEEDED = (  # settings that change the video of a model: where they are kept, the field, and the option
    ("stream", "window", "window"),
    ("stream", "chunk_frames", "chunk_frames"),
    ("sampler", "steps", "num_inference_steps"),
    ("sampler", "solver", "solver"),
    ("sampler", "shift", "shift"),
)
_LOCAL_SUFFIXES = (".pt", ".pth", ".safetensors", ".gguf", ".json")
_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:/(.+))?")
_FOLDERS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
_MORE = ("transformer_2", "image_encoder", "image_processor")  # that some models have
_OF_DIFFUSERS = [MODEL_INDEX, PIPELINE_FILE, *(f"{folder}/*" for folder in (*_FOLDERS, *_MORE))]
_OF_WAN = ["*.json", "*.safetensors", "*.pth", "google/*", *(f"{folder}/*" for folder in EXPERTS[1])]


def find_model(model: str | os.PathLike[str], options: LoadOptions) -> ModelConfig:
    """Returns the configuration of a model, with its settings replaced by those of the options.

    Args:
        model: the name of an embedded model, a folder (diffusers', Wan's, or one with a pipeline.json), a
            pipeline.json, a checkpoint of the transformer alone, or a Hub repository as org/name or org/name/file.
        options: how the model is loaded. `base`, `preset`, `revision`, `cache_dir` and `local_files_only` determine
            which files are used; the others replace settings.

    Raises:
        CheckpointError: the model cannot be read or lacks a part.
        ConfigError: `model` is no path, the preset does not exist, or settings contradict each other.
    """
    name = check_path("model", model)
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
    return is_hub_name(model) and not os.path.exists(local_path(model))


def is_hub_name(model: str | os.PathLike[str]) -> bool:
    """Returns whether a name has the form of a Hub repository or a file in one, whatever is on the disk.

    Names that begin with a dot, a slash or ~, and names such as checkpoints/model.pt, are always local.
    """
    name = check_path("model", model)
    match = _REPOSITORY.fullmatch(name)
    if name in EMBEDDED or name.startswith(".") or match is None:
        return False
    return match[2] is not None or not name.endswith(_LOCAL_SUFFIXES)


def _on_disk(name: str, options: LoadOptions) -> Path:
    """The path of a model, which is downloaded if it is in a Hub repository."""
    path = local_path(name)
    try:
        if path.exists():
            return path
    except OSError as reason:
        raise CheckpointError(f"no model {name!r}: {reason.strerror or reason}") from reason
    if name.startswith((".", "/", "~")) or (path.suffix in _LOCAL_SUFFIXES and not is_hub_name(name)):
        raise CheckpointError(f"no model {name!r}: no such file or folder")
    if not is_hub_name(name) or path.suffix == ".json":
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
            `local_files_only` is set; or its index names a part that is not run, before its weights are downloaded.
    """
    match = _REPOSITORY.fullmatch(name)
    assert match is not None, "is_on_hub has matched the name"
    hub_options: dict[str, Any] = {
        "revision": options.revision,
        "cache_dir": options.cache_dir,
        "local_files_only": options.local_files_only,
    }
    from huggingface_hub import hf_hub_download, snapshot_download

    def fetch(patterns: list[str]) -> Path:
        return Path(snapshot_download(match[1], allow_patterns=patterns, **hub_options))

    try:
        if match[2]:
            return Path(hf_hub_download(match[1], match[2], **hub_options))
        if folders:
            return fetch([f"{folder}/*" for folder in folders])
        path = fetch([MODEL_INDEX, PIPELINE_FILE])
        if (path / PIPELINE_FILE).is_file():
            return fetch(_OF_DIFFUSERS)
        if not (path / MODEL_INDEX).is_file():
            return fetch(_OF_WAN)
        parts_left_out(path / MODEL_INDEX, (*_FOLDERS, *_MORE))
        return fetch(_OF_DIFFUSERS)
    except CheckpointError as reason:
        raise CheckpointError(f"{name} was not downloaded: {reason}") from reason
    except (OSError, ValueError) as reason:  # huggingface_hub's errors are of these two kinds
        hub_message = " ".join(str(reason).split())[:300]
        raise CheckpointError(
            f"cannot get {name} from the Hub, and no file or folder has this name: {hub_message}"
        ) from reason


def _config_of(path: Path, options: LoadOptions) -> ModelConfig:
    """The configuration from, in rising priority, the checkpoint's content, its folder, its pipeline.json, the base."""
    if path.is_file() and path.name == PIPELINE_FILE:
        path = path.parent
    source_file, own = path, dict[str, Any]()
    if path.is_file() and path.suffix == ".json" and not path.name.endswith(".index.json"):
        own = read_fields(path)
    elif (path / PIPELINE_FILE).is_file():
        source_file = path / PIPELINE_FILE
        own = read_fields(source_file)
    fields, inferred, guesses = dict[str, Any](), list[str](), list[str]()
    if path.is_dir():
        fields |= _parts_in(path)
    if (path / MODEL_INDEX).is_file():
        fields["transformer"] = path / "transformer"
        if "transformer" not in own:
            known = [name for name in (*_FOLDERS, *_MORE) if (path / name).is_dir()]
            inferred += parts_left_out(path / MODEL_INDEX, known)
    elif not own:
        fields["transformer"] = path
    if "transformer" not in own and path.is_dir():
        fields |= experts_in(path, path / MODEL_INDEX, inferred)
    fields |= own
    if options.base is not None:
        base = _base_fields(options)
        fields = {**base, **fields, "codec": base["codec"], "text": base["text"]}
        vae = " and VAE" if options.codec_weights is None else ""
        inferred.append(f"text encoder{vae} of {os.fspath(options.base)}")
    _check_complete(fields, path, source_file)
    if "transformer_2" not in fields:
        inferred += models_beside(Path(fields["transformer"]))
    if not {"stream", "sampler"} <= own.keys() or options.preset is not None:
        fields, reasons, guesses = _with_preset(fields, own, options, path)
        inferred = reasons + inferred
    if not WAN.keys() <= fields.keys():
        frames = _frames_of(options.codec_weights or fields["codec"])
        own_size = {"height": options.height, "width": options.width}
        guessed = [f"{name} {value}" for name, value in frames.items() if name not in fields and not own_size.get(name)]
        inferred.append(f"{', '.join(guessed)} by the stride of its VAE")
        fields = {**frames, **fields}
    return replace(ModelConfig.of(fields, source_file), inferred=tuple(inferred), assumed=tuple(guesses))


def _check_complete(fields: dict[str, Any], path: Path, source_file: Path) -> None:
    """Raises CheckpointError if the transformer, the VAE or the text encoder is missing."""
    if fields.keys() >= {*PATHS[:2], "text"}:
        return
    if "transformer" in fields:
        inspect_checkpoint(fields["transformer"])  # raises for what is no transformer either
    raise CheckpointError(
        f"{path} is a transformer alone: name a folder or repository with the text encoder and the VAE as base "
        "(--base of generate), or run it from Python with load_model and sample_chunks"
        if "transformer" in fields
        else f"{source_file} names no transformer"
    )


def _frames_of(codec: str | os.PathLike[str]) -> dict[str, Any]:
    """Size and rate of the frames of a model whose files do not say them, by the stride of its VAE."""
    try:
        stride = codec_footprint(codec, None, WAN["height"], WAN["width"], 1).stride
    except CheckpointError:  # loading the codec will say why
        return WAN
    return BY_STRIDE.get(stride, WAN)


def _parts_in(folder: Path) -> dict[str, Any]:
    """The fields `codec` and `text` of those parts that a folder of diffusers' or Wan's own layout has."""
    found: dict[str, Any] = {}
    codec = next((path for path in (folder / "vae", *(folder / name for name in VAE_FILES)) if path.exists()), None)
    if codec is not None:
        found["codec"] = codec
    text = TextSource(folder)
    if text.is_here():
        found["text"] = text
    encoders = [folder / "image_encoder", *sorted(folder.glob(WAN_FILES))]
    if (encoder := next((path for path in encoders if path.exists()), None)) is not None:
        found["image_encoder"] = encoder
    return found


def _base_fields(options: LoadOptions) -> dict[str, Any]:
    """The fields that `base` supplies: VAE and text encoder, and of an embedded model also the frames' size and fps."""
    base = os.fspath(options.base or "")
    if base in EMBEDDED:
        whole = embedded_config(base)
        return {name: getattr(whole, name) for name in ("codec", "text", "height", "width", "fps")}
    if is_on_hub(base):
        folder = download(base, replace(options, revision=None), ("vae", "text_encoder", "tokenizer", *_MORE[1:]))
    else:
        folder = local_path(base)
    if not folder.is_dir():
        raise CheckpointError(f"base {base!r} is not a folder, and not a Hub repository as org/name")
    found = _parts_in(folder)
    lacking = [what for what, name in (("VAE", "codec"), ("text encoder", "text")) if name not in found]
    if lacking:
        raise CheckpointError(f"base {base} has no {' and no '.join(lacking)} in it")
    return found


def _with_preset(
    fields: dict[str, Any], own: dict[str, Any], options: LoadOptions, path: Path
) -> tuple[dict[str, Any], list[str], list[str]]:
    """The fields with stream and sampler of the named or the inferred preset, the reasons as texts, and the options
    whose settings are guesses."""
    kept, report = dict[str, Any](), inspect_checkpoint(fields["transformer"])
    if options.preset is not None:
        preset, why = find_preset(options.preset), "named"
    else:
        preset = with_index(report.preset, path / MODEL_INDEX)
        kept = {name: own[name] for name in ("stream", "sampler") if name in own}
        if "sampler" not in kept:
            preset = with_scheduler(preset, path / SCHEDULER_FILE)
        why = "; ".join(preset.evidence)
    steps = ", ".join(f"{step:g}" for step in preset.sampler.steps)
    window = "all frames" if preset.stream.window is None else f"window {preset.stream.window}"
    reason = f"preset {preset.name} ({why}): {window}, steps {steps}, shift {preset.sampler.shift:g}"
    reasons, guesses = [reason], _guesses(preset, kept, options)
    if guesses:
        which = f"{', '.join(guesses)} are assumed, and may be wrong for this model"
        reasons.append(f"no preset fits: {which}; set preset= or each of them")
    if "num_heads" in report.assumed:
        reasons.append(f"num_heads {report.config.num_heads} is assumed, by Wan's head width of {WAN_HEAD_DIM}")
    return {**fields, "stream": preset.stream, "sampler": preset.sampler, **kept}, reasons, guesses


def _guesses(preset: Preset, kept: dict[str, Any], options: LoadOptions) -> list[str]:
    """The options of a model without a preset whose settings nothing says."""
    return [
        option
        for home, field, option in _NEEDED
        if field in preset.assumed and home not in kept and getattr(options, option) is None
    ]


def local_path(path: str | os.PathLike[str]) -> Path:
    """Returns a path with ~ replaced by the home folder, if there is one."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def describe_inferred(name: str | os.PathLike[str], config: ModelConfig) -> str | None:
    """Returns the inferred settings of a model in one line, or None if its files have all settings."""
    return f"{os.fspath(name)}: {'; '.join(config.inferred)}" if config.inferred else None
