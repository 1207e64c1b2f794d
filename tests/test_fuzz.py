"""Every reader, given the files of the corpus and some mutations of them, raises errors of the library alone, soon.

Files whose name begins with found- once raised something raw or cost too much. `benchmarks/faults/fuzz.py` runs more.
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from causalrope_sp.cli.main import cli
from causalrope_sp.errors import CausalRopeError

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "faults"))
from fuzz_options import VALUES, WHOLE, option_lines
from fuzz_readers import CORPUS, READERS, Reader, run_words
from fuzz_worker import Trial, run_plain
from mutations import mutate

SEEDS = [(name, number) for name, reader in READERS.items() for number in range(len(reader.seeds()))]
SHORT = 60  # inputs a reader
LOADING = ("model-config", "transformer-config", "options")  # a model is loaded for each input, or a command run


def faults(trial: Trial) -> dict[str, str]:
    return {place: f"{message} ({data[:2000]})" for place, (_, message, data) in trial.state.faults.items()}


@pytest.mark.parametrize(("name", "number"), SEEDS)
def test_every_file_of_the_corpus_is_read_or_refused(name: str, number: int, tmp_path: Path) -> None:
    trial = Trial(READERS[name], tmp_path)
    suffix, content = READERS[name].seeds()[number]
    trial.read(content, suffix)  # what is imported for the first one is not its cost
    trial.forget()
    trial.read(content, suffix)
    assert faults(trial) == {}


@pytest.mark.parametrize("name", [name for name in READERS if name not in ("options", "environment")])
def test_whole_files_are_taken(name: str, tmp_path: Path) -> None:
    """Else nothing behind the first check would be tried."""
    taken = 0
    for suffix, content in READERS[name].seeds():
        trial = Trial(READERS[name], tmp_path)
        trial.read(content, suffix)
        taken += trial.state.refused == 0
    assert taken > 0


@pytest.mark.parametrize("name", [name for name in READERS if name not in LOADING])
def test_mutated_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    trial = Trial(READERS[name], tmp_path)
    for suffix, content in READERS[name].seeds()[:3]:
        trial.read(content, suffix)
    trial.forget()
    run_plain(trial, SHORT, seed=1)
    assert faults(trial) == {}
    assert trial.state.inputs == SHORT
    assert trial.state.refused > 0


def test_a_fault_is_seen(tmp_path: Path) -> None:
    """A reader that raises something raw, is slow or takes much memory does not pass."""

    def read(home: Path, path: Path) -> Any:
        kind = path.read_text()
        if kind == "raw":
            raise KeyError("lost")
        if kind == "refused":
            raise CausalRopeError("no")
        if kind == "large":
            return bytearray(600_000_000).count(1)
        until = time.process_time() + 2.1
        while kind == "slow" and time.process_time() < until:
            pass
        return None

    trial = Trial(Reader("test", "x.txt", read), tmp_path)
    trial.forget()
    for kind in ("raw", "refused", "large", "slow", "taken"):
        trial.read(kind.encode())
    assert (trial.state.inputs, trial.state.refused) == (5, 1)
    found = {place: bytes.fromhex(data) for place, (_, _, data) in trial.state.faults.items()}
    assert {place.split(" at ")[0]: data for place, data in found.items()} == {
        "KeyError": b"raw",
        "large": b"large",
        "slow": b"slow",
    }


def test_mutations_are_those_of_their_seed() -> None:
    for name in ("policy", "lora", "torch-file", "picture"):
        content = READERS[name].seeds()[0][1]
        made = [mutate(content, random.Random(seed), [content]) for seed in range(40)]
        assert made == [mutate(content, random.Random(seed), [content]) for seed in range(40)]
        assert len(set(made)) > 30


def test_every_option_of_every_command_has_its_lines() -> None:
    lines = list(option_lines())
    assert set(WHOLE) == set(cli.commands)
    for name, command in cli.commands.items():
        used = {word.split("=")[0] for line in lines if line[0] == name for word in line}
        assert used >= {option for parameter in command.params for option in parameter.opts if option[0] == "-"}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs every command once, since an interrupted import would leave half a module to the next command of this
    process; returns the folder of what they wrote."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in WHOLE.values():
            serves = words[0] == "serve"  # until Ctrl-C
            assert run_words(words, patience_s=8 if serves else 200).status == (130 if serves else 0)
    return folder


@pytest.mark.parametrize("value", ["x" * 300, "\x1b[31mred\x1b[0m", "a\nb", "1_0", "cuda:x", "\udcff", "9" * 5000])
def test_a_wrong_value_of_any_option_is_one_sentence(
    value: str, imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all options of all commands, by click's own list of them: a new option cannot be forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("one.mp4", "one.cvc"):
        shutil.copy(imported / name, tmp_path)
    assert value in VALUES
    for line in option_lines():
        if value in line:
            said = run_words(line, patience_s=0.5)
            assert not said.raw, (line, said.raw)


def test_the_corpus_is_small() -> None:
    assert sum(file.stat().st_size for file in CORPUS.rglob("*")) < 600_000
