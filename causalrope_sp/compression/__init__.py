"""Video compression with a causal video model as the prior, which needs no training."""

from causalrope_sp.compression.auto_prompt import find_prompt
from causalrope_sp.compression.bitstream import Header, split
from causalrope_sp.compression.coding import DecodedChunk, EncodingOptions, decode, encode

__all__ = ["DecodedChunk", "EncodingOptions", "Header", "decode", "encode", "find_prompt", "split"]
