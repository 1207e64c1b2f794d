"""Mutates the seeds of one reader in one process, and measures each input. `fuzz.py` starts it.

    python benchmarks/faults/fuzz_worker.py READER COUNT SEED FOLDER guided|plain

FOLDER gets state.json with what was found so far, and `input` with the input that is being read.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import random
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from fuzz_options import WHOLE, option_lines
from fuzz_readers import BESIDE, READERS, Reader, in_folder, run_words
from mutations import LONGEST, mutate

HUNG_S = 60.0
MOST_S, MOST_BYTES = 2.0, 500_000_000


@dataclass
class State:
    """What was found: inputs read and refused; faults by their place in the code; the worst costs, in seconds of the
    processor and in bytes."""

    inputs: int = 0
    refused: int = 0
    faults: dict[str, list[Any]] = field(default_factory=dict)  # place: count, message, smallest input in hexadecimal
    slowest_s: float = 0.0
    largest_bytes: int = 0

    def add_fault(self, place: str, message: str, data: bytes) -> None:
        count, before, smallest = self.faults.get(place, (0, message, data.hex()))
        smaller = len(data.hex()) < len(smallest)
        self.faults[place] = [count + 1, message if smaller else before, data.hex() if smaller else smallest]


class Trial:
    """Reads inputs with one reader, in a folder of its own."""

    def __init__(self, reader: Reader, folder: Path) -> None:
        self.reader, self.folder, self.state = reader, folder, State()
        self.home = folder / "home"
        self._before = 0  # bytes of this process after the first inputs
        shutil.rmtree(self.home, ignore_errors=True)
        shutil.copytree(BESIDE, self.home)

    def read(self, data: bytes, suffix: str = "") -> None:
        """Reads one input and notes what it costs, and what it raises."""
        place = self.reader.place if "." in self.reader.place else self.reader.place + suffix
        path = self.home / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        (self.folder / "input").write_bytes(data)
        faulthandler.dump_traceback_later(HUNG_S, exit=True)
        _resident(reset=True)
        started = time.process_time()
        try:
            with _silent(self.folder / "said"):
                self._read(path, data)
        finally:
            faulthandler.cancel_dump_traceback_later()
        seconds, grown = time.process_time() - started, _resident()[1] - self._before
        self.state.inputs += 1
        self.state.slowest_s = max(self.state.slowest_s, seconds)
        self.state.largest_bytes = max(self.state.largest_bytes, grown)
        if seconds > MOST_S:
            self.state.add_fault("slow", f"{seconds:.1f} s", data)
        if grown > MOST_BYTES:
            self.state.add_fault("large", f"{grown / 1e6:.0f} MB", data)
        if self.reader.name == "options":
            self._tidy()

    def _read(self, path: Path, data: bytes) -> None:
        from causalrope_sp.errors import CausalRopeError

        try:
            self.reader.read(self.home, path)
        except CausalRopeError:
            self.state.refused += 1
        except BaseException as error:
            self.state.add_fault(_place(error), f"{type(error).__name__}: {error}"[:600], data)

    def forget(self) -> None:
        """Forgets what was noted, and takes this process's memory as the one that it has."""
        self.state, self._before = State(), _resident()[0]

    def _tidy(self) -> None:
        """Removes what commands wrote."""
        for path in self.home.iterdir():
            if not (BESIDE / path.name).exists():
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def save(self) -> None:
        target = self.folder / "state.json"
        target.with_suffix(".new").write_text(json.dumps(asdict(self.state)))
        target.with_suffix(".new").replace(target)


def warm_up(trial: Trial) -> None:
    """Reads a whole file of each kind, so that what is imported for the first one is not taken for its cost."""
    if trial.reader.name == "options":
        with in_folder(trial.home):
            for words in WHOLE.values():
                run_words(words, patience_s=HUNG_S)
    for suffix, content in {suffix: (suffix, content) for suffix, content in trial.reader.seeds()}.values():
        trial.read(content, suffix)
    trial.forget()


def run_plain(trial: Trial, count: int, seed: int) -> None:
    """Reads seeds, then mutations of them that are drawn by `seed`."""
    draw = random.Random(seed)
    seeds = seeds_of(trial.reader, draw, count)
    contents = [content for _, content in seeds]
    for number in range(count):
        suffix, content = seeds[number] if number < len(seeds) else draw.choice(seeds)
        trial.read(content if number < len(seeds) else mutate(content, draw, contents), suffix)
        if number % 20 == 0:
            trial.save()
    trial.save()


def run_guided(trial: Trial, count: int, seed: int) -> None:
    """Lets libFuzzer choose which inputs are mutated further, by the code of the library that they reach."""
    import atheris

    draw = random.Random(seed)
    seeds = seeds_of(trial.reader, draw, count)
    contents, suffixes = [content for _, content in seeds], sorted({suffix for suffix, _ in seeds})
    corpus = trial.folder / "inputs"
    shutil.rmtree(corpus, ignore_errors=True)
    corpus.mkdir()
    for number, (suffix, content) in enumerate(seeds):
        (corpus / str(number)).write_bytes(bytes([suffixes.index(suffix)]) + content)

    def read(data: bytes) -> None:
        trial.read(data[1:], suffixes[data[0] % len(suffixes)] if data else "")
        if trial.state.inputs % 20 == 0 or trial.state.inputs >= count:
            trial.save()
        if trial.state.inputs >= count:
            os._exit(0)

    def change(data: bytes, most: int, number: int) -> bytes:
        own = random.Random(number)
        if own.random() < 0.3:
            return atheris.Mutate(data, min(most, LONGEST))
        if own.random() < 0.5:  # else most inputs are soon broken at their first byte
            suffix, content = own.choice(seeds)
            data = bytes([suffixes.index(suffix)]) + content
        return data[:1] + mutate(data[1:], own, contents)[: most - 1]

    flags = [f"-runs={10 * count + 100}", f"-seed={seed}", f"-max_len={LONGEST}", "-rss_limit_mb=0", "-timeout=600"]
    flags += [f"-artifact_prefix={trial.folder}/"]
    atheris.Setup(
        [sys.argv[0], *flags, "-verbosity=0", "-len_control=0", "-mutate_depth=1", str(corpus)],
        read,
        custom_mutator=change,
    )
    atheris.Fuzz()


def seeds_of(reader: Reader, draw: random.Random, count: int) -> list[tuple[str, bytes]]:
    """The reader's whole files; for options one command line for each option and each kind of wrong value, half of the
    inputs at most."""
    if reader.name != "options":
        return reader.seeds()
    lines = [(".json", json.dumps(words).encode()) for words in option_lines()]
    draw.shuffle(lines)
    return [*reader.seeds(), *lines[: count // 2]]


def _place(error: BaseException) -> str:
    """Where an error came from: its type and the last line of the library that it passed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "causalrope_sp" in frame.filename]
    last = f"{frames[-1].filename.rsplit('causalrope_sp/', 1)[-1]}:{frames[-1].lineno}" if frames else "nowhere"
    return f"{type(error).__name__} at {last}"


def _resident(reset: bool = False) -> tuple[int, int]:
    """This process's memory now, and at its highest since the last reset, in bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    text = Path("/proc/self/status").read_text()
    now, most = (int(text.split(f"{name}:")[1].split()[0]) << 10 for name in ("VmRSS", "VmHWM"))
    return now, most


@contextlib.contextmanager
def _silent(log: Path) -> Iterator[None]:
    """Sends what libraries print, in whatever language, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    into = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(into, 1)
    os.dup2(into, 2)
    os.close(into)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in enumerate(kept, 1):
            os.dup2(descriptor, number)
            os.close(descriptor)


def main() -> None:
    name, count, seed, folder, way = sys.argv[1:]
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    warnings.simplefilter("ignore")
    if way == "guided":
        import atheris

        with atheris.instrument_imports(include=["causalrope_sp"]):
            import causalrope_sp.cli.main  # noqa: F401  # what it imports is measured too
    import torch

    torch.set_num_threads(1)
    trial = Trial(READERS[name], Path(folder))
    warm_up(trial)
    (run_guided if way == "guided" else run_plain)(trial, int(count), int(seed))


if __name__ == "__main__":
    main()
