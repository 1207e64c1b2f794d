"""Loads the parts of a model on every rank, and chooses how its ranks share attention."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from causalrope_sp.codec import Codec, load_codec
from causalrope_sp.config import SamplerConfig
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.distributed.layout import Layout, parse_strategy
from causalrope_sp.errors import ConfigError
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.pipeline.decoding import check_decode
from causalrope_sp.pipeline.experts import loras_of_models
from causalrope_sp.pipeline.load_options import LoadOptions
from causalrope_sp.pipeline.model_config import ModelConfig
from causalrope_sp.pipeline.model_source import describe_inferred, find_model, is_hub_name
from causalrope_sp.pipeline.offload import Offload
from causalrope_sp.pipeline.option_checks import check_dtype
from causalrope_sp.pipeline.parallel_chunks import ParallelChunks, check_requested
from causalrope_sp.pipeline.preflight import Run, check_memory, describe_run
from causalrope_sp.planning.strategy import choose_strategy, common_machine
from causalrope_sp.sampling.guidance import check_guidance
from causalrope_sp.sampling.stream_options import LowNoiseExpert, check_attention
from causalrope_sp.weights import load_model, outline_model
from causalrope_sp.weights.lora import Lora

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """The loaded parts of a pipeline on this rank.

    Args:
        config: the files of the model and its settings.
        model: the transformer; without weights on a decode rank. Of two, that of the steps at high noise.
        low_noise: the transformer of the steps at low noise; None where there is one.
        codec: the VAE.
        parallel_chunks: the Video Interface Network; None for a model that generates a stream.
        layout: how the ranks share attention.
        options: how the model was loaded.
        run: what was planned; None after a move to another device.
    """

    config: ModelConfig
    model: CausalDiT
    codec: Codec
    parallel_chunks: ParallelChunks | None
    layout: Layout
    options: LoadOptions
    run: Run | None = None
    low_noise: LowNoiseExpert | None = None

    @property
    def models(self) -> list[CausalDiT]:
        """The transformers, one or two."""
        return [self.model] if self.low_noise is None else [self.model, self.low_noise.model]

    @property
    def offload(self) -> Offload:
        """Which weights leave the device between two uses."""
        return offload_of(self.options)

    def with_model(self, model: CausalDiT) -> Parts:
        """Returns the parts with another transformer, which what was planned then counts."""
        run = self.run and replace(self.run, work=replace(self.run.work, config=model.config))
        return replace(self, model=model, run=run)

    def moved_to(self, device: torch.device, dtype: torch.dtype) -> Parts:
        """Returns the parts on another device, with transformer and Video Interface Network in another dtype."""
        chunks, expert = self.parallel_chunks, self.low_noise
        # a cast to its own dtype would narrow what is kept in float32
        models = [m.to(device) if dtype == m.dtype else m.to(device, dtype) for m in self.models]
        return replace(
            self,
            model=models[0],
            low_noise=expert and replace(expert, model=models[-1]),
            codec=load_codec(self.config.codec, self.codec.name, device, offload=self.offload.codec),
            parallel_chunks=chunks and replace(chunks, vin=chunks.vin.to(device, dtype)),
            options=replace(self.options, dtype=dtype),
            run=None,
        )


def load_parts(model: str | os.PathLike[str], options: LoadOptions, parallel: SequenceParallel) -> Parts:
    """Loads a model. Every rank must call it.

    Args:
        model: a name or path as `find_model` takes it.
        options: how the model is loaded.
        parallel: the ranks.

    Returns:
        The parts of the model on this rank.

    Raises:
        CheckpointError: the model cannot be read, or its weights do not fit it.
        ConfigError: settings contradict each other, the ranks cannot share this model, or the run is predicted not to
            fit into memory.
    """
    config = _find_on_every_rank(model, options, parallel)
    _check_settings(config, options, parallel)
    ranks, device, dtype = parallel.everyone, parallel.device, dtype_of(options, parallel.device)
    run, layout = plan_run(config, options, parallel)
    loras = loras_of_models((*config.loras, *options.loras), len(config.transformers))
    dit, expert = _load_transformer(config.transformer, loras[0], config, options, parallel), None
    if config.transformer_2 is not None:
        assert config.boundary_ratio is not None, "the configuration checks that both are given"
        second = _load_transformer(config.transformer_2, loras[1], config, options, parallel)
        expert = LowNoiseExpert(second, 1000 * config.boundary_ratio)
    chunks = None
    if (vin := config.vin) is not None:
        chunks = ranks.run_collectively(lambda: ParallelChunks.load(vin, dit.config, dtype, device))
    offload = offload_of(options).codec
    codec = ranks.run_collectively(lambda: load_codec(config.codec, options.codec, device, offload=offload))
    if parallel.rank == 0 and (inferred := describe_inferred(model, config)):
        _log.log(logging.WARNING if config.assumed else logging.INFO, "%s", inferred)
    return Parts(config, dit, codec, chunks, layout, options, run, expert)


def plan_run(
    config: ModelConfig, options: LoadOptions, parallel: SequenceParallel, held: int | None = None
) -> tuple[Run, Layout]:
    """Checks that a run fits into memory, and chooses how its ranks share attention. Every rank must call it.

    Args:
        config: the files of the model and its settings.
        options: how the model is loaded.
        parallel: the ranks.
        held: what open streams hold, if the weights are in memory already; see `check_memory`.

    Returns:
        The run, and the layout of the attention strategy, the same on every rank.

    Raises:
        ConfigError: the run is predicted not to fit, or the strategy cannot use these ranks.
    """
    run = describe_for(config, options, parallel)
    if options.preflight and config.vin is None:  # parallel chunks have no KV cache
        parallel.everyone.run_collectively(lambda: check_memory(run, parallel, held))
    return run, choose_layout(run, parallel)


def describe_for(config: ModelConfig, options: LoadOptions, parallel: SequenceParallel) -> Run:
    """Describes what this rank runs; see `describe_run`. Every rank must call it."""
    itemsize = dtype_of(options, parallel.device).itemsize
    offload, decode, codec, graphs = offload_of(options), options.decode, options.codec, options.graphs
    run = parallel.everyone.run_collectively(
        lambda: describe_run(config, parallel, offload, decode, itemsize, codec, graphs)
    )
    return replace(run, machine=common_machine(parallel, everyone=True))


def choose_layout(run: Run, parallel: SequenceParallel) -> Layout:
    """Chooses how the ranks share attention, the same on every rank, all of which must call it.

    Raises:
        ConfigError: the strategy cannot use these ranks.
    """
    chosen = choose_strategy(run.work, run.machine, parallel, run.auxiliary)
    name = parallel.everyone.first_says(chosen.name)  # rank 0 has the text encoder as well
    return parse_strategy(name, parallel.mesh.sp)


def dtype_of(options: LoadOptions, device: torch.device) -> torch.dtype:
    """Returns the dtype of the transformer on a device."""
    return check_dtype(options.dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32))


def offload_of(options: LoadOptions) -> Offload:
    """Returns which weights leave the device between two uses."""
    return options.offload if isinstance(options.offload, Offload) else Offload()


def _find_on_every_rank(model: str | os.PathLike[str], options: LoadOptions, parallel: SequenceParallel) -> ModelConfig:
    """The configuration. One rank of each machine downloads files from the Hub, then the others find them on disk.

    Names alone decide whether there are two steps: a folder of that name may be on the disk of some machines only.
    """
    ranks = parallel.everyone
    if is_hub_name(model) or (options.base is not None and is_hub_name(options.base)):
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        ranks.run_collectively(lambda: find_model(model, options) if first else None)
    return ranks.run_collectively(lambda: find_model(model, options))


def _check_settings(config: ModelConfig, options: LoadOptions, parallel: SequenceParallel) -> None:
    """Raises ConfigError on every rank, before anything is loaded, for settings that contradict each other."""
    check_decode(options.decode, parallel.mesh.decode)
    check_attention(config.stream, parallel.attention)
    parallel.everyone.agree({"parallel chunks": (options.parallel_chunks, config.vin is not None)})
    of_stream = ("window", "sink", "chunk_frames", "rope", "window_policy", "similar_frames", "cache", "heads")
    changes = [name for name in of_stream if getattr(options, name) is not None]
    if parallel.mesh.decode:
        changes.append("decode ranks")
    if config.sampler.guidance_scale != 1:
        changes.append("guidance")
    check_requested(options.parallel_chunks, config.vin, changes)
    loras_of_models((*config.loras, *options.loras), len(config.transformers))
    check_mesh(config.sampler, parallel, config.vin is not None)


def check_mesh(sampler: SamplerConfig, parallel: SequenceParallel, parallel_chunks: bool) -> None:
    """Checks the sizes of the mesh axes.

    Args:
        sampler: steps and guidance.
        parallel: the ranks.
        parallel_chunks: whether chunks are sampled in parallel.

    Raises:
        ConfigError: guidance applies to no step, or a mesh axis larger than 1 is not used.
    """
    check_guidance(sampler, parallel.mesh.cfg)
    if parallel.mesh.chunk > 1 and not parallel_chunks:
        raise ConfigError(f"chunk {parallel.mesh.chunk} of the mesh is for chunks made in parallel alone")


def _load_transformer(
    path: Path, loras: Sequence[Lora], config: ModelConfig, options: LoadOptions, parallel: SequenceParallel
) -> CausalDiT:
    """A transformer, or on a decode rank a model without weights."""
    if parallel.decodes:
        return outline_model(Path(path))
    return load_model(
        path,
        dtype=dtype_of(options, parallel.device),
        device=parallel.device,
        loras=loras,
        weights=config.weights,
        readers=parallel.denoisers,
    )
