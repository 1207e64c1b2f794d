"""Small LoRA files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file


def save_lora(file: Path, module: str, seed: int, scale: float = 1.0, sizes: tuple[int, int] = (192, 192)) -> Path:
    """Writes a random LoRA of rank 2.

    Args:
        file: where it is written; the same path is returned.
        module: the one module that it changes.
        seed: of its numbers.
        scale: the factor of its change.
        sizes: how many inputs and outputs the module has; those of toybox's square matrices by default.
    """
    torch.manual_seed(seed)
    inputs, outputs = sizes
    down, up = torch.randn(2, inputs), scale * torch.randn(outputs, 2)
    save_file({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, file)
    return file
