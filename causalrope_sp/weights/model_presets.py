"""Presets of the published models (window, sink, chunk, steps, shift), found by name or guessed from a checkpoint.

Values are those of the authors' inference configurations; `source` says where none was published. `steps` are
timesteps before the shift, so a list that its authors use without a shift has shift 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from causalrope_sp.config import PRESETS as SIZES
from causalrope_sp.config import DiTConfig, SamplerConfig, StreamConfig
from causalrope_sp.diffusion.schedule import timesteps
from causalrope_sp.errors import CheckpointError, ConfigError
from causalrope_sp.weights.weight_paths import read_json
from causalrope_sp.weights.wrappings import Wrapping

# Without `local_attn_size` the authors' code attends over all frames, in a cache of 32760 tokens: 21 latent frames of
# 1560, the length of their training clips. A window of 21 computes the same up to frame 21, and can go on after it.
TRAINED_FRAMES = 21


@dataclass(frozen=True)
class Preset:
    """The settings that a model runs with.

    Attributes:
        name: the preset's name.
        stream: window, sink and chunk, in latent frames.
        sampler: steps and shift.
        size: the name in `config.PRESETS` of the DiT that it was published for; None if of none.
        source: where the values come from.
        evidence: why it was chosen for a checkpoint, and what was overridden.
        assumed: the fields of `stream` and `sampler` that nothing says, and that are defaults.
    """

    name: str
    stream: StreamConfig
    sampler: SamplerConfig
    size: str | None
    source: str
    evidence: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    def override(self, **changes: Any) -> Preset:
        """Returns the preset with fields of `StreamConfig` and `SamplerConfig` changed.

        Args:
            **changes: the new values by field.

        Raises:
            ConfigError: a field is unknown, or the values do not work together.
        """
        stream = {name: value for name, value in changes.items() if name in _names(self.stream)}
        sampler = {name: value for name, value in changes.items() if name in _names(self.sampler)}
        unknown = changes.keys() - stream.keys() - sampler.keys()
        if unknown:
            raise ConfigError(f"a preset has no {', '.join(sorted(unknown))}")
        if not changes:
            return self
        values = ", ".join(f"{name} {value}" for name, value in changes.items())
        return replace(
            self,
            stream=replace(self.stream, **stream),
            sampler=replace(self.sampler, **sampler),
            evidence=(*self.evidence, f"overridden: {values}"),
            assumed=tuple(name for name in self.assumed if name not in changes),
        )


def _names(config: StreamConfig | SamplerConfig) -> set[str]:
    return {f.name for f in fields(config)}


_FOUR = SamplerConfig((1000, 750, 500, 250), shift=5.0)
_CHUNKS = StreamConfig(window=TRAINED_FRAMES, chunk_frames=3)
_SINGLE = StreamConfig(window=TRAINED_FRAMES, chunk_frames=1)

FAMILY = {
    preset.name: preset
    for preset in (
        Preset("self-forcing", _CHUNKS, _FOUR, "wan2.1-1.3b", "guandeh17/Self-Forcing, configs/self_forcing_dmd.yaml"),
        Preset(
            "self-forcing-framewise",
            _SINGLE,
            _FOUR,
            "wan2.1-1.3b",
            "arXiv 2506.08009 has the variant; its configuration and weights are not published: steps and shift of the "
            "chunk-wise one, which are also those of Causal-Forcing's frame-wise one",
        ),
        Preset(
            "causvid",
            _CHUNKS,
            SamplerConfig((1000, 757, 522), shift=1.0),
            "wan2.1-1.3b",
            "tianweiy/CausVid, configs/wan_causal_dmd.yaml: the steps are used as they are, its shift of 8 was for "
            "training",
        ),
        Preset(
            "causvid-4step",
            _CHUNKS,
            SamplerConfig((1000, 750, 500, 250), shift=8.0),
            "wan2.1-1.3b",
            "tianweiy/CausVid, configs/wan_causal_dmd_warp_4step_cfg2.yaml",
        ),
        Preset(
            "causal-forcing",
            _CHUNKS,
            _FOUR,
            "wan2.1-1.3b",
            "thu-ml/Causal-Forcing, configs/causal_forcing_dmd_chunkwise.yaml",
        ),
        Preset(
            "causal-forcing-framewise",
            _SINGLE,
            _FOUR,
            "wan2.1-1.3b",
            "thu-ml/Causal-Forcing, configs/causal_forcing_dmd_framewise.yaml",
        ),
        *(
            Preset(
                f"causal-forcing-framewise-{len(steps)}step",
                _SINGLE,
                replace(_FOUR, steps=steps, first_steps=_FOUR.steps),
                "wan2.1-1.3b",
                f"thu-ml/Causal-Forcing, configs/causal_forcing_dmd_framewise_{len(steps)}step.yaml "
                "(Causal-Forcing++): its first chunk has 4 steps",
            )
            for steps in ((1000.0,), (1000.0, 500.0))
        ),
        Preset(
            "longlive-1.3b",
            StreamConfig(window=12, sink=3, chunk_frames=3),
            _FOUR,
            "wan2.1-1.3b",
            "NVlabs/LongLive, configs/longlive_inference.yaml; the published model is longlive_base.pt with lora.pt "
            "merged (rank 256, alpha 256)",
        ),
        Preset(
            "krea-realtime-14b",
            StreamConfig(window=6, chunk_frames=3),
            _FOUR,
            "wan2.1-14b",
            "krea-ai/realtime-video, configs/self_forcing_server_14b.yaml, and its server's 3 frames of context "
            "besides the chunk; it also computes the cache anew for every chunk, which is not done here",
        ),
        Preset(
            "sfwan",
            _CHUNKS,
            _FOUR,
            "wan2.1-1.3b",
            "hao-ai-lab/FastVideo, SelfForcingWanT2V480PConfig: chunk and window are the defaults of its causal DiT",
        ),
        Preset(
            "longlive-2.0-5b",
            StreamConfig(window=32, sink=8, chunk_frames=8, image_in_chunk=True),
            SamplerConfig(timesteps(4, "unipc"), shift=5.0, solver="unipc"),
            "wan2.2-ti2v-5b",
            "NVlabs/LongLive, configs/inference.yaml of LongLive 2.0 (4 steps of UniPC, no guidance, 704×1280) and its "
            "causal_diffusion_inference.py, which keeps an image in the first chunk; its sinks and offsets for several "
            "shots are not part of it",
        ),
    )
}
UNKNOWN = Preset(
    "none",
    StreamConfig(),
    SamplerConfig(),
    None,
    "the defaults of StreamConfig and SamplerConfig",
    assumed=tuple(f.name for f in (*fields(StreamConfig), *fields(SamplerConfig)) if f.name != "heads"),
)


def find_preset(name: str) -> Preset:
    """Returns the preset of a name.

    Raises:
        ConfigError: there is no preset of this name.
    """
    if name not in FAMILY:
        raise ConfigError(f"unknown preset {name!r}; this version has: {', '.join(FAMILY)}")
    return FAMILY[name]


def guess_preset(path: Path, file: Path, wrapping: Wrapping, declared: Mapping[str, Any], config: DiTConfig) -> Preset:
    """Guesses the preset of a checkpoint from its path, its neighbouring files, its wrapping and its config.json.

    Args:
        path: the checkpoint, as the caller named it.
        file: the first of its files of weights.
        wrapping: what training code left around the model's tensors.
        declared: the content of its config.json; its window, sink and chunk replace the preset's.
        config: the model's configuration.

    Returns:
        The preset with the evidence for it; UNKNOWN, with evidence, if nothing names one.
    """
    signs = list(_signs(path, file, wrapping, declared)) or [("none", "nothing in its path or files names a preset")]
    fitting = (sign for sign in signs if config == _size_of(FAMILY.get(sign[0], UNKNOWN)))
    name, reason = next(fitting, signs[0])
    preset, evidence = FAMILY.get(name, UNKNOWN), [reason]
    if declared.get("model_type") == "ti2v" and not preset.stream.image_in_chunk:
        preset = replace(preset, stream=replace(preset.stream, image_in_chunk=True))
        evidence.append("config.json says ti2v, so that an image is in the first chunk, at timestep 0")
    values = {ours: declared[theirs] for theirs, ours in _DECLARED if _counts(declared.get(theirs))}
    known = {ours for theirs, ours in _DECLARED if theirs in declared}
    assumed = tuple(name for name in preset.assumed if name not in known)
    if values:
        evidence.append(f"config.json says {', '.join(f'{ours} {value}' for ours, value in values.items())}")
    if preset.size is not None and config != SIZES[preset.size]:
        evidence.append(f"its DiT is not a {preset.size}, which the preset is for")
    try:
        return replace(preset, stream=replace(preset.stream, **values), evidence=tuple(evidence), assumed=assumed)
    except ConfigError as error:
        return replace(preset, evidence=(*evidence, f"not taken over: {error}"))


_DECLARED = (
    ("local_attn_size", "window"),
    ("sink_size", "sink"),
    ("num_frame_per_block", "chunk_frames"),
    ("num_frames_per_block", "chunk_frames"),
)
_BY_NAME = (
    (r"sf-?wan", "sfwan"),
    (r"krea", "krea-realtime-14b"),
    (r"long-?live-?2", "longlive-2.0-5b"),
    (r"long-?live", "longlive-1.3b"),
    (r"long-?live", "longlive-2.0-5b"),
    (r"frame-?wise-1-?step", "causal-forcing-framewise-1step"),
    (r"frame-?wise-2-?step", "causal-forcing-framewise-2step"),
    (r"causal-?forcing", "causal-forcing"),
    (r"warp-4step-cfg2", "causvid-4step"),
    (r"causvid|autoregressive-checkpoint|wan-causal-dmd", "causvid"),
    (r"self-?forcing", "self-forcing"),
)
_FRAMEWISE = r"frame-?wise"


def _size_of(preset: Preset) -> DiTConfig | None:
    """The size of the DiT that a preset is for."""
    return None if preset.size is None else SIZES[preset.size]


def _counts(value: Any) -> bool:
    """Returns whether a declared value is a number of latent frames; -1 means all frames in these configurations."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _signs(path: Path, file: Path, wrapping: Wrapping, declared: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the presets that something names, and what names each, the strongest evidence first."""
    if declared.get("_class_name") == "CausalWanTransformer3DModel":
        yield "sfwan", "config.json names the class CausalWanTransformer3DModel"
    for name, wanted in (
        ("model_index.json", "WanCausalDMDPipeline"),
        ("scheduler/scheduler_config.json", "SelfForcingFlowMatchScheduler"),
    ):
        if _class_in(file.parent.parent / name) == wanted:
            yield "sfwan", f"{name} names the class {wanted}"
    names = (*path.absolute().parts[-3:], *file.absolute().parts[-3:])
    words = [re.sub(r"[_ .]+", "-", name.lower()) for name in names]
    framewise = next((name for name, word in zip(names, words) if re.search(_FRAMEWISE, word)), None)
    for pattern, preset in _BY_NAME:
        named = next((name for name, word in reversed(list(zip(names, words))) if re.search(pattern, word)), None)
        if named is None:
            continue
        if framewise is not None and f"{preset}-framewise" in FAMILY:
            yield f"{preset}-framewise", f"its path says {named} and {framewise}"
        yield preset, f"its path says {named}"
    keys = {"generator", "generator_ema"} & {*wrapping.parts, *wrapping.prefix.split(".")}
    if keys:
        yield "self-forcing", f"it has {' and '.join(keys)}, as Self-Forcing's training leaves it; no other evidence"


def _class_in(file: Path) -> Any:
    """Returns the `_class_name` of a JSON file; None if there is none."""
    try:
        return read_json(file).get("_class_name") if file.is_file() else None
    except CheckpointError:  # a faulty neighbouring file is no fault of the checkpoint
        return None
