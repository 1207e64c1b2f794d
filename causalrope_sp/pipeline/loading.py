"""From a model's files to its parts in memory, on every rank."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from causalrope_sp.codec import Codec, load_codec
from causalrope_sp.config import SamplerConfig
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.distributed.layout import Layout, parse_strategy
from causalrope_sp.errors import ConfigError
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.pipeline.decoding import check_decode
from causalrope_sp.pipeline.load_options import LoadOptions
from causalrope_sp.pipeline.model_config import ModelConfig
from causalrope_sp.pipeline.model_source import describe_inferred, find_model, is_on_hub
from causalrope_sp.pipeline.offload import Offload
from causalrope_sp.pipeline.option_checks import check_dtype
from causalrope_sp.pipeline.parallel_chunks import ParallelChunks, check_requested
from causalrope_sp.pipeline.preflight import check_memory, describe_run
from causalrope_sp.planning.strategy import choose_strategy
from causalrope_sp.sampling.guidance import check_guidance
from causalrope_sp.weights import load_model, outline_model

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """All that a pipeline is made of, on this rank."""

    config: ModelConfig
    model: CausalDiT
    codec: Codec
    parallel_chunks: ParallelChunks | None
    layout: Layout
    options: LoadOptions

    @property
    def offload(self) -> Offload:
        """What waits off the device."""
        return offload_of(self.options)


def load_parts(model: str | os.PathLike[str], options: LoadOptions, parallel: SequenceParallel) -> Parts:
    """Loads a model. Every rank must call it.

    Args:
        model: what `find_model` takes.
        options: how it is loaded.
        parallel: the ranks.

    Raises:
        CheckpointError: nothing readable there, or weights that do not fit.
        ConfigError: settings that cannot work together, ranks that cannot share this model, or a run that is predicted
            not to fit into memory.
    """
    config = _find_on_every_rank(model, options, parallel)
    _check_settings(config, options, parallel)
    ranks, device, dtype = parallel.everyone, parallel.device, dtype_of(options, parallel.device)
    layout = plan_run(config, options, parallel)
    dit = _load_transformer(config, dtype, parallel)
    chunks = None
    if (vin := config.vin) is not None:
        chunks = ranks.run_collectively(lambda: ParallelChunks.load(vin, dit.config, dtype, device))
    offload = offload_of(options).codec
    codec = ranks.run_collectively(lambda: load_codec(config.codec, options.codec, device, offload=offload))
    if parallel.rank == 0 and (inferred := describe_inferred(model, config)):
        _log.info("%s", inferred)
    return Parts(config, dit, codec, chunks, layout, options)


def plan_run(config: ModelConfig, options: LoadOptions, parallel: SequenceParallel, loaded: bool = False) -> Layout:
    """Refuses a run that is predicted not to fit into memory, and chooses how its ranks share attention. Every rank
    must call it.

    Args:
        config: the model and how it runs.
        options: how it is loaded.
        parallel: the ranks.
        loaded: whether the weights are in memory already.

    Raises:
        ConfigError: it will not fit, or ranks that the strategy cannot use.
    """
    ranks, itemsize = parallel.everyone, dtype_of(options, parallel.device).itemsize
    offload, decode, codec = offload_of(options), options.decode, options.codec
    run = ranks.run_collectively(lambda: describe_run(config, parallel, offload, decode, itemsize, codec))
    if options.preflight and config.vin is None:  # parallel chunks keep no cache of a stream
        ranks.run_collectively(lambda: check_memory(run, parallel, loaded))
    chosen = choose_strategy(run.work, run.machine, parallel, run.auxiliary)
    return parse_strategy(ranks.first_says(chosen.name), parallel.mesh.sp)  # by what rank 0 has beside the DiT


def dtype_of(options: LoadOptions, device: torch.device) -> torch.dtype:
    """The dtype of the transformer on a device."""
    return check_dtype(options.dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32))


def offload_of(options: LoadOptions) -> Offload:
    """What waits off the device."""
    return options.offload if isinstance(options.offload, Offload) else Offload()


def _find_on_every_rank(model: str | os.PathLike[str], options: LoadOptions, parallel: SequenceParallel) -> ModelConfig:
    """The configuration. One rank of a machine downloads what is on the Hub, and then the others find it there."""
    ranks = parallel.everyone
    if is_on_hub(model) or (options.base is not None and is_on_hub(options.base)):
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        ranks.run_collectively(lambda: find_model(model, options) if first else None)
    return ranks.run_collectively(lambda: find_model(model, options))


def _check_settings(config: ModelConfig, options: LoadOptions, parallel: SequenceParallel) -> None:
    """Refuses, before anything is loaded, settings that cannot work together. Every rank says the same."""
    check_decode(options.decode, parallel.mesh.decode)
    parallel.everyone.agree({"parallel chunks": (options.parallel_chunks, config.vin is not None)})
    changes = [name for name in ("window", "sink", "chunk_frames", "rope") if getattr(options, name) is not None]
    if parallel.mesh.decode:
        changes.append("decode ranks")
    if config.sampler.guidance_scale != 1:
        changes.append("guidance")
    check_requested(options.parallel_chunks, config.vin, changes)
    check_mesh(config.sampler, parallel, config.vin is not None)


def check_mesh(sampler: SamplerConfig, parallel: SequenceParallel, parallel_chunks: bool) -> None:
    """Raises ConfigError for guidance at no step, or for a mesh axis that nothing uses."""
    check_guidance(sampler, parallel.mesh.cfg)
    if parallel.mesh.chunk > 1 and not parallel_chunks:
        raise ConfigError(f"chunk {parallel.mesh.chunk} of the mesh is for chunks made in parallel alone")


def _load_transformer(config: ModelConfig, dtype: torch.dtype, parallel: SequenceParallel) -> CausalDiT:
    """The transformer, or on a decode rank its outline without weights."""
    if parallel.decodes:
        return outline_model(Path(config.transformer))
    return load_model(
        config.transformer, dtype=dtype, device=parallel.device, weights=config.weights, readers=parallel.denoisers
    )
