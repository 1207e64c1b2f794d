"""Latte from a folder of diffusers' `LattePipeline`: T5, the scheduler of the folder, and the VAE frame by frame.

Shapes: B batch, F frames, C latent channels, H×W latent size, T pixel frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from causalrope_sp.errors import CheckpointError, ConfigError
from causalrope_sp.grid import Chunk, LatentGrid
from causalrope_sp.io.json_files import read_object
from causalrope_sp.reuse import ReusePolicy
from causalrope_sp.spatiotemporal.folder import load_part, load_picture_vae, read_config
from causalrope_sp.spatiotemporal.guidance import Guidance
from causalrope_sp.spatiotemporal.latte.latte_config import LatteConfig
from causalrope_sp.spatiotemporal.latte.latte_dit import LatteDiT
from causalrope_sp.spatiotemporal.latte.latte_stream import LatteStream
from causalrope_sp.spatiotemporal.latte.latte_weights import load_latte
from causalrope_sp.spatiotemporal.video_pipeline import STRIDE, VideoSettings, WholeVideoPipeline

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

# schedulers whose step treats every number alike and draws no noise, so that each rank may step its own frames
SCHEDULERS = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)


class LattePipeline(WholeVideoPipeline):
    """Latte of a diffusers folder. With the same seed it makes the video of diffusers' pipeline, whose generator is on
    the CPU and which does not clean the caption."""

    model: LatteDiT

    @staticmethod
    def model_on_meta(folder: Path) -> LatteDiT:
        """Makes the transformer of a folder from its config, without weights."""
        return LatteDiT(LatteConfig.of_diffusers(read_config(folder)))

    def timesteps(self, frames: int) -> tuple[float, ...]:
        """Returns those of the folder's scheduler."""
        return tuple(map(float, self._scheduler().timesteps))

    def _scheduler(self) -> Any:
        return load_scheduler(self.folder / "scheduler", self.settings.num_inference_steps, self.parallel.device)

    def load_model(self) -> LatteDiT:
        """Loads the transformer."""
        return load_latte(self.folder / "transformer", dtype=self._dtype, device=self.parallel.device)

    def default_settings(self) -> VideoSettings:
        """Returns diffusers' settings, with the size that the transformer was trained at."""
        side = STRIDE * self.model.config.sample_size
        return VideoSettings(side, side, num_inference_steps=50, guidance_scale=7.5, fps=8, num_frames=16, text_len=120)

    def check_frames(self, frames: int) -> None:
        """Takes any number of frames."""

    def latent_frames(self, frames: int) -> int:
        """Returns `frames`: the VAE is one of pictures."""
        return frames

    def latents(
        self, noise_BFCHW: Tensor, frames: int, prompt: str, negative_prompt: str | None, reuse: ReusePolicy | None
    ) -> Tensor:
        """Samples the latents by the folder's scheduler, (1, F, C, H, W), on every rank."""
        texts = [text.lower().strip() for text in (prompt, negative_prompt or "")]
        embeds, mask = self.texts(texts, self.model.config.caption_channels)
        conditional, unconditional = embeds[:, : int(mask[0].sum())].unsqueeze(1)  # both cut to the prompt's length
        scheduler = self._scheduler()
        guidance = Guidance(self.settings.guidance_scale, self.parallel)
        channels, predicted = self.model.config.in_channels, self.model.config.out_channels
        _, frames, _, height, width = noise_BFCHW.shape
        patch = self.model.config.patch_size
        grid, video = LatentGrid.from_latent(height, width, (patch, patch)), Chunk(0, 0, frames)
        stream = LatteStream(
            self.model,
            torch.cat(guidance.own([conditional], [unconditional])),
            grid,
            parallel=self.parallel,
            timesteps=tuple(map(float, scheduler.timesteps)),
            reuse=reuse,
        )
        tokens = stream.mine(grid.patchify(noise_BFCHW * scheduler.init_noise_sigma))
        for t in scheduler.timesteps:
            inputs = guidance.inputs(scheduler.scale_model_input(tokens, t))
            found = guidance.combine(stream.denoise(video, inputs, float(t)).unflatten(-1, (-1, predicted)))
            noise = found[..., :channels].flatten(-2)  # the other half is a variance that no scheduler here reads
            tokens = scheduler.step(noise, t, tokens, return_dict=False)[0]
        if stream.outputs is not None:
            self.parallel.comm_stats.keep(stream.outputs.most_bytes)
        return grid.unpatchify(stream.gather(tokens, video))

    def load_decoder(self) -> AutoencoderKL:
        """Loads the VAE."""
        return load_picture_vae(self.folder / "vae", self.model.dtype, self.parallel.device)

    def decode(self, latents_BFCHW: Tensor, frames: int) -> Iterator[Tensor]:
        """Decodes frame by frame."""
        for latent_BCHW in latents_BFCHW.unbind(1):
            yield self.decoder.decode(latent_BCHW / self.decoder.config.scaling_factor).sample


def load_scheduler(folder: Path, steps: int, device: torch.device) -> Any:
    """Loads the scheduler of a folder and sets its steps.

    Args:
        folder: holds scheduler_config.json.
        steps: how many steps it makes.
        device: where it computes.

    Returns:
        diffusers' scheduler.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: its steps draw noise or look at a whole video, or there are more of them than timesteps.
    """
    import diffusers

    declared = load_part(folder, lambda path: read_object(path / "scheduler_config.json"))
    name = declared.get("_class_name")
    if name not in SCHEDULERS:
        raise ConfigError(f"the scheduler must be one of {', '.join(SCHEDULERS)}, not {name!r}")
    if declared.get("thresholding"):
        raise ConfigError("the scheduler must have no thresholding, which looks at a whole video")
    trained = declared.get("num_train_timesteps", 1000)
    if not isinstance(trained, int):
        raise CheckpointError(f"{folder} declares num_train_timesteps as {trained!r}, not as a whole number")
    if steps > trained:
        raise ConfigError(f"the steps must be at most the {trained} that the model was trained with, not {steps}")
    scheduler = load_part(folder, getattr(diffusers, name).from_pretrained)
    scheduler.set_timesteps(steps, device=device)
    return scheduler
