"""Predicts from file headers, before weights are loaded, whether a run fits into memory, and refuses it if not.

The cost model predicts the memory in bytes, and the device reports what is free. The error says by how much memory is
short and names the options that would make the run fit; each of them has been tried on the cost model.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from fractions import Fraction

from causalrope_sp.codec.codec_footprint import CodecFootprint, codec_footprint
from causalrope_sp.config import Keep
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import LatentGrid
from causalrope_sp.pipeline.decoding import Decode
from causalrope_sp.pipeline.free_memory import free_bytes
from causalrope_sp.pipeline.image_encoder import encoder_bytes
from causalrope_sp.pipeline.model_config import ModelConfig
from causalrope_sp.pipeline.offload import Offload
from causalrope_sp.planning.cost import Plan, plan
from causalrope_sp.planning.machines import Machine, default_machine
from causalrope_sp.planning.memory import AuxiliaryMemory
from causalrope_sp.planning.workload import Workload
from causalrope_sp.text import TextSource
from causalrope_sp.text.text_footprint import text_bytes
from causalrope_sp.weights import inspect_checkpoint

CUDA_WORKSPACE = 1 << 29  # bytes, estimated: cuBLAS, NCCL, kernels and the gaps between blocks
MOST_RANKS = 64  # the largest number of ranks that is suggested
PHASES = {
    "image": "while an image is encoded",
    "text": "while a prompt is encoded",
    "denoise": "while a chunk is denoised",
    "decode": "while a chunk is decoded",
}


@dataclass(frozen=True)
class Run:
    """Everything that the memory of a rank depends on. `ranks` counts the mesh axis `sp`; `strategy` may be "auto";
    `text` is the bytes of UMT5's weights, 0 on a rank without UMT5; `least_window` is the smallest possible window in
    latent frames; `cfg` is the size of that mesh axis; `graphs` says whether a GPU runs passes by graphs;
    `other_sessions` is what the other open streams keep, in bytes; `image` is the bytes of the image encoder's weights,
    which is always on the CPU."""

    work: Workload
    ranks: int
    strategy: str
    machine: Machine
    offload: Offload
    text: int
    codec: CodecFootprint
    least_window: int
    on_cpu: bool
    decodes_concurrently: bool = False
    cfg: int = 1
    graphs: bool = True
    other_sessions: int = 0
    image: int = 0

    @property
    def auxiliary(self) -> AuxiliaryMemory:
        """The memory of the text encoder, the codec, the workspace and graphs."""
        made = auxiliary(self.text, self.codec, self.offload, self.on_cpu, self.graphs)
        return replace(
            made,
            image=self.image if self.on_cpu else 0,
            decodes_concurrently=self.decodes_concurrently,
            other_sessions=self.other_sessions,
        )

    @property
    def loaded_bytes(self) -> int:
        """The bytes that stay on the device between two streams."""
        other = self.auxiliary
        text, codec = other.text_stays * other.text, other.codec_stays * self.codec.weights
        return self.work.all_weights_bytes + text + codec

    def plans(self, ranks: int) -> list[Plan]:
        """Plans the run with every strategy for `ranks` ranks on the mesh axis `sp`."""
        return plan(self.work, self.cfg * ranks, self.machine, cfg_sizes=(self.cfg,), auxiliary=self.auxiliary)

    def plan(self) -> Plan:
        """Plans the run with the named strategy, or with the one that "auto" chooses."""
        costs = self.plans(self.ranks)
        named = next((cost for cost in costs if cost.strategy == self.strategy), None)
        return named or next(cost for cost in costs if cost.chosen)


def auxiliary(text: int, codec: CodecFootprint, offload: Offload, on_cpu: bool, graphs: bool = True) -> AuxiliaryMemory:
    """Returns the memory of a text encoder of `text` bytes, a codec, the workspace and graphs. On a CPU, UMT5 is in
    memory or only in its file, an offloaded codec is in memory twice while it is used, and there are no graphs."""
    twice = codec.weights if on_cpu and offload.codec else 0
    return AuxiliaryMemory(
        text=text,
        codec=codec.weights + (codec.derived if on_cpu else 0),
        codec_state=codec.state,
        codec_activations=codec.activations + twice,
        workspace=0 if on_cpu else CUDA_WORKSPACE,
        text_stays=offload.text == "device" or (on_cpu and offload.text == "cpu"),
        codec_stays=on_cpu or not offload.codec,
        graphs=graphs and not on_cpu,
    )


def check_memory(run: Run, parallel: SequenceParallel, held: int | None = None) -> None:
    """Checks that a run fits into the memory of this rank's device. A decode rank holds the codec alone.

    Args:
        run: the run, as `describe_run` describes it.
        parallel: the ranks.
        held: what open streams hold, if the weights are in memory already; the free memory then excludes both. None
            before loading.

    Raises:
        ConfigError: the run does not fit.
    """
    free = free_bytes(parallel.device)
    if free is not None and held is not None:
        free += held + (run.codec.weights if parallel.decodes else run.loaded_bytes)
    if not parallel.decodes:
        return check_fits(run, free, parallel.device)
    needs = run.auxiliary.codec + run.codec.state + run.codec.activations + run.auxiliary.workspace
    if free is not None and needs > free:
        raise ConfigError(
            f"decode rank {parallel.rank} needs {_gb(needs)} GB on {parallel.device}, {_gb(free)} GB are free: short "
            f"by {_gb(needs - free)} GB (predicted); more decode ranks take less each"
        )


def describe_run(
    model_config: ModelConfig,
    parallel: SequenceParallel,
    offload: Offload,
    decode: Decode = "inline",
    itemsize: int = 2,
    codec: str | None = None,
    graphs: bool = True,
) -> Run:
    """Describes what this rank will load and run, from the headers of the files. A stream without a window counts with
    the smallest one, because its length is not known yet.

    Args:
        model_config: the model's files and settings.
        parallel: the ranks.
        offload: which weights leave the device.
        decode: which ranks decode.
        itemsize: bytes of a number of the transformer.
        codec, graphs: of `LoadOptions`.

    Raises:
        CheckpointError: a file cannot be read.
        ConfigError: the ranks cannot share this model.
    """
    report, stream = inspect_checkpoint(model_config.transformer), model_config.stream
    config, encoder = report.config, model_config.image_encoder
    size = model_config.height, model_config.width
    found = codec_footprint(model_config.codec, codec, *size, stream.chunk_frames)
    found = found.share(decode_share(parallel, decode))
    grid = LatentGrid.from_pixels(*size, found.stride, config.patch_size[1:])
    parallel.check(grid, config.num_heads)
    least = stream.chunk_frames + stream.sink
    work = Workload.of(config, grid, stream, model_config.sampler, stream.window or least, itemsize=itemsize)
    return Run(
        replace(
            work,
            fp8=model_config.weights != "full",
            fp8_activations=model_config.weights == "fp8-dynamic",
            wide=report.wide_parameters,
            temporal_stride=found.temporal_stride,
            models=1 + (model_config.transformer_2 is not None),
        ),
        parallel.mesh.sp,
        parallel.strategy,
        default_machine(parallel.device),
        offload,
        text_bytes(model_config.text) if isinstance(model_config.text, TextSource) and parallel.rank == 0 else 0,
        found,
        least,
        parallel.device.type == "cpu",
        decode == "overlap" and parallel.rank == 0,
        parallel.mesh.cfg,
        graphs,
        image=encoder_bytes(encoder) if encoder is not None and parallel.rank == 0 else 0,
    )


def decode_share(parallel: SequenceParallel, decode: Decode) -> Fraction:
    """Returns the fraction of a frame that this rank decodes, halos not counted."""
    if parallel.mesh.decode:
        return Fraction(int(parallel.decodes), parallel.mesh.decode)
    if decode == "spatial":
        return Fraction(1, parallel.size)
    return Fraction(int(parallel.rank == 0))


def check_fits(run: Run, free: int | None, device: object) -> None:
    """Raises ConfigError if a run needs more than `free` bytes; None means unlimited."""
    cost = run.plan()
    if free is None or cost.memory_bytes <= free:
        return
    by_time = cost.bytes_by_time
    phase = max(by_time, key=lambda time: by_time[time])
    parts = {
        "weights": cost.weights_bytes,
        "cache": cost.session.cache,
        "history": cost.session.history,
        "text": cost.session.text,
        "latents": cost.session.latents,
        "other sessions": run.other_sessions,
        "activations": cost.activation_bytes,
        "graphs": cost.session.graphs,
        "text encoder": run.text,
        "image encoder": cost.auxiliary.image,
        "codec": cost.auxiliary.codec,
        "its state": cost.session.decoder,
        "its activations": run.codec.activations,
        "workspace": cost.auxiliary.workspace,
    }
    breakdown = ", ".join(f"{name} {_gb(size)}" for name, size in parts.items() if size)
    helps = "; ".join(remedies(run, free))
    raise ConfigError(
        f"this run needs {_gb(cost.memory_bytes)} GB on {device} {PHASES[phase]}, {_gb(free)} GB are free: short by "
        f"{_gb(cost.memory_bytes - free)} GB ({breakdown}; predicted); "
        + (f"what would make it fit: {helps}" if helps else "no option would make it fit")
    )


def remedies(run: Run, free: int) -> list[str]:
    """Returns command-line options that make a run fit, each tried on the cost model: single options if one is enough,
    else all options that save memory, and with them a shorter window or more ranks."""
    offloads = [(f"--offload {other}", replace(run, offload=other)) for other in _more_offload(run)]
    quantized, small_cache = replace(run.work, fp8=True), replace(run.work, cache="int8")
    smaller = [] if run.work.fp8 else [("--weights fp8", replace(run, work=quantized))]
    smaller += [("--cache int8", replace(run, work=small_cache))] if run.work.cache == "model" else []
    smaller += [("--no-graphs", replace(run, graphs=False))] if run.auxiliary.graphs else []
    found = [words for words, other in offloads if _fits(other, free)][:1]
    found += [words for words, other in smaller if _fits(other, free)]
    found += _strategies(run, free) + _windows(run, free) + _sessions(run, free) + _ranks(run, free)
    if found:
        return found
    every = [*offloads[-1:], *smaller]
    words = " ".join(words for words, _ in every)
    offload, cache = offloads[-1][1].offload if offloads else run.offload, run.work.cache
    quantized = replace(quantized, cache="int8" if cache == "model" else cache)
    smallest = replace(run, work=quantized, offload=offload, graphs=False)
    if _fits(smallest, free):
        return [words]
    return [f"{words} {more}".strip() for more in (*_windows(smallest, free), *_ranks(smallest, free))]


def _fits(run: Run, free: int) -> bool:
    return run.plan().memory_bytes <= free


def _more_offload(run: Run) -> list[Offload]:
    """Settings that offload more than the run does. On a CPU, UMT5 can be offloaded only to its file."""
    stays = run.auxiliary.text_stays
    texts: tuple[Keep, ...] = (run.offload.text, "free") if stays else (run.offload.text,)
    codecs = (True,) if run.offload.codec else (False, True)
    return [made for codec in codecs for text in texts if (made := Offload(text, codec)) != run.offload]


def _strategies(run: Run, free: int) -> list[str]:
    """`--strategy` with the fastest strategy that fits, if any."""
    fitting = [cost for cost in run.plans(run.ranks) if cost.memory_bytes <= free]
    return [f"--strategy {min(fitting, key=lambda cost: cost.chunk_ms).strategy}"] if fitting else []


def _windows(run: Run, free: int) -> list[str]:
    """`--window` with the longest shorter window that fits, if any."""
    shorter = range(run.work.window - 1, run.least_window - 1, -1)
    fitting = bisect_left(
        shorter, True, key=lambda window: _fits(replace(run, work=replace(run.work, window=window)), free)
    )
    return [f"--window {shorter[fitting]}"] if fitting < len(shorter) else []


def _sessions(run: Run, free: int) -> list[str]:
    """A shorter `history` that fits, or that other sessions are closed, if either is enough."""
    shorter = range(run.work.history - 1, -1, -1)
    fitting = bisect_left(
        shorter, True, key=lambda history: _fits(replace(run, work=replace(run.work, history=history)), free)
    )
    found = [f"a history of {shorter[fitting]}"] if fitting < len(shorter) else []
    alone = run.other_sessions and _fits(replace(run, other_sessions=0), free)
    return [*found, *(["closing other sessions"] if alone else [])]


def _ranks(run: Run, free: int) -> list[str]:
    """The first doubling of the ranks at which a strategy fits, if any."""
    ranks = 2 * run.ranks
    while ranks <= min(MOST_RANKS, run.work.grid.tokens):
        least = min(run.plans(ranks), key=lambda cost: cost.memory_bytes)
        if least.memory_bytes <= free:
            return [f"{run.cfg * ranks} ranks with --strategy {least.strategy}"]
        ranks *= 2
    return []


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g}"
