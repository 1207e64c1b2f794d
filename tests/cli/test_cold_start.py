"""What a cold `generate` with the embedded model may import: nothing that costs more than the video."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HEAVY = {
    "accelerate", "diffusers", "huggingface_hub", "jinja2", "matplotlib", "networkx", "scipy", "sympy", "transformers",
    "triton", "fastapi", "prometheus_client", "starlette", "uvicorn", "websockets",
}  # fmt: skip
CODE = """
import sys
from causalrope_sp.cli.main import main
sys.argv = [*"causalrope-sp generate ball --frames 9 --device cpu --out".split(), sys.argv[1]]
sys.argv[2] = "a red circle slides right"
main()
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_generate_imports_nothing_heavy(tmp_path: Path) -> None:
    video = tmp_path / "video.mp4"
    done = subprocess.run([sys.executable, "-c", CODE, str(video)], capture_output=True, text=True, check=True)
    modules = done.stdout.splitlines()[-1].split()
    assert video.exists()
    assert "torch" in modules
    assert not HEAVY & set(modules)
