"""Every test runs on one thread, and memory that is allocated but never written reads as NaN."""

import os

# Without a GPU kernels are interpreted, which must be said before any is defined; and then no test may find a GPU.
if os.environ.get("CAUSALROPE_TEST_DEVICE", "cpu") == "cpu":
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
else:  # cuBLAS is deterministic with this workspace alone, and torch refuses it otherwise
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from causalrope_sp.distributed.launch import RankPool

pytest.register_assert_rewrite("tests.support")  # an assertion there says as much as one in a test
settings.register_profile("shared machine", deadline=None)  # how long an example takes is not what is tested
settings.load_profile("shared machine")


@pytest.fixture(autouse=True, scope="session")
def _poisoned_memory() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in the background begins with Ctrl-C ignored
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Processes for the tests that need ranks, started once."""
    with RankPool() as pool:
        yield pool


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of reference cases."""
    return Path(__file__).parent / "reference_cases"
