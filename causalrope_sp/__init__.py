"""Causal-RoPE sequence parallelism: one causal video stream on many GPUs, yielding frames while it is made."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from causalrope_sp.version import __version__

if TYPE_CHECKING:
    from causalrope_sp.cache.kv_cache import KVCache
    from causalrope_sp.config import DiTConfig, SamplerConfig, StreamConfig
    from causalrope_sp.distributed import SequenceParallel
    from causalrope_sp.errors import CausalRopeError, CheckpointError, ConfigError, InputError, OutputError, PromptError
    from causalrope_sp.grid import Chunk, LatentGrid
    from causalrope_sp.models.causal_dit import CausalDiT
    from causalrope_sp.pipeline.generation_options import GenerationOptions
    from causalrope_sp.pipeline.load_options import LoadOptions
    from causalrope_sp.pipeline.offload import Offload
    from causalrope_sp.pipeline.output import VideoChunk
    from causalrope_sp.pipeline.pipeline import CausalVideoPipeline
    from causalrope_sp.pipeline.results import CausalVideoPipelineOutput
    from causalrope_sp.sampling.sampler import sample_chunks
    from causalrope_sp.weights import load_model

_HOME = {
    "KVCache": "cache.kv_cache",
    "DiTConfig": "config",
    "SamplerConfig": "config",
    "StreamConfig": "config",
    "CausalRopeError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "InputError": "errors",
    "OutputError": "errors",
    "PromptError": "errors",
    "Chunk": "grid",
    "LatentGrid": "grid",
    "CausalDiT": "models.causal_dit",
    "SequenceParallel": "distributed",
    "CausalVideoPipeline": "pipeline.pipeline",
    "CausalVideoPipelineOutput": "pipeline.results",
    "GenerationOptions": "pipeline.generation_options",
    "LoadOptions": "pipeline.load_options",
    "Offload": "pipeline.offload",
    "VideoChunk": "pipeline.output",
    "sample_chunks": "sampling.sampler",
    "load_model": "weights",
}

__all__ = [
    "CausalDiT",
    "CausalRopeError",
    "CausalVideoPipeline",
    "CausalVideoPipelineOutput",
    "CheckpointError",
    "Chunk",
    "ConfigError",
    "DiTConfig",
    "GenerationOptions",
    "InputError",
    "KVCache",
    "LatentGrid",
    "LoadOptions",
    "Offload",
    "OutputError",
    "PromptError",
    "SamplerConfig",
    "SequenceParallel",
    "StreamConfig",
    "VideoChunk",
    "__version__",
    "load_model",
    "sample_chunks",
]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that the command line answers before torch is loaded."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
