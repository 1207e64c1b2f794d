"""Every reader of the library as a function of one mutated file, among files that are whole.

Each takes the folder that holds a copy of `corpus/beside`, a small model in diffusers' layout, in which one file is the
mutated one.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).parent / "corpus"
BESIDE = CORPUS / "beside"
PATIENCE_S = 1.0  # how long a command may work before it gets Ctrl-C: many options ask for hours
READ_FRAMES = 64  # of a video; a stream reads no further than its next chunk needs


@dataclass(frozen=True)
class Reader:
    """What reads a file.

    Attributes:
        name: of the reader, and of its folder in the corpus.
        place: where the mutated file is put; a name without a suffix takes that of the seed.
        read: reads the file, in the folder; it may raise CausalRopeError alone.
    """

    name: str
    place: str
    read: Callable[[Path, Path], Any]

    def seeds(self) -> list[tuple[str, bytes]]:
        """The suffix and content of each seed: the whole file of that place, and those of the corpus."""
        whole = [BESIDE / self.place] if (BESIDE / self.place).is_file() else []
        files = [*whole, *sorted((CORPUS / self.name).glob("*"))]
        return [(file.suffix, file.read_bytes()) for file in files]


def _plan_model(home: Path, path: Path) -> None:
    from causalrope_sp.pipeline.planned_model import PlannedModel

    PlannedModel.open(str(home)).override(window=9).workload(None)


def _open_model(home: Path, path: Path) -> None:
    from causalrope_sp.pipeline.pipeline import CausalVideoPipeline

    _plan_model(home, path)
    CausalVideoPipeline.from_pretrained(home, device="cpu", window=9)


def _load_weights(home: Path, path: Path) -> None:
    from causalrope_sp.cli.inspect import examine, report_text, vin_fields
    from causalrope_sp.weights import load_model

    report = examine(str(path), None, None, {})
    report_text(report, vin_fields(str(path), report))
    load_model(path)


def _merge_lora(home: Path, path: Path) -> None:
    from causalrope_sp.weights import inspect_adapter, load_model

    inspect_adapter(path)
    load_model(home / "transformer", loras=[path])


def _read_embeds(home: Path, path: Path) -> None:
    from causalrope_sp.text import load_embeds

    load_embeds(path)


def _read_session(home: Path, path: Path) -> None:
    from causalrope_sp.config import DiTConfig
    from causalrope_sp.sessions import check_fits, read_session

    saved = read_session(path)
    model = DiTConfig(
        dim=30, ffn_dim=8, num_heads=3, num_layers=2, text_dim=4, text_len=5, in_channels=3, patch_size=(1, 1, 1)
    )
    check_fits(saved, model_digest="0123456789abcdef", loras=(), model=model, stride=8, codec="wan")
    if saved.cache is not None:
        for branch in saved.cache.branches:
            for layer in range(saved.cache.layers):
                saved.cache.layer(branch.name, layer, slice(1, 3), slice(0, 2))


def _load_codec(home: Path, path: Path) -> None:
    from causalrope_sp.codec import load_codec

    load_codec(path.parent if path.name == "config.json" or "vae" in str(path.parent.name) else path)


def _load_vin(home: Path, path: Path) -> None:
    from causalrope_sp.vin.vin_weights import load_vin
    from causalrope_sp.weights import inspect_checkpoint

    load_vin(path, inspect_checkpoint(home / "transformer").config)


def _load_case(home: Path, path: Path) -> None:
    import torch

    from causalrope_sp.verification.cases import case_files, load_case

    case_files(path.parent)
    load_case(path, torch.float32)


def _load_latte(home: Path, path: Path) -> None:
    from causalrope_sp.spatiotemporal.latte import load_latte

    load_latte(path.parent)


def _open_text_encoder(home: Path, path: Path) -> None:
    from causalrope_sp.text import UMT5TextEncoder

    UMT5TextEncoder.from_pretrained(home).encode("a red circle & its shadow")


def _find_policy(home: Path, path: Path) -> None:
    from causalrope_sp.reuse import find_policy

    find_policy(path)


def _read_rates(home: Path, path: Path) -> None:
    from causalrope_sp.cli.plan import describe_machine

    describe_machine("h100", "nvlink", path)


def _read_picture(home: Path, path: Path) -> None:
    from causalrope_sp.io.media_reader import read_picture

    read_picture(path, 16, 24)


def _read_video(home: Path, path: Path) -> None:
    from causalrope_sp.io.media_reader import read_video

    for number, _ in enumerate(read_video(path, 16, 24, 16.0)):
        if number == READ_FRAMES:
            break


def _encode_prompt(home: Path, path: Path) -> None:
    from causalrope_sp.toybox.toybox_text import ToyboxText

    ToyboxText().encode(path.read_bytes().decode("utf-8", "surrogateescape"), seed=0)


def _read_environment(home: Path, path: Path) -> None:
    """Variables of a launcher, as a JSON object."""
    from causalrope_sp.rank_environment import RankEnvironment

    content = _json(path)
    variables = content if isinstance(content, dict) else {}
    before = dict(os.environ)
    try:
        for name, text in variables.items():
            with contextlib.suppress(ValueError, OSError):  # no environment can hold it
                os.environ[str(name)] = str(text)
        RankEnvironment.read().check_rendezvous()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run_command(home: Path, path: Path) -> None:
    """The words of a command line, as a JSON list. A command that works on gets Ctrl-C."""
    content = _json(path)
    words = [str(word) for word in content] if isinstance(content, list) else [str(content)]
    with in_folder(home):
        said = run_words(words)
    if said.raw:
        raise AssertionError(f"{words}: {said.raw}")


@dataclass(frozen=True)
class Said:
    """How a command ended: its status, what it wrote, and what of that no user should see ("" if nothing)."""

    status: int
    output: str
    raw: str


def run_words(words: Sequence[str], patience_s: float = PATIENCE_S) -> Said:
    """Runs a command line in this process, with Ctrl-C after a time.

    Args:
        words: the words; what no command line can hold is taken out of them.
        patience_s: after how many seconds it gets Ctrl-C.

    Returns:
        How it ended. Raw are a traceback, a status that is none of 0, 1, 2 and 130, control characters, and wrong input
        that is not told in one line.
    """
    from causalrope_sp.cli.main import cli

    out, err = io.StringIO(), io.StringIO()
    words = [word.replace("\0", "").encode("utf-8", "replace").decode() for word in words]

    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, patience_s)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main(words, prog_name="causalrope-sp")
        status = 0
    except SystemExit as done:
        status = done.code if isinstance(done.code, int) else 1
    except KeyboardInterrupt:  # before the command handles it, or after
        status = 130
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        _forget_logging()
    written = out.getvalue() + err.getvalue()
    return Said(status, written, _raw(status, written, err.getvalue()))


def _raw(status: int, written: str, errors: str) -> str:
    if status not in (0, 1, 2, 130):
        return f"status {status}"
    if "Traceback" in errors:
        return errors[-400:]
    if any(not (c.isprintable() or c == "\n") for c in written):
        return f"control characters: {ascii(written)[:400]}"
    if status == 2 and not errors.splitlines()[-1].startswith("error: "):
        return f"status 2 without a sentence: {errors[-400:]}"
    return ""


def _forget_logging() -> None:
    """Takes away what a command added to the packages' loggers."""
    import logging

    for name in ("causalrope_sp", "causalrope_kernels"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()


def _json(path: Path) -> Any:
    """The content of a file that is JSON; its text if it is none."""
    text = path.read_bytes().decode("utf-8", "replace")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


@contextlib.contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


READERS = {
    reader.name: reader
    for reader in (
        Reader("model-config", "pipeline.json", _open_model),
        Reader("model-index", "model_index.json", _plan_model),
        Reader("transformer-config", "transformer/config.json", _open_model),
        Reader("vae-config", "vae/config.json", _load_codec),
        Reader("scheduler-config", "scheduler/scheduler_config.json", _plan_model),
        Reader("text-encoder-config", "text_encoder/config.json", _open_text_encoder),
        Reader("tokenizer", "tokenizer/tokenizer.json", _open_text_encoder),
        Reader("text-encoder-weights", "text_encoder/model.safetensors", _open_text_encoder),
        Reader("policy", "policy.json", _find_policy),
        Reader("measured-rates", "rates.json", _read_rates),
        Reader("shard-index", "shards/m.safetensors.index.json", _load_weights),
        Reader("safetensors", "w.safetensors", _load_weights),
        Reader("torch-file", "torch/w.pth", _load_weights),
        Reader("lora", "lora.safetensors", _merge_lora),
        Reader("embeddings", "e.safetensors", _read_embeds),
        Reader("session", "session.safetensors", _read_session),
        Reader("vae-weights", "vae/diffusion_pytorch_model.safetensors", _load_codec),
        Reader("codec-file", "codec.pth", _load_codec),
        Reader("latte-config", "latte/config.json", _load_latte),
        Reader("vin", "vin.safetensors", _load_vin),
        Reader("reference-case", "cases/case.safetensors", _load_case),
        Reader("picture", "picture", _read_picture),
        Reader("video", "video", _read_video),
        Reader("prompt", "prompt.txt", _encode_prompt),
        Reader("environment", "environment.json", _read_environment),
        Reader("options", "words.json", _run_command),
    )
}
