"""From a model to a file that any Wan code can read."""

from __future__ import annotations

import json
from dataclasses import asdict
from os import PathLike
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from causalrope_sp.errors import ConfigError
from causalrope_sp.weights.fp8 import is_fp8
from causalrope_sp.weights.key_layout import stored_tensors
from causalrope_sp.weights.wan_keys import WAN

if TYPE_CHECKING:
    from causalrope_sp.models.causal_dit import CausalDiT


def save_model(model: CausalDiT, path: str | PathLike[str]) -> None:
    """Writes the model as one safetensors file under Wan's own names, its configuration in the metadata.

    Raises:
        ConfigError: its weights are in 8 bits, which no layout has.
    """
    if is_fp8(model):
        raise ConfigError("a model with fp8 weights cannot be saved: save it with full weights, fold them at loading")
    metadata = {"layout": WAN.name, "config": json.dumps(asdict(model.config))}
    save_file(stored_tensors(WAN, model.config, model.state_dict()), path, metadata)
