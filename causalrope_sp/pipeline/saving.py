"""Writes a model as a diffusers folder, whose parts diffusers can load, with a pipeline.json for this library."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from causalrope_sp.codec.wan_vae import wan_vae_of
from causalrope_sp.errors import ConfigError, OutputError, printable
from causalrope_sp.pipeline.image_control import takes_image
from causalrope_sp.pipeline.model_config import PIPELINE_FILE
from causalrope_sp.pipeline.model_source import local_path
from causalrope_sp.pipeline.option_checks import check_path
from causalrope_sp.text import TextSource
from causalrope_sp.weights import save_diffusers
from causalrope_sp.weights.fp8 import is_fp8

if TYPE_CHECKING:
    from causalrope_sp.pipeline.loading import Parts


def save_parts(parts: Parts, folder: str | os.PathLike[str]) -> None:
    """Writes transformer, VAE, text encoder, tokenizer, scheduler and pipeline.json into a folder.

    Args:
        parts: the model.
        folder: the folder to write; it is created if it does not exist.

    Raises:
        ConfigError: `folder` is no path, or the weights are fp8, which the diffusers layout does not have.
        OutputError: the folder cannot be written.
    """
    if any(map(is_fp8, parts.models)):
        raise ConfigError("a model with fp8 weights cannot be saved; load it with weights='full'")
    home = local_path(check_path("folder", folder))
    try:
        if home.exists() and not home.is_dir():
            raise OutputError(f"cannot write {home}: a file of that name is in the way")
        home.mkdir(parents=True, exist_ok=True)
        save_diffusers(parts.model, home / "transformer")
        index: dict[str, Any] = {"transformer": ["diffusers", "WanTransformer3DModel"]}
        if parts.low_noise is not None:
            save_diffusers(parts.low_noise.model, home / "transformer_2")
            index |= {"transformer_2": index["transformer"], "boundary_ratio": parts.config.boundary_ratio}
        codec = _save_codec(parts, home)
        index |= {"vae": ["diffusers", "AutoencoderKLWan"]} if codec == "vae" else {}
        index |= _save_scheduler(parts, home) | _save_text(parts, home)
        index |= _save_image_encoder(parts, home)
        kind = "WanImageToVideoPipeline" if takes_image(parts.model.config, parts.codec) else "WanPipeline"
        _write(home / "model_index.json", {"_class_name": kind, **index})
        _write(home / PIPELINE_FILE, _settings(parts, home, codec))
    except OSError as reason:
        raise OutputError(f"cannot write {printable(home)}: {reason.strerror or reason}") from reason


def _save_scheduler(parts: Parts, home: Path) -> dict[str, Any]:
    """Wan's own scheduler with the sampler's shift, for diffusers; this library reads the pipeline.json instead."""
    (home / "scheduler").mkdir(exist_ok=True)
    scheduler = {
        "_class_name": "UniPCMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": parts.config.sampler.shift,
    }
    _write(home / "scheduler" / "scheduler_config.json", scheduler)
    return {"scheduler": ["diffusers", "UniPCMultistepScheduler"]}


def _save_codec(parts: Parts, home: Path) -> str:
    """Writes the Wan VAE in diffusers' layout, another codec as a copy of its file; returns its name in the folder."""
    vae = wan_vae_of(parts.codec)
    if vae is not None:
        vae.save_pretrained(home / "vae")
        return "vae"
    name = Path(parts.config.codec).name
    _copy(Path(parts.config.codec), home / name)
    return name


def _save_text(parts: Parts, home: Path) -> dict[str, Any]:
    """Copies of the files of UMT5 and its tokenizer; nothing for a text encoder without weights."""
    if not isinstance(parts.config.text, TextSource) or not parts.config.text.is_here():
        return {}
    weights, tokenizer = parts.config.text.find()
    if weights.is_dir():
        _copy(weights, home / "text_encoder")
        _copy(tokenizer.parent, home / "tokenizer")
        return {"text_encoder": ["transformers", "UMT5EncoderModel"], "tokenizer": ["transformers", "T5TokenizerFast"]}
    _copy(weights, home / weights.name)
    _copy(tokenizer.parent, home / "google" / "umt5-xxl")
    return {}


def _save_image_encoder(parts: Parts, home: Path) -> dict[str, Any]:
    """Copies of the folders of the image encoder and its processor, or of Wan's file, if there are."""
    encoder = parts.config.image_encoder
    if encoder is None:
        return {}
    if encoder.is_file():  # of Wan's, which diffusers cannot read
        _copy(encoder, home / encoder.name)
        return {}
    _copy(encoder, home / "image_encoder")
    _copy(encoder.parent / "image_processor", home / "image_processor")
    return {
        "image_encoder": ["transformers", "CLIPVisionModel"],
        "image_processor": ["transformers", "CLIPImageProcessor"],
    }


def _settings(parts: Parts, home: Path, codec: str) -> dict[str, Any]:
    """The fields of the pipeline.json; the file of a Video Interface Network is copied into the folder."""
    config = parts.config
    text = config.text if isinstance(config.text, str) else "./"
    settings = {"transformer": "transformer", "codec": codec, "text": text, **config.as_json()}
    if config.transformer_2 is not None:
        settings["transformer_2"] = "transformer_2"
    if config.image_encoder is not None:
        settings["image_encoder"] = config.image_encoder.name
    if config.vin is not None:
        _copy(config.vin, home / Path(config.vin).name)
        settings["vin"] = Path(config.vin).name
    return settings


def _copy(source: Path, target: Path) -> None:
    """Copies a file or a folder, unless the model is saved into the folder that it was opened from."""
    if target.exists() and target.samefile(source):
        return
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copy2(source, target)


def _write(file: Path, fields: dict[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2) + "\n")
