"""Video Interface Networks (arXiv 2503.17539): chunks denoised in parallel and coordinated by global tokens."""

from causalrope_sp.vin.network import VideoInterfaceNetwork
from causalrope_sp.vin.parallel_sampler import StepOutput, sample_parallel_chunks
from causalrope_sp.vin.vin_config import PAPER_CHUNKS, PAPER_VIN, ParallelChunksConfig, VINConfig
from causalrope_sp.vin.vin_weights import inspect_vin, load_vin, save_vin

__all__ = [
    "PAPER_CHUNKS",
    "PAPER_VIN",
    "ParallelChunksConfig",
    "StepOutput",
    "VINConfig",
    "VideoInterfaceNetwork",
    "inspect_vin",
    "load_vin",
    "sample_parallel_chunks",
    "save_vin",
]
