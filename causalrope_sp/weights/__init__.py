"""Checkpoints: key layouts, wrappings, LoRA files and presets, and the loading of a checkpoint into the causal DiT."""

from causalrope_sp.weights.adapter_file import AdapterReport, inspect_adapter
from causalrope_sp.weights.checkpoint_report import CheckpointReport
from causalrope_sp.weights.dit_loader import checkpoint_digest, inspect_checkpoint, load_model, outline_model
from causalrope_sp.weights.lora import Lora
from causalrope_sp.weights.model_presets import FAMILY, Preset, find_preset
from causalrope_sp.weights.save import save_diffusers, save_model

__all__ = [
    "FAMILY",
    "AdapterReport",
    "CheckpointReport",
    "Lora",
    "Preset",
    "checkpoint_digest",
    "find_preset",
    "inspect_adapter",
    "inspect_checkpoint",
    "load_model",
    "outline_model",
    "save_diffusers",
    "save_model",
]
