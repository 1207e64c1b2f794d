"""Loading of a codec from a path; the content of the file tells which kind it is."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch

from causalrope_sp.codec.interface import Codec
from causalrope_sp.codec.offloaded_codec import OffloadedCodec
from causalrope_sp.codec.taehv import TaehvCodec
from causalrope_sp.codec.taehv_model import MARKER as TAEHV_MARKER
from causalrope_sp.codec.taehv_model import load_taehv
from causalrope_sp.codec.wan_vae import WanCodec
from causalrope_sp.codec.wan_vae_weights import DIFFUSERS_MARKER, WAN_MARKER, load_vae
from causalrope_sp.errors import CheckpointError, ConfigError
from causalrope_sp.weights.messages import some
from causalrope_sp.weights.quantized_formats import refuse_quantized
from causalrope_sp.weights.tensor_files import WeightFiles

# tensor that no other key layout has -> kind of codec
_LAYOUTS = {DIFFUSERS_MARKER: "wan", WAN_MARKER: "wan", TAEHV_MARKER: "taehv"}
KINDS = tuple(dict.fromkeys(_LAYOUTS.values()))


def load_codec(
    path: str | PathLike[str],
    kind: str | None = None,
    device: torch.device | str = "cpu",
    *,
    offload: bool = False,
) -> Codec:
    """Loads the codec in a file or folder, in float32.

    Args:
        path: a Wan VAE as diffusers' folder or as Wan's own file (`Wan2.1_VAE.pth`, `Wan2.2_VAE.pth`), or a TAEHV file
            (`taew2_1.pth`, `taew2_2.pth`, `lighttaew2_2.pth`).
        kind: the kind that it must be, "wan" or "taehv"; None accepts either.
        device: the device that computes.
        offload: keep the weights on the CPU and copy them to the device for each call (see `OffloadedCodec`).

    Returns:
        The codec.

    Raises:
        ConfigError: `kind` is unknown.
        CheckpointError: nothing at `path` can be read, or it is no codec or one of another kind.
    """
    files, found = open_codec(path, kind)
    home = "cpu" if offload else device
    try:
        if found == "wan":
            vae = load_vae(files).to(home)
            return OffloadedCodec(WanCodec(vae), vae, device) if offload else WanCodec(vae)
        model = load_taehv(files).to(home)
        return OffloadedCodec(TaehvCodec(model), model, device) if offload else TaehvCodec(model)
    except CheckpointError as reason:
        raise CheckpointError(f"cannot read the codec: {reason}") from reason


def open_codec(path: str | PathLike[str], kind: str | None = None) -> tuple[WeightFiles, str]:
    """Opens a codec's file and tells its kind by the headers.

    Args:
        path: as for `load_codec`.
        kind: as for `load_codec`.

    Returns:
        The open file, and "wan" or "taehv".

    Raises:
        CheckpointError, ConfigError: as `load_codec` raises them.
    """
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"unknown codec {kind!r}; this version has: {', '.join(KINDS)}")
    try:
        files = WeightFiles(Path(path)).of_network("codec")
        refuse_quantized(files)
        found = next((found for marker, found in _LAYOUTS.items() if marker in files.tensors), None)
        if found is None:
            keys = some(list(files.tensors)) or "none"
            raise CheckpointError(f"{path}: of no known layout ({', '.join(_LAYOUTS)}); its keys are {keys}")
        if kind not in (None, found):
            raise CheckpointError(f"{path}: holds a {found} codec, not {kind}; name the file of a {kind} codec")
        return files, found
    except CheckpointError as reason:
        raise CheckpointError(f"cannot read the codec: {reason}") from reason
