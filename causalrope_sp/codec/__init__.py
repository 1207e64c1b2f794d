"""Codecs, which decode latent frames to pixel frames and encode pixel frames to latent frames, chunk by chunk."""

from causalrope_sp.codec.codec_loader import KINDS, load_codec
from causalrope_sp.codec.interface import Codec, DecoderStream, EncoderStream

__all__ = ["KINDS", "Codec", "DecoderStream", "EncoderStream", "load_codec"]
