"""Codecs: latents <-> pixel frames, streaming."""

from causalrope_sp.codec.interface import Codec, DecoderStream, EncoderStream
from causalrope_sp.codec.load import KINDS, load_codec

__all__ = ["KINDS", "Codec", "DecoderStream", "EncoderStream", "load_codec"]
