"""Open-Sora 1.2's VAE: 5 latent frames are a clip of 17, by a temporal decoder, and pictures, by a picture VAE.

Each clip is decoded by itself, so that memory does not grow with the video. Modules have the published names.

Shapes: B batch, C channels, F latent frames of a clip, T frames of a clip, H×W latent size.
"""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from causalrope_sp.devices import on_meta
from causalrope_sp.errors import CheckpointError, first_line
from causalrope_sp.weights.messages import problem
from causalrope_sp.weights.tensor_files import WeightFiles

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

CLIP_FRAMES, CLIP_LATENT_FRAMES = 17, 5
STRIDE = 4  # frames a latent frame
GROUPS = 32  # of every norm
PICTURE_SCALE = 0.18215  # of the picture VAE's latents
PICTURE, TEMPORAL = "spatial_vae.module.", "temporal_vae."


class CausalConv(nn.Module):
    """A convolution that sees its own and earlier frames; zeros stand before the first frame of a clip."""

    def __init__(self, before: int, after: int, kernel: int, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv3d(before, after, kernel, bias=bias)
        self._pad = (kernel // 2,) * 4 + (kernel - 1, 0)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Returns as many frames."""
        return self.conv(functional.pad(x_BCTHW, self._pad))


class ResBlock(nn.Module):
    """Two convolutions, each after a norm over the clip and SiLU, added to the input."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, before), nn.GroupNorm(GROUPS, after)
        self.conv1 = CausalConv(before, after, 3, bias=False)
        self.conv2 = CausalConv(after, after, 3, bias=False)
        self.conv3 = nn.Identity() if before == after else CausalConv(before, after, 1, bias=False)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Returns as many frames of the same size."""
        y = self.conv1(functional.silu(self.norm1(x_BCTHW)))
        return self.conv2(functional.silu(self.norm2(y))) + self.conv3(x_BCTHW)


class TemporalDecoder(nn.Module):
    """The decoder of the temporal VAE, from the latents of a clip to those of the picture VAE.

    Args:
        channels: channels of each level, the one of the output first.
        blocks: residual blocks of each level, and before the last one.
        doubles: whether the frames are doubled between a level and the one before it.
        latent: channels of the latents, on both sides.
    """

    def __init__(self, channels: tuple[int, ...], blocks: int, doubles: tuple[bool, ...], latent: int) -> None:
        super().__init__()
        widest = channels[-1]
        self.conv1 = CausalConv(latent, widest, 3)
        self.res_blocks = nn.Sequential(*(ResBlock(widest, widest) for _ in range(blocks)))
        entering = (*channels[1:], widest)
        self.block_res_blocks = nn.ModuleList(
            nn.Sequential(*(ResBlock(before if n == 0 else width, width) for n in range(blocks)))
            for before, width in zip(entering, channels, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv(width, 2 * width, 3) if twice else nn.Identity()
            for width, twice in zip(channels[1:], doubles, strict=True)
        )
        self.norm1 = nn.GroupNorm(GROUPS, channels[0])
        self.conv_out = CausalConv(channels[0], latent, 3)
        self._doubles = doubles

    def forward(self, z_BCFHW: Tensor) -> Tensor:
        """Returns twice as many frames for every doubling."""
        x = self.res_blocks(self.conv1(z_BCFHW))
        for level in reversed(range(len(self.block_res_blocks))):
            x = self.block_res_blocks[level](x)
            if level and self._doubles[level - 1]:  # each pair of channels becomes two frames
                x = self.conv_blocks[level - 1](x).unflatten(1, (-1, 2)).movedim(2, 3).flatten(2, 3)
        return self.conv_out(functional.silu(self.norm1(x)))


class OpenSoraVae:
    """The decoder of Open-Sora's latents.

    Args:
        picture: the picture VAE.
        post_quant_conv: the convolution before the temporal decoder.
        temporal: the temporal decoder.
        scale: what latents are multiplied by, (C,), before `shift` is added.
        shift: (C,).
    """

    def __init__(
        self,
        picture: AutoencoderKL,
        post_quant_conv: CausalConv,
        temporal: TemporalDecoder,
        scale: Tensor,
        shift: Tensor,
    ) -> None:
        self._picture, self._post_quant_conv, self._temporal = picture, post_quant_conv, temporal
        self._scale, self._shift = (vector.view(-1, 1, 1, 1) for vector in (scale, shift))

    @torch.no_grad()
    def decode(self, latents_BFCHW: Tensor, frames: int) -> Iterator[Tensor]:
        """Decodes one video clip by clip.

        Args:
            latents_BFCHW: its latents, B = 1.
            frames: its frames, one or a multiple of `CLIP_FRAMES`.

        Yields:
            The pixels of a clip, (T, 3, H, W) in [-1, 1].
        """
        for number, clip in enumerate(latents_BFCHW.split(CLIP_LATENT_FRAMES, 1)):
            found = self.picture_latents(clip.transpose(1, 2), min(CLIP_FRAMES, frames - number * CLIP_FRAMES))
            pictures = found[0].transpose(0, 1) / PICTURE_SCALE
            yield torch.cat([self._picture.decode(picture).sample for picture in pictures.split(1)])

    def picture_latents(self, z_BCFHW: Tensor, frames: int) -> Tensor:
        """Returns the picture VAE's latents of a clip, (B, C, T, H, W): its last `frames` frames."""
        z = self._post_quant_conv(z_BCFHW * self._scale + self._shift)
        return self._temporal(z)[:, :, -frames % STRIDE :]


def load_open_sora_vae(
    path: str | PathLike[str], *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> OpenSoraVae:
    """Loads the decoders of a folder with the published names (hpcai-tech/OpenSora-VAE-v1.2).

    Args:
        path: the folder.
        dtype: the dtype that they compute in.
        device: where they compute.

    Raises:
        CheckpointError: the folder cannot be read, or a tensor is missing, unexpected or of a wrong shape.
    """
    files = WeightFiles(Path(path))
    declared = files.declared_config()
    try:
        with on_meta():
            picture, temporal, post = _picture_of(files), _temporal_of(files), _post_quant_of(files)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not the VAE of Open-Sora 1.2: {first_line(error)}") from error
    parts = {PICTURE: picture, f"{TEMPORAL}decoder.": temporal, f"{TEMPORAL}post_quant_conv.": post}
    encoders = (f"{TEMPORAL}encoder.", f"{TEMPORAL}quant_conv.", "scale", "shift")
    shapes = {
        prefix + name: tensor.shape for prefix, part in parts.items() for name, tensor in part.state_dict().items()
    }
    present = set(files.tensors)
    misshapen = [
        f"{name} is {files.tensors[name].shape}, expected {tuple(shape)}"
        for name, shape in shapes.items()
        if name in present and files.tensors[name].shape != tuple(shape)
    ]
    unexpected = sorted(name for name in present - set(shapes) if not name.startswith(encoders))
    wrong = problem(sorted(set(shapes) - present), unexpected, misshapen)
    if wrong:
        raise CheckpointError(f"{path} (VAE of Open-Sora 1.2): {wrong}")
    for prefix, part in parts.items():
        state = {name: files.take(prefix + name).to(device, dtype) for name in part.state_dict()}
        part.load_state_dict(state, assign=True)
        part.eval().requires_grad_(False)
    channels = temporal.conv1.conv.in_channels
    scale, shift = (_vector(files, declared, name, channels).to(device, dtype) for name in ("scale", "shift"))
    return OpenSoraVae(picture, post, temporal, scale, shift)


def _picture_of(files: WeightFiles) -> AutoencoderKL:
    """Makes the picture VAE of the sizes that its tensors have."""
    from diffusers import AutoencoderKL

    def shape(name: str) -> tuple[int, ...]:
        return files.tensors[PICTURE + name].shape

    levels = _count(files, f"{PICTURE}encoder.down_blocks.")
    channels = tuple(shape(f"encoder.down_blocks.{level}.resnets.0.conv1.weight")[0] for level in range(levels))
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=_count(files, f"{PICTURE}encoder.down_blocks.0.resnets."),
        latent_channels=shape("post_quant_conv.weight")[0],
        norm_num_groups=GROUPS,
    )


def _temporal_of(files: WeightFiles) -> TemporalDecoder:
    """Makes the temporal decoder of the sizes that its tensors have."""
    decoder = f"{TEMPORAL}decoder."
    levels = _count(files, f"{decoder}block_res_blocks.")
    channels = tuple(
        files.tensors[f"{decoder}block_res_blocks.{level}.0.conv2.conv.weight"].shape[0] for level in range(levels)
    )
    doubles = tuple(f"{decoder}conv_blocks.{level}.conv.weight" in files.tensors for level in range(levels - 1))
    latent = files.tensors[f"{decoder}conv_out.conv.weight"].shape[0]
    return TemporalDecoder(channels, _count(files, f"{decoder}res_blocks."), doubles, latent)


def _post_quant_of(files: WeightFiles) -> CausalConv:
    after, before, *_ = files.tensors[f"{TEMPORAL}post_quant_conv.conv.weight"].shape
    return CausalConv(before, after, 1)


def _count(files: WeightFiles, prefix: str) -> int:
    """How many numbered modules there are under a prefix."""
    return len({name.removeprefix(prefix).split(".")[0] for name in files.tensors if name.startswith(prefix)})


def _vector(files: WeightFiles, declared: dict[str, Any], name: str, channels: int) -> Tensor:
    """Returns scale or shift of the latents, from the tensors or else from config.json, (C,)."""
    found = files.take(name) if name in files.tensors else torch.tensor(declared.get(name, []))
    if found.numel() != channels:
        raise CheckpointError(f"{files.path}: {name} has {found.numel()} numbers, expected {channels}")
    return found.flatten()
