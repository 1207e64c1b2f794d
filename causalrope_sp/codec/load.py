"""From a path to a codec: which one it is, by its content."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path

import torch

from causalrope_sp.codec import taehv
from causalrope_sp.codec.interface import Codec
from causalrope_sp.codec.taehv import TaehvCodec
from causalrope_sp.codec.tensors import some
from causalrope_sp.codec.wan import WanCodec
from causalrope_sp.codec.wan_weights import DIFFUSERS_MARKER, WAN_MARKER, load_diffusers_vae, load_wan_vae
from causalrope_sp.errors import CheckpointError, ConfigError
from causalrope_sp.weights.files import WeightFiles

# a tensor that no other layout has -> the kind of codec, and how it is read from the open file
_LAYOUTS: dict[str, tuple[str, Callable[[WeightFiles, torch.device | str], Codec]]] = {
    DIFFUSERS_MARKER: ("wan", lambda files, device: WanCodec(load_diffusers_vae(files).to(device))),
    WAN_MARKER: ("wan", lambda files, device: WanCodec(load_wan_vae(files).to(device))),
    taehv.MARKER: ("taehv", lambda files, device: TaehvCodec(taehv.load_taehv(files).to(device))),
}
KINDS = tuple(dict.fromkeys(kind for kind, _ in _LAYOUTS.values()))


def load_codec(path: str | PathLike[str], kind: str | None = None, device: torch.device | str = "cpu") -> Codec:
    """The codec in a file or folder, in float32, ready to run.

    Args:
        path: a Wan VAE as diffusers' folder or as Wan's own file (`Wan2.1_VAE.pth`), or a TAEHV file (`taew2_1.pth`).
        kind: what it must be; None takes what it is.

    Raises:
        ConfigError: an unknown `kind`.
        CheckpointError: nothing readable at `path`, or no such codec in it.
    """
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"unknown codec {kind!r}; this version has: {', '.join(KINDS)}")
    try:
        files = WeightFiles(Path(path))
        found = next((layout for marker, layout in _LAYOUTS.items() if marker in files.tensors), None)
        if found is None:
            keys = some(list(files.tensors)) or "none"
            raise CheckpointError(f"{path}: of no known layout ({', '.join(_LAYOUTS)}); its keys are {keys}")
        if kind not in (None, found[0]):
            raise CheckpointError(f"{path}: holds a {found[0]} codec, not {kind}; name the file of a {kind} codec")
        return found[1](files, device)
    except CheckpointError as reason:
        raise CheckpointError(f"cannot read the codec: {reason}") from reason
