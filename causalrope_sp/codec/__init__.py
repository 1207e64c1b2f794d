"""Codecs: latents <-> pixel frames, streaming."""

from causalrope_sp.codec.codec_loader import KINDS, load_codec
from causalrope_sp.codec.interface import Codec, DecoderStream, EncoderStream

__all__ = ["KINDS", "Codec", "DecoderStream", "EncoderStream", "load_codec"]
