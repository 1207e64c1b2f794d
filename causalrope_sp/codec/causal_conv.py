"""The convolutions of the Wan VAE. Each has two ways to the same numbers:

- plain: one call of torch's convolution over past and new frames. It is the readable truth, what a GPU runs, and what
  autograd records.
- on a CPU in float32 or float64, without autograd: two-dimensional convolutions over frames in channels-last order,
  which oneDNN runs at nearly the rate of the processor, with less arithmetic: Winograd's in time, and pointwise phases
  in place of an upsampled picture.

Shapes: B batch, C channels, T frames, H×W size. N = T·B frames with time outermost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from causalrope_sp.codec.conv_state import ConvCall, is_trained, to_frames, to_video
from causalrope_sp.codec.time_winograd import BIASED, block_of, mixed_weights, transforms

_BY_FRAMES = (torch.float32, torch.float64)


class RMSNorm(nn.Module):
    """Divides by the root mean square over channels and multiplies by `gamma`; diffusers' `WanRMS_norm`.

    Args:
        channels: C.
        axes: axes of size 1 that the stored `gamma` has after its channels.
    """

    def __init__(self, channels: int, axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))

    def forward(self, x_NCHW: Tensor, out: Tensor | None = None) -> Tensor:
        """Returns a normalized tensor of the same shape, in `out` if it is given and autograd does not record."""
        wide = x_NCHW.float() if x_NCHW.dtype in (torch.float16, torch.bfloat16) else x_NCHW
        length = torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min(1e-12)
        gamma = self.gamma.view(-1, 1, 1).to(wide.dtype) * self.gamma.numel() ** 0.5
        if is_trained(x_NCHW, self.gamma) or wide is not x_NCHW:
            return (wide / length * gamma).to(x_NCHW.dtype)
        return torch.mul(x_NCHW, length.reciprocal_(), out=out).mul_(gamma)


class CausalConv(nn.Conv3d):
    """A convolution over a frame and those before it; its state is the frames that the next call reads again.

    Args:
        channels: input channels.
        out: output channels.
        kernel: its size in time, height and width; height and width are padded with zeros to keep their size.
        time_stride: its stride in time.
    """

    def __init__(self, channels: int, out: int, kernel: tuple[int, int, int] = (3, 3, 3), time_stride: int = 1) -> None:
        self.key = ""  # the name in its network, under which its state is kept
        around = (0, kernel[1] // 2, kernel[2] // 2)
        super().__init__(channels, out, kernel, stride=(time_stride, 1, 1), padding=around)
        self.kept = kernel[0] - time_stride  # frames
        self._mixed = Derived()

    def forward(  # type: ignore[override]
        self, x_NCHW: Tensor, call: ConvCall, norm: RMSNorm | None = None, residual_NCHW: Tensor | None = None
    ) -> Tensor:
        """Convolves the next frames, or SiLU of their norm.

        Args:
            x_NCHW: the frames.
            call: the stream's call, whose state is read and replaced.
            norm: the norm before SiLU; without it the frames are read as they are.
            residual_NCHW: frames to add to the output, which may be overwritten.

        Returns:
            The output frames.
        """
        if not runs_by_frames(x_NCHW, self.weight):
            return self._plain(x_NCHW, call, norm, residual_NCHW)
        height, width = x_NCHW.shape[-2:]
        past = self.kept * call.batch
        window = call.scratch("window", past + len(x_NCHW), x_NCHW, self.in_channels)
        if self.key in call.state.frames:
            window[:past] = to_frames(call.state.frames[self.key])
        else:
            window[:past].zero_()
        if norm is None:
            window[past:] = x_NCHW
        else:
            for part in norm(x_NCHW, window[past:]).chunk(call.latent_frames):  # torch rounds a tensor's end otherwise
                functional.silu(part, inplace=True)
        call.state.frames[self.key] = to_video(window[len(window) - past :].clone(), call.batch)
        window, padding = self._widened(window, call)
        per_latent = len(x_NCHW) // (call.batch * call.latent_frames)
        m = block_of(per_latent) if self.stride[0] == 1 else 1
        if m == 1:
            return self._by_taps(window, padding, call.batch, residual_NCHW)
        return self._by_points(window, padding, m, call, (height, width), residual_NCHW)

    def derived(self, rate: int) -> int:
        """Returns how many numbers a CPU derives from the weights and keeps, where a latent frame has `rate` frames."""
        m = block_of(rate) if self.stride[0] == 1 else 1
        return 0 if m == 1 else (m + 2) * self.weight[:, :, 0].numel()

    def remember(self, x_NCHW: Tensor, call: ConvCall) -> None:
        """Keeps the last of these frames for the next call, which has none before them."""
        call.state.frames[self.key] = to_video(x_NCHW[len(x_NCHW) - self.kept * call.batch :].clone(), call.batch)

    def _plain(self, x_NCHW: Tensor, call: ConvCall, norm: RMSNorm | None, residual_NCHW: Tensor | None) -> Tensor:
        video, padding = self._widened(self._past_and(x_NCHW, call, norm), call)
        made = to_frames(functional.conv3d(video, self.weight, self.bias, self.stride, (0, *padding)))
        if residual_NCHW is None:
            return made
        return made + residual_NCHW if is_trained(made, residual_NCHW) else residual_NCHW.add_(made)

    def _past_and(self, x_NCHW: Tensor, call: ConvCall, norm: RMSNorm | None) -> Tensor:
        """Returns a video of the frames that were kept and the next ones, of which the last are kept."""
        frames = x_NCHW if norm is None else functional.silu(norm(x_NCHW), inplace=not is_trained(x_NCHW, norm.gamma))
        video = to_video(frames, call.batch)
        past = call.state.frames.get(self.key)
        if past is None:
            past = video.new_zeros(*video.shape[:2], self.kept, *video.shape[3:])
        video = torch.cat([past, video], 2)
        call.state.frames[self.key] = video[:, :, video.shape[2] - self.kept :].clone()
        return video

    def _widened(self, frames: Tensor, call: ConvCall) -> tuple[Tensor, tuple[int, int]]:
        """Adds the halos of the neighbouring ranks; returns also the zeros that are still to be padded."""
        return widened(frames, call, (int(self.padding[1]), int(self.padding[2])))

    def _by_taps(
        self, window_NCHW: Tensor, padding: tuple[int, int], batch: int, residual_NCHW: Tensor | None
    ) -> Tensor:
        """One convolution a tap, added up."""
        made = residual_NCHW
        for n, tap in enumerate(self._taps()):
            read = window_NCHW[n * batch : len(window_NCHW) - (self.kernel_size[0] - 1 - n) * batch]
            if self.stride[0] > 1:
                read = read.unflatten(0, (-1, batch))[:: self.stride[0]].flatten(0, 1)
            part = convolve(read, tap, self.bias if n == 0 else None, padding)
            made = part if made is None else made.add_(part)
        assert made is not None
        return made

    def _taps(self) -> Tensor:
        """Returns the weights by tap, (3, O, C, kh, kw), each in channels-last order; they are reordered once."""
        taps = self.weight.detach().permute(2, 0, 1, 3, 4)
        if not taps[0].is_contiguous(memory_format=torch.channels_last):
            with torch.inference_mode(self.weight.is_inference()):
                ordered = taps.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
                self.weight.data = ordered.permute(1, 2, 0, 3, 4)
            taps = ordered
        return taps

    def _by_points(
        self,
        window_NCHW: Tensor,
        padding: tuple[int, int],
        m: int,
        call: ConvCall,
        size: tuple[int, int],
        residual_NCHW: Tensor | None,
    ) -> Tensor:
        """Winograd's F(m, 3), for every m output frames by themselves, so that no cut of the video changes a bit."""
        bt, _, at = (matrix.to(window_NCHW.dtype) for matrix in transforms(m))
        weights = self._mixed.of(self.weight, lambda weight: mixed_weights(weight, m), f"points of {m}")
        batch, n = call.batch, m + 2
        blocks = (len(window_NCHW) // batch - 2) // m
        rows = _rows(window_NCHW, batch)
        mixed = call.scratch("points", n * blocks * batch, window_NCHW, self.in_channels)
        mixed_rows = _rows(mixed, batch).view(n, blocks, -1)
        for k in range(blocks):
            torch.mm(bt, rows[k * m : k * m + n], out=mixed_rows[:, k])
        like = window_NCHW[:, :, : size[0], : size[1]]
        products = call.scratch("window", n * blocks * batch, like, self.out_channels)
        for i, (frames, weight) in enumerate(zip(mixed.chunk(n), weights)):
            products[i * len(frames) : (i + 1) * len(frames)] = convolve(
                frames, weight, self.bias if i == BIASED else None, padding
            )
        product_rows = _rows(products, batch).view(n, blocks, -1)
        made = residual_NCHW
        if made is None:
            made = window_NCHW.new_empty(m * blocks * batch, *size, self.out_channels).permute(0, 3, 1, 2)
        for k, made_rows in enumerate(_rows(made, batch).split(m)):
            torch.addmm(made_rows, at, product_rows[:, k], beta=int(residual_NCHW is not None), out=made_rows)
        return made


class PointwiseConv(nn.Conv3d):
    """A convolution of kernel 1, which reads no other frame."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(channels, out, 1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Returns frames (N, out, H, W)."""
        return convolve(x_NCHW, self.weight[:, :, 0], self.bias)


class UpsampleConv(nn.Conv2d):
    """Doubles a picture's sides by repetition and convolves it with a 3×3 kernel.

    Of every 2×2 output pixels each reads 2×2 input pixels, since of 3 neighbours two are the same one: the four
    kernels, sums of the 3×3 one's weights, are convolved as one with four times the output channels.
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(channels, out, 3, padding=1)
        self._mixed = Derived()

    def derived(self, rate: int) -> int:
        """Returns how many numbers a CPU derives from the weights and keeps: four kernels of 2×2, at any `rate`."""
        return 16 * self.weight[:, :, 0, 0].numel()

    def upsample(self, x_NCHW: Tensor, call: ConvCall) -> Tensor:
        """Returns frames (N, out, 2·H, 2·W)."""
        height, width = x_NCHW.shape[-2:]
        x_NCHW, padding = widened(x_NCHW, call, (1, 1))
        if not runs_by_frames(x_NCHW, self.weight):
            larger = functional.interpolate(x_NCHW, scale_factor=2, mode="nearest-exact")
            rows, columns = (2 * (1 - p) for p in padding)  # the halo, which has grown too
            return self(larger)[..., rows : rows + 2 * height, columns : columns + 2 * width]
        made = convolve(x_NCHW, self._mixed.of(self.weight, _phases, "phases"), None, padding)
        larger = x_NCHW.new_empty(len(x_NCHW), 2 * height, 2 * width, self.out_channels).permute(0, 3, 1, 2)
        bias = None if self.bias is None else self.bias.view(-1, 1, 1)
        for phase, part in enumerate(made.chunk(4, 1)):
            y, x = divmod(phase, 2)
            target = larger[..., y::2, x::2]
            part = part[..., y : y + height, x : x + width]
            target.copy_(part) if bias is None else torch.add(part, bias, out=target)
        return larger


class Derived:
    """Tensors that are computed from a parameter, and computed again when it has changed."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[Tensor, int, Tensor]] = {}  # the parameter, its version, and what was made of it

    def __deepcopy__(self, memo: dict[int, Any]) -> Derived:
        return Derived()

    def of(self, weight: Tensor, make: Callable[[Tensor], Tensor], name: str) -> Tensor:
        """Returns `make(weight)`, which is kept under a name."""
        version = 0 if weight.is_inference() else weight._version  # an inference tensor counts no versions
        kept = self._made.get(name)
        if (
            kept is None
            or kept[0].data_ptr() != weight.data_ptr()
            or kept[1] != version
            or kept[0].dtype != weight.dtype
        ):
            kept = self._made[name] = weight.detach(), version, make(weight.detach())  # kept alive, so is its address
        return kept[2]


def runs_by_frames(x: Tensor, weight: Tensor) -> bool:
    """Tells whether a convolution runs by frames in channels-last order, on a CPU without autograd."""
    return x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in _BY_FRAMES and not is_trained(x, weight)


def convolve(
    x_NCHW: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int] = (0, 0), stride: int = 1
) -> Tensor:
    """Convolves frames; on a CPU by oneDNN whatever their number, so that it does not change the order of additions."""
    if x_NCHW.dtype == torch.float32 and runs_by_frames(x_NCHW, weight) and torch.backends.mkldnn.is_available():
        return torch.mkldnn_convolution(x_NCHW, weight, bias, padding, (stride, stride), (1, 1), 1)
    return functional.conv2d(x_NCHW, weight, bias, stride, padding)


def widened(frames: Tensor, call: ConvCall, reach: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Adds the halos of the neighbouring ranks to frames (..., H, W).

    Args:
        frames: this rank's frames.
        call: the stream's call.
        reach: rows and columns that a convolution reads on either side.

    Returns:
        The frames with halos along the axis that ranks share, and the zeros to pad along each axis.
    """
    shards = call.spatial_shards
    if shards is None or not reach[shards.axis]:
        return frames, reach
    wide = shards.with_halo(frames, reach[shards.axis])
    if frames.ndim == 4 and frames.is_contiguous(memory_format=torch.channels_last):
        wide = wide.contiguous(memory_format=torch.channels_last)
    return wide, ((reach[0], 0) if shards.axis == -1 else (0, reach[1]))


def _rows(frames_NCHW: Tensor, batch: int) -> Tensor:
    """Views frames in channels-last order as a matrix, (T, B·H·W·C)."""
    return frames_NCHW.permute(0, 2, 3, 1).view(len(frames_NCHW) // batch, -1)


def _phases(weight_OC33: Tensor) -> Tensor:
    """Returns the four kernels for the 2×2 output pixels of an input pixel, (4·O, C, 2, 2), in channels-last order."""
    sums = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float64)
    mixed = torch.einsum("yir,xjs,ocrs->yxoijc", sums, sums, weight_OC33.double()).flatten(0, 2)
    return mixed.to(weight_OC33.dtype).contiguous().permute(0, 3, 1, 2)
