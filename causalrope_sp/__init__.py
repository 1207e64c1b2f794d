"""Causal-RoPE sequence parallelism: one causal video stream on many GPUs, yielding frames while it is made."""

from causalrope_sp.cache import KVCache
from causalrope_sp.config import PRESETS, DiTConfig, SamplerConfig, StreamConfig
from causalrope_sp.errors import CausalRopeError, CheckpointError, ConfigError, OutputError, PromptError
from causalrope_sp.grid import Chunk, LatentGrid
from causalrope_sp.model import CausalDiT
from causalrope_sp.parallel import SequenceParallel
from causalrope_sp.pipeline import CausalVideoPipeline
from causalrope_sp.sampler import sample_chunks
from causalrope_sp.weights import load_model

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "CausalDiT",
    "CausalRopeError",
    "CausalVideoPipeline",
    "CheckpointError",
    "Chunk",
    "ConfigError",
    "DiTConfig",
    "KVCache",
    "LatentGrid",
    "OutputError",
    "PromptError",
    "SamplerConfig",
    "SequenceParallel",
    "StreamConfig",
    "load_model",
    "sample_chunks",
]
