"""A VIN as a file: its parameters under their own names, and in the metadata what it is and how its videos are cut.

There is no published layout: this is the first. Sizes of the DiT that it was trained with are kept too, so that a file
beside another DiT is refused before it runs.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from os import PathLike

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from causalrope_sp.config import DiTConfig
from causalrope_sp.errors import CheckpointError
from causalrope_sp.vin.config import TogetherConfig, VINConfig
from causalrope_sp.vin.network import VideoInterfaceNetwork
from causalrope_sp.weights.finite import all_finite

LAYOUT = "causalrope_sp-vin-1"
BESIDE = ("dim", "num_heads", "num_layers", "text_dim", "freq_dim", "in_channels", "patch_size")  # what must agree


def save_vin(vin: VideoInterfaceNetwork, chunks: TogetherConfig, path: str | PathLike[str]) -> None:
    """Writes one safetensors file."""
    metadata = {
        "layout": LAYOUT,
        "vin": json.dumps(asdict(vin.config)),
        "chunks": json.dumps(asdict(chunks)),
        "dit": json.dumps(_beside(vin.dit)),
    }
    save_file({name: x.contiguous() for name, x in vin.state_dict().items()}, path, metadata)


def load_vin(
    path: str | PathLike[str], dit: DiTConfig, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[VideoInterfaceNetwork, TogetherConfig]:
    """The VIN of a file, in eval mode and without gradients, and how its videos are cut.

    Raises:
        CheckpointError: unreadable, no VIN, one for a DiT of other sizes than `dit`, or weights missing, left over, of
            a wrong shape, NaN or infinite.
    """
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            if said.get("layout") != LAYOUT:
                raise CheckpointError(f"{path}: not a Video Interface Network: its layout is not {LAYOUT}")
            config, chunks = VINConfig(**json.loads(said["vin"])), TogetherConfig(**json.loads(said["chunks"]))
            there, here = json.loads(said["dit"]), _beside(dit)
            wrong = [
                f"{name} {there.get(name)}, not {value}" for name, value in here.items() if there.get(name) != value
            ]
            if wrong:
                raise CheckpointError(f"{path}: for another DiT than this one: {'; '.join(wrong)}")
            state = {name: file.get_tensor(name).to(device, dtype) for name in file.keys()}
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as reason:
        raise CheckpointError(f"{path}: cannot be read as a Video Interface Network: {reason}") from reason
    broken = [name for name, tensor in state.items() if not all_finite(tensor)]
    if broken:
        raise CheckpointError(f"{path}: NaN or infinite: {', '.join(broken)}")
    vin = VideoInterfaceNetwork(config, dit).to(device, dtype)
    try:
        vin.load_state_dict(state, strict=True)
    except RuntimeError as reason:
        raise CheckpointError(f"{path}: {' '.join(str(reason).split())}") from reason
    return vin.eval().requires_grad_(False), chunks


def _beside(dit: DiTConfig) -> dict[str, object]:
    """The sizes of a DiT that a VIN depends on, as JSON gives them back."""
    return {name: list(x) if isinstance(x := getattr(dit, name), tuple) else x for name in BESIDE}
