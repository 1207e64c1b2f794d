"""Several machines: two network namespaces of this one, each with its own torchrun, meet over a cable between them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.paths import ROOT

WORDS = ["generate", "a red circle slides right", "--frames", "9"]
NAMES = [f"causalrope-{os.getpid()}-{n}" for n in range(2)]
CABLE = [f"cr{os.getpid() % 10**6}{side}" for side in "ab"]
ADDRESSES = ["10.213.7.1", "10.213.7.2"]
HOST = ["is_host=1,join_timeout=60", "is_host=0,join_timeout=60"]  # both machines have one name: it cannot tell


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[list[list[str]]]:
    """What to put before a command so that it runs on the first or the second machine."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need iproute2's `ip`, which is not installed")
    try:
        try:
            for name in NAMES:
                ip("netns", "add", name)
            ip("link", "add", CABLE[0], "type", "veth", "peer", "name", CABLE[1])
            for name, end, address in zip(NAMES, CABLE, ADDRESSES, strict=True):
                ip("link", "set", end, "netns", name)
                ip("-n", name, "address", "add", f"{address}/24", "dev", end)
                ip("-n", name, "link", "set", end, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
        yield [["ip", "netns", "exec", name] for name in NAMES]
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(name)) for name in sorted(folder.glob("*.png"))]).astype(float)


def test_two_machines_make_the_video_of_one(machines: list[list[str]], tmp_path: Path) -> None:
    """Ranks of one machine trade tokens for heads, and the machines share the tokens."""
    python, module = [sys.executable, "-m"], ["-m", "causalrope_sp"]
    subprocess.run([*python, "causalrope_sp", *WORDS, "--out", f"{tmp_path}/one/"], cwd=ROOT, check=True, timeout=120)
    launch = ["torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", f"{ADDRESSES[0]}:29571", "--rdzv-id", "test"]
    words = [*WORDS, "--strategy", "ulysses2xgather-kv2", "--out", f"{tmp_path}/two/"]
    started = [
        subprocess.Popen(
            [*machine, *python, *launch, "--local-addr", address, "--rdzv-conf", conf, *module, *words],
            cwd=ROOT,
            env={**os.environ, "GLOO_SOCKET_IFNAME": cable, "TP_SOCKET_IFNAME": cable},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for machine, address, cable, conf in zip(machines, ADDRESSES, CABLE, HOST, strict=True)
    ]
    try:
        outputs = [process.communicate(timeout=180) for process in started]
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert [process.returncode for process in started] == [0, 0], outputs
    assert sum("9 frames of" in stdout for stdout, _ in outputs) == 1
    one, two = pictures(tmp_path / "one"), pictures(tmp_path / "two")
    assert one.shape == two.shape == (9, *one.shape[1:])
    assert np.mean((one - two) ** 2) < 255**2 / 10**6  # PSNR > 60 dB
