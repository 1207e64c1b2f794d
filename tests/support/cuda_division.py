"""Division as torch computes it on CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class CudaDivision(TorchDispatchMode):
    """On CUDA torch divides a tensor by a number by a product with the number's inverse, which was rounded before."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_) and not isinstance(args[1], Tensor):
            inverse = float(torch.ones((), dtype=args[0].dtype) / args[1])
            in_place = func.overloadpacket is torch.ops.aten.div_
            return args[0].mul_(inverse) if in_place else args[0] * inverse
        return func(*args, **(kwargs or {}))
