"""From a path to a codec: which one it is, by its content."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch

from causalrope_sp.codec import taehv
from causalrope_sp.codec.interface import Codec
from causalrope_sp.codec.offloaded_codec import OffloadedCodec
from causalrope_sp.codec.taehv import TaehvCodec
from causalrope_sp.codec.wan_vae import WanCodec
from causalrope_sp.codec.wan_vae_weights import DIFFUSERS_MARKER, WAN_MARKER, load_vae
from causalrope_sp.errors import CheckpointError, ConfigError
from causalrope_sp.weights.messages import some
from causalrope_sp.weights.tensor_files import WeightFiles

# a tensor that no other layout has -> the kind of codec
_LAYOUTS = {DIFFUSERS_MARKER: "wan", WAN_MARKER: "wan", taehv.MARKER: "taehv"}
KINDS = tuple(dict.fromkeys(_LAYOUTS.values()))


def load_codec(
    path: str | PathLike[str],
    kind: str | None = None,
    device: torch.device | str = "cpu",
    *,
    offload: bool = False,
) -> Codec:
    """The codec in a file or folder, in float32, ready to run.

    Args:
        path: a Wan VAE as diffusers' folder or as Wan's own file (`Wan2.1_VAE.pth`), or a TAEHV file (`taew2_1.pth`).
        kind: what it must be; None takes what it is.
        device: where it computes.
        offload: its weights are there only while they are used, and wait on the CPU (see `OffloadedCodec`).

    Raises:
        ConfigError: an unknown `kind`.
        CheckpointError: nothing readable at `path`, or no such codec in it.
    """
    files, found = open_codec(path, kind)
    home = "cpu" if offload else device
    try:
        if found == "wan":
            vae = load_vae(files).to(home)
            return OffloadedCodec(WanCodec(vae), vae, device) if offload else WanCodec(vae)
        model = taehv.load_taehv(files).to(home)
        return OffloadedCodec(TaehvCodec(model), model, device) if offload else TaehvCodec(model)
    except CheckpointError as reason:
        raise CheckpointError(f"cannot read the codec: {reason}") from reason


def open_codec(path: str | PathLike[str], kind: str | None = None) -> tuple[WeightFiles, str]:
    """A codec's open file, by its headers alone, and which kind it holds. Raises as `load_codec` does."""
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"unknown codec {kind!r}; this version has: {', '.join(KINDS)}")
    try:
        files = WeightFiles(Path(path))
        found = next((found for marker, found in _LAYOUTS.items() if marker in files.tensors), None)
        if found is None:
            keys = some(list(files.tensors)) or "none"
            raise CheckpointError(f"{path}: of no known layout ({', '.join(_LAYOUTS)}); its keys are {keys}")
        if kind not in (None, found):
            raise CheckpointError(f"{path}: holds a {found} codec, not {kind}; name the file of a {kind} codec")
        return files, found
    except CheckpointError as reason:
        raise CheckpointError(f"cannot read the codec: {reason}") from reason
