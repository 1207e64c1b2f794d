"""Checkpoints: one file a layout, its detection by content, and loading into the causal DiT."""

from causalrope_sp.weights.load import CheckpointReport, inspect_checkpoint, load_model
from causalrope_sp.weights.save import save_model

__all__ = ["CheckpointReport", "inspect_checkpoint", "load_model", "save_model"]
