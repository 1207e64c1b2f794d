"""Open-Sora 1.2 from a folder: T5, STDiT3 by a rectified flow, and the VAE clip by clip.

Shapes: B batch, F latent frames, C latent channels, H×W latent size, T pixel frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from causalrope_sp.errors import ConfigError
from causalrope_sp.reuse import ReusePolicy
from causalrope_sp.spatiotemporal.folder import read_config
from causalrope_sp.spatiotemporal.open_sora.open_sora_config import OpenSoraConfig
from causalrope_sp.spatiotemporal.open_sora.open_sora_dit import OpenSoraDiT
from causalrope_sp.spatiotemporal.open_sora.open_sora_stream import packed
from causalrope_sp.spatiotemporal.open_sora.open_sora_vae import (
    CLIP_FRAMES,
    CLIP_LATENT_FRAMES,
    OpenSoraVae,
    load_open_sora_vae,
)
from causalrope_sp.spatiotemporal.open_sora.open_sora_weights import load_open_sora
from causalrope_sp.spatiotemporal.open_sora.sampling import sample, timesteps
from causalrope_sp.spatiotemporal.video_pipeline import VideoSettings, WholeVideoPipeline

SCORE = "aesthetic score: 6.5."  # what the published pipeline adds to a prompt


class OpenSoraPipeline(WholeVideoPipeline):
    """Open-Sora 1.2 of a folder. Without a negative prompt the unconditional branch has the learned null text, of as
    many tokens as the prompt has, as published."""

    model: OpenSoraDiT

    @staticmethod
    def model_on_meta(folder: Path) -> OpenSoraDiT:
        """Makes the transformer of a folder from its config, without weights."""
        return OpenSoraDiT(OpenSoraConfig.of_published(read_config(folder)))

    def timesteps(self, frames: int) -> tuple[float, ...]:
        """Returns evenly spaced ones, shifted by the size of the video."""
        return timesteps(self.settings.num_inference_steps, self.height, self.width, frames)

    def load_model(self) -> OpenSoraDiT:
        """Loads the transformer."""
        return load_open_sora(self.folder / "transformer", dtype=self._dtype, device=self.parallel.device)

    def default_settings(self) -> VideoSettings:
        """Returns the published settings: 2 s at 480p."""
        length = self.model.config.model_max_length
        return VideoSettings(
            480, 848, num_inference_steps=30, guidance_scale=7.0, fps=24, num_frames=3 * CLIP_FRAMES, text_len=length
        )

    def check_frames(self, frames: int) -> None:
        """Raises ConfigError unless there is one frame, or the clips of the VAE are whole."""
        if frames != 1 and frames % CLIP_FRAMES:
            below = frames // CLIP_FRAMES * CLIP_FRAMES
            near = f"{below or 1} or {below + CLIP_FRAMES}"
            raise ConfigError(
                f"num_frames must be 1 or a multiple of {CLIP_FRAMES}, the frames of a clip of the VAE, not {frames}; "
                f"the nearest that work: {near}"
            )

    def latent_frames(self, frames: int) -> int:
        """Returns those of one frame, or of the clips."""
        return 1 if frames == 1 else frames // CLIP_FRAMES * CLIP_LATENT_FRAMES

    def latents(
        self, noise_BFCHW: Tensor, frames: int, prompt: str, negative_prompt: str | None, reuse: ReusePolicy | None
    ) -> Tensor:
        """Samples the latents, (1, F, C, H, W), on every rank."""
        prompt = prompt if "aesthetic score:" in prompt else f"{prompt} {SCORE}"
        texts = [text.lower().strip() for text in (prompt, negative_prompt) if text is not None]
        embeds, mask = self.texts(texts, self.model.config.caption_channels)
        null, null_mask = (self.model.null_text[None], mask) if negative_prompt is None else (embeds[1:], mask[1:])
        return sample(
            self.model,
            noise_BFCHW,
            packed(embeds[:1], mask[:1]),
            packed(null, null_mask),
            timesteps=self.timesteps(frames),
            guidance_scale=self.settings.guidance_scale,
            fps=self.fps,
            parallel=self.parallel,
            reuse=reuse,
        )

    def load_decoder(self) -> OpenSoraVae:
        """Loads the VAE."""
        return load_open_sora_vae(self.folder / "vae", dtype=self.model.dtype, device=self.parallel.device)

    def decode(self, latents_BFCHW: Tensor, frames: int) -> Iterator[Tensor]:
        """Decodes clip by clip."""
        yield from self.decoder.decode(latents_BFCHW, frames)
