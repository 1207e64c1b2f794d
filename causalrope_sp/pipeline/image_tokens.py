"""The image tokens of Wan 2.1's image-to-video models: a CLIP vision encoder's, on every rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import ConfigError
from causalrope_sp.pipeline.generation_options import GenerationOptions
from causalrope_sp.pipeline.image_encoder import encode_picture
from causalrope_sp.sampling.chunk import check_image_embeds


def share_image_tokens(
    request: GenerationOptions, encoder: Path | None, picture: np.ndarray | None, width: int, parallel: SequenceParallel
) -> Tensor | None:
    """Encodes the image of a call on the first rank and broadcasts its tokens. All ranks that denoise must call it.

    Args:
        request: the options of the call, whose `image_embeds` replace the encoder's.
        encoder: the folder or the file of the encoder; None for a model without.
        picture: the image, uint8 (H, W, 3), of the stream's size; None for a call with another control.
        width: the width of a token that the model reads; 0 for a model that reads none.
        parallel: the ranks.

    Returns:
        The tokens in float32, (1, N, width); None for a model that reads none.

    Raises:
        ConfigError: the model reads tokens and there are none, or they have another width or are not finite.
        CheckpointError: the encoder cannot be read.
    """
    ranks = parallel.denoisers

    def make() -> Tensor | None:
        given = request.image_embeds
        if width == 0 and given is not None:
            raise ConfigError("image_embeds must be None: the model reads no image tokens")
        if width == 0 or ranks.rank > 0:
            return None
        if given is None and (picture is None or encoder is None):
            lacking = "no image is given"
            if picture is not None:
                lacking = "its folder has no image_encoder/ in diffusers' layout and no models_clip_*.pth of Wan's"
            raise ConfigError(f"image_embeds must be given: the model reads tokens of {width} numbers, and {lacking}")
        if given is None:
            assert picture is not None, "it is refused above"
            assert encoder is not None, "it is refused above"
            given = encode_picture(encoder, picture)
        check_image_embeds(given, 1, width)
        return given

    tokens = ranks.run_collectively(make)
    if width == 0:
        return None
    count = int(ranks.first_says("" if tokens is None else str(tokens.shape[1])))

    def of_first() -> Tensor:
        assert tokens is not None, "the first rank has made them"
        return tokens

    return ranks.from_first("text", of_first, (1, count, width), torch.float32, parallel.device)
