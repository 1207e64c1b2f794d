"""One trial: a run is started, a fault is injected at a moment, and what is left is looked at."""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import av

SCRIPT = Path(__file__).with_name("script.py")
PROMPT = "a red circle slides right"
LONG, SHORT = 4000, 45  # frames: more than any trial waits for, and a whole run of some seconds
FPS_CHUNK = 12
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Fault:
    """What goes wrong. `who` is a rank, or "launcher"; `script` runs a user's script in place of the command."""

    kind: str  # kill, term, int, stop, full disk, raise, slow
    ranks: int
    who: int | str
    script: bool
    loading: bool  # at a moment while it loads, else while frames are made

    def __str__(self) -> str:
        where = "script" if self.script else "generate"
        when = "loading" if self.loading else "frames"
        return f"{self.kind}, {where}, {self.ranks} ranks, {self.who}, {when}"


@dataclass(frozen=True)
class Outcome:
    """What was left: seconds until all processes were gone, the exit status, frames that a player shows, frames that
    were written when the fault came, what was said, and invariants that do not hold, in words."""

    fault: Fault
    gone_s: float
    status: int | None
    played: int
    said: str
    broken: tuple[str, ...]


def run_trial(fault: Fault, draw: random.Random) -> Outcome:
    """Starts a run, injects the fault and checks the invariants."""
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        log = folder / "log"
        process = _start(fault, folder, log)
        try:
            written = _wait_for_moment(fault, folder, draw)
            victims = _inject(fault, process)
            started = time.monotonic()
            status = _wait(process, PATIENCE_S)
            gone = time.monotonic() - started
            orphans = _alive(process.pid, folder)
        finally:
            for pid in [process.pid, *_alive(process.pid, folder)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        said = log.read_text(errors="replace")
        return _outcome(fault, folder, status, gone, orphans, written, victims, said)


def _outcome(
    fault: Fault,
    folder: Path,
    status: int | None,
    gone: float,
    orphans: list[int],
    written: int,
    victims: list[int],
    said: str,
) -> Outcome:
    broken, played = [], 0
    videos = sorted(path for path in folder.iterdir() if path.suffix == ".mp4")
    if videos:
        played = max(_played(video) for video in videos)
    if status is None:
        broken.append(f"still there after {PATIENCE_S:g} s")
    limit = 20.0 if fault.kind == "stop" else 12.0
    if status is not None and gone > limit:
        broken.append(f"gone after {gone:.0f} s, not {limit:.0f}")
    if orphans:
        broken.append(f"{len(orphans)} orphans")
    left = [path.name for path in folder.iterdir() if path.suffix not in (".mp4", "") or path.name.startswith(".")]
    if left:
        broken.append(f"temporary files: {', '.join(left)}")
    if played < written - FPS_CHUNK:
        broken.append(f"{played} of {written} frames can be played")
    if (
        fault.kind in ("kill", "stop", "raise")
        and fault.ranks > 1
        and isinstance(fault.who, int)
        and not _named(said, fault.who)
    ):
        broken.append("the rank is not named")
    if said.count("Traceback") > said.count("ChildFailedError:") and not fault.script:  # one is the launcher's own
        broken.append("a traceback")
    if fault.kind != "slow" and status == 0 and fault.kind != "raise":
        broken.append("status 0")
    return Outcome(fault, gone, status, played, said[-2000:], tuple(broken))


def _start(fault: Fault, folder: Path, log: Path) -> subprocess.Popen[bytes]:
    out, frames = str(folder / "video.mp4"), SHORT if fault.kind in ("slow", "raise") else LONG
    python = [sys.executable]
    if fault.ranks > 1:
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(fault.ranks)]
    if fault.script:
        extra = {"slow": ["pause", "0.3"], "raise": ["raise", str(fault.who), "1"]}.get(fault.kind, [])
        words = [str(SCRIPT), out, str(frames), *extra]
    else:
        words = ["-m", "causalrope_sp", "generate", PROMPT, "--device", "cpu", "--frames", str(frames), "--out", out]
    environment = {**quiet_environment(), "FAULT_TRIAL": str(folder)}
    limit = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))) if fault.kind == "full disk" else None
    with log.open("wb") as said:
        return subprocess.Popen(
            [*python, *words],
            stdout=said,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=limit,
        )


def quiet_environment() -> dict[str, str]:
    """This process's environment, with one thread a process and no GPU."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _wait_for_moment(fault: Fault, folder: Path, draw: random.Random) -> int:
    """Waits for a random moment, and returns how many frames can be played then."""
    if fault.loading:
        time.sleep(draw.uniform(0.5, 4.0))
        return 0
    started = time.monotonic()
    while time.monotonic() - started < PATIENCE_S:
        if any(_played(video) for video in folder.glob("*.mp4")):
            break
        time.sleep(0.1)
    if fault.kind in ("kill", "term", "int", "stop"):
        time.sleep(draw.uniform(0, 2.0))
    return max((_played(video) for video in folder.glob("*.mp4")), default=0)


def _inject(fault: Fault, process: subprocess.Popen[bytes]) -> list[int]:
    number = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT, "stop": signal.SIGSTOP}
    if fault.kind not in number:
        return []
    victims = [process.pid]
    if isinstance(fault.who, int) and fault.ranks > 1:
        victims = []
        started = time.monotonic()
        while not victims and time.monotonic() - started < PATIENCE_S:  # the launcher may not have started it yet
            victims = [pid for pid in _children(process.pid) if _environment(pid).get("RANK") == str(fault.who)]
            time.sleep(0.05)
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number[fault.kind])
    return victims


def _wait(process: subprocess.Popen[bytes], patience_s: float) -> int | None:
    try:
        return process.wait(patience_s)
    except subprocess.TimeoutExpired:
        return None


def _alive(launcher: int, folder: Path) -> list[int]:
    """Processes of the trial that are still there, the launcher left out; they are given a moment to end."""
    for _ in range(20):
        found = [
            int(name)
            for name in os.listdir("/proc")
            if name.isdigit() and int(name) != launcher and _environment(int(name)).get("FAULT_TRIAL") == str(folder)
        ]
        if not found:
            return []
        time.sleep(0.1)
    return found


def _children(pid: int) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError, IndexError):
            if name.isdigit() and int(Path(f"/proc/{name}/stat").read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found += [int(name), *_children(int(name))]
    return found


def _environment(pid: int) -> dict[str, str]:
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def _played(video: Path) -> int:
    """How many frames a player shows."""
    shown = 0
    with contextlib.suppress(av.FFmpegError, OSError), av.open(str(video)) as container:
        for _ in container.decode(video=0):
            shown += 1
    return shown


def _named(said: str, rank: object) -> bool:
    """By this library, or by the launcher's summary of a rank that was lost before this library was loaded."""
    return re.search(rf"rank\s*:?\s*{rank}\b", said) is not None
