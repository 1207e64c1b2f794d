"""Latte (arXiv 2401.03048), a factorized video DiT: its layers attend within a frame, then across frames."""

from causalrope_sp.latte.latte_config import LatteConfig
from causalrope_sp.latte.latte_dit import LatteDiT, LattePass
from causalrope_sp.latte.latte_stream import LatteStream
from causalrope_sp.latte.latte_weights import load_latte

__all__ = ["LatteConfig", "LatteDiT", "LattePass", "LatteStream", "load_latte"]
