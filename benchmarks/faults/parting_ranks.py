"""Runs trials of ranks that part ways: reads one trial a line, forks a process a rank, and says how each ended.

The libraries are imported and the model is read once, before the processes are forked, so that a trial takes seconds.
A rank ends as any Python program does, by the end of its main module. `parting.py` starts this file.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import hashlib
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from programs import Program, Step

from causalrope_sp import CausalRopeError, CausalVideoPipeline, SequenceParallel
from causalrope_sp.errors import RankLostError

PROMPTS = {"first": ("a red circle slides right", 1), "second": ("a blue square pulses", 2)}
FRAMES, INFERENCE_STEPS = 21, 2
PAUSE_S, TIMEOUT_S = 4.0, 2.0  # a consumer may pause for longer than a rank may be late


class Fault(Exception):
    """What a user's program raises."""


def serve() -> dict[str, Any] | None:
    """Answers trials until the input ends. Returns a rank's part of a trial in that rank's own process, else None."""
    for line in sys.stdin:
        trial = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids = {}
        for rank in range(trial["ranks"]):
            pid = os.fork()
            if pid == 0:
                return {**trial, "rank": rank, "port": port}
            pids[pid] = rank
        print(json.dumps(wait_for(pids, trial["patience_s"])), flush=True)
    return None


def wait_for(pids: dict[int, int], patience_s: float) -> list[dict[str, Any]]:
    """How each rank ended, in order of rank: its status, None if it had to be killed, and when.

    No rank is told that another one has ended: what a launcher would do is not what is tried here.
    """
    ended: dict[int, dict[str, Any]] = {}
    started = time.monotonic()
    while len(ended) < len(pids) and time.monotonic() - started < patience_s:
        pid, raw = os.waitpid(-1, os.WNOHANG)
        if pid in pids:
            status = os.waitstatus_to_exitcode(raw)
            ended[pids[pid]] = {"status": status, "at": time.monotonic()}
        time.sleep(0.005)
    for pid, rank in pids.items():
        if rank not in ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            ended[rank] = {"status": None, "at": time.monotonic()}
    return [ended[rank] for rank in sorted(ended)]


class Rank:
    """One rank of a trial: runs its program, and notes its steps, the digest of every chunk, and its end."""

    def __init__(self, trial: dict[str, Any]) -> None:
        self.trial, self.rank = trial, trial["rank"]
        self.program = Program(
            tuple(Step(*step) for step in trial["programs"][self.rank]["steps"]),
            trial["programs"][self.rank]["callback"],
            trial["programs"][self.rank]["threads"],
        )
        self.streams: dict[str, Any] = {}
        self.failed = False  # in a thread
        self.note("began")
        atexit.register(self.note, "ended")  # after all that the library does then, before torch is taken down

    def note(self, what: str, **fields: Any) -> None:
        """Appends a line to this rank's file: what happened, and when."""
        with open(Path(self.trial["folder"]) / f"rank{self.rank}.jsonl", "a") as file:
            file.write(json.dumps({"what": what, "at": time.monotonic(), **fields}) + "\n")

    def open_group(self) -> None:
        """Makes the group and the pipeline."""
        decode = self.trial["decode"]
        only_decodes = 1 if decode == "decode rank" else 0
        patience: Any = {"timeout_s": TIMEOUT_S} if self.trial["parting"] == "slow" else {}
        self.parallel = SequenceParallel.from_env(device="cpu", decode_ranks=only_decodes, **patience)
        self.pipe = CausalVideoPipeline.from_pretrained(
            "toybox", parallel=self.parallel, decode="inline" if only_decodes else decode
        )

    def run(self) -> None:
        """Runs all steps."""
        self.open_group()
        self.note("opened")
        if self.program.threads:
            steps = [[step for step in self.program.steps if step.stream == name] for name in PROMPTS]
            threads = [threading.Thread(target=self.take_all, args=(own,)) for own in steps]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if self.failed:
                sys.exit(2)
        else:
            self.take_all(self.program.steps)
        self.note("done")
        self.parallel.close()

    def take_all(self, steps: Any) -> None:
        """Takes steps one after the other. An error of a rank that parted is printed, as a user's program would."""
        for step in steps:
            self.note("step", do=step.do, stream=step.stream)
            try:
                self.take(step)
            except Fault as error:
                if self.trial["parting"] not in ("catch", "caught callback"):
                    raise
                self.note("caught", error=str(error))
            except (CausalRopeError, RankLostError) as error:
                os.write(2, f"error: {type(error).__name__}: {error}\n".encode())
                self.note("error", kind=type(error).__name__, error=str(error))
                if threading.current_thread() is threading.main_thread():
                    sys.exit(2)
                self.failed = True
                return

    def take(self, step: Step) -> None:
        """Takes one step."""
        if step.do == "open":
            prompt, seed = PROMPTS[step.stream]
            callback = lambda *args: self.on_step(step.stream, *args)  # noqa: E731
            self.streams[step.stream] = self.pipe.stream(
                prompt,
                seed=seed,
                num_frames=FRAMES,
                num_inference_steps=INFERENCE_STEPS,
                callback_on_step_end=callback,
            )
        elif step.do == "next":
            chunk = next(self.streams[step.stream], None)
            if chunk is not None and chunk.frames is not None:
                self.note("chunk", stream=step.stream, digest=hashlib.sha256(chunk.frames.tobytes()).hexdigest()[:12])
        elif step.do == "close" and step.stream in self.streams:
            self.streams.pop(step.stream).close()
        else:
            self.go_wrong(step.do)

    def go_wrong(self, do: str) -> None:
        """Takes a step that only a faulty program has."""
        self.note("fault", do=do)
        if do == "save":
            self.pipe.save_pretrained(Path(self.trial["folder"]) / "saved")
        elif do == "wrong":
            self.pipe.stream("a red circle slides right", num_frames=-1)
        elif do in ("raise", "catch"):
            raise Fault("a fault of the user's program")
        elif do == "exit":
            sys.exit(3)
        elif do == "end":
            self.parallel.close()
        elif do == "pause":
            time.sleep(PAUSE_S)
        elif do == "reopen":
            for stream in self.streams.values():
                stream.close()
            self.streams.clear()
            self.parallel.close()
            self.open_group()

    def on_step(self, stream: str, _: Any, step: int, timestep: float, kwargs: dict[str, Any]) -> None:
        """Raises at the program's moment."""
        if self.program.callback is not None and [stream, kwargs["chunk"], step] == list(self.program.callback):
            self.note("fault", do="callback")
            raise Fault("a fault of the user's callback")


def run_as_rank(trial: dict[str, Any]) -> None:
    """Becomes a rank: its environment is that of a launcher, its messages go to its own file."""
    log = os.open(Path(trial["folder"]) / f"rank{trial['rank']}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ |= {
        "RANK": str(trial["rank"]),
        "LOCAL_RANK": str(trial["rank"]),
        "WORLD_SIZE": str(trial["ranks"]),
        "LOCAL_WORLD_SIZE": str(trial["ranks"]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(trial["port"]),
    }
    Rank(trial).run()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory():
        list(CausalVideoPipeline.from_pretrained("toybox").stream("a red circle slides right", num_frames=9))
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    if (own := serve()) is not None:
        run_as_rank(own)
