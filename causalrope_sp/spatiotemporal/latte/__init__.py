"""Latte (arXiv 2401.03048)."""

from causalrope_sp.spatiotemporal.latte.latte_config import LatteConfig
from causalrope_sp.spatiotemporal.latte.latte_dit import LatteDiT
from causalrope_sp.spatiotemporal.latte.latte_stream import LatteStream
from causalrope_sp.spatiotemporal.latte.latte_weights import load_latte

__all__ = ["LatteConfig", "LatteDiT", "LatteStream", "load_latte"]
