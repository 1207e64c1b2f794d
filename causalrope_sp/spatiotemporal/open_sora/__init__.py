"""Open-Sora 1.2 (arXiv 2412.20404)."""

from causalrope_sp.spatiotemporal.open_sora.open_sora_config import OpenSoraConfig
from causalrope_sp.spatiotemporal.open_sora.open_sora_dit import OpenSoraDiT
from causalrope_sp.spatiotemporal.open_sora.open_sora_stream import OpenSoraStream, packed
from causalrope_sp.spatiotemporal.open_sora.open_sora_weights import load_open_sora

__all__ = ["OpenSoraConfig", "OpenSoraDiT", "OpenSoraStream", "load_open_sora", "packed"]
