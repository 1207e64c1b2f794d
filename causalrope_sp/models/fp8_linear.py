"""A linear layer whose weight is stored in fp8.

Shapes: N output channels, K input channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

STORED = torch.float8_e4m3fn


class Fp8Linear(nn.Module):
    """A Linear whose weight is stored as e4m3 `numbers`, (N, K), and float32 `scale`, (N,).

    It computes in the dtype of its bias. Its numbers and scales are allocated and not filled.

    Args:
        of: the Linear that it replaces; its shape, device and bias are taken over.
        dynamic: whether the blocks multiply the numbers with activations quantized to fp8 as they come (W8A8). If not,
            the weight is dequantized when it is used, and freed afterwards, as the keys of a text are always computed.
    """

    def __init__(self, of: nn.Linear, dynamic: bool = False) -> None:
        super().__init__()
        self.dynamic = dynamic
        device = of.weight.device
        self.numbers = _fixed(torch.empty(of.weight.shape, dtype=torch.uint8, device=device).view(STORED))
        self.scale = _fixed(torch.empty(of.weight.shape[0], dtype=torch.float32, device=device))
        self.bias = of.bias

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, (N, K), in the dtype of the bias."""
        return self.numbers.to(self.bias.dtype).mul_(self.scale.to(self.bias.dtype).unsqueeze(1))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., K) to (..., N) with the dequantized weight."""
        return linear(x, self.weight, self.bias)


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
