"""A session that is saved goes on from its file as if nothing had been, and what cannot go on is one sentence."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from causalrope_sp import CausalVideoPipeline, CheckpointError, ConfigError
from causalrope_sp.errors import OutputError
from causalrope_sp.pipeline.session import Session
from causalrope_sp.weights import checkpoint_digest

RED, BLUE = "a red circle slides right", "a blue square bounces"
FILM = [np.full((64, 64, 3), 20 * n, np.uint8) for n in range(9)]


@pytest.fixture(scope="module")
def pipe() -> CausalVideoPipeline:
    return CausalVideoPipeline.from_pretrained("toybox", device="cpu")


def steps(session: Session, count: int) -> list[tuple[Any, ...]]:
    """All that a consumer sees of the next chunks, but for times."""
    made = [session.step() for _ in range(count)]
    return [(chunk.index, chunk.first_frame_index, chunk.prompt_id, chunk.frames) for chunk in made]


def assert_same(found: list[tuple[Any, ...]], expected: list[tuple[Any, ...]], levels: int = 0) -> None:
    assert [chunk[:3] for chunk in found] == [chunk[:3] for chunk in expected]
    for (*_, one), (*_, other) in zip(found, expected, strict=True):
        assert np.abs(one.astype(int) - other).max() <= levels


def nothing(session: Session) -> Session:
    return session


def steered(session: Session) -> Session:
    session.set_prompt("a green circle pulses")  # under which no chunk is made
    session.set_prompt(BLUE)
    return session


def moving(session: Session) -> Session:
    session.set_prompt(BLUE, over_chunks=3)
    session.step()
    return session


def new_shot(session: Session) -> Session:
    session.set_prompt(BLUE, recache=False, new_shot=True)
    session.step()
    return session


def taken_back(session: Session) -> Session:
    session.set_prompt(BLUE, recache=False)
    steps(session, 2)
    session.rewind(3)
    return session


def forked(session: Session) -> Session:
    return session.fork(seed=11)


@pytest.mark.parametrize("change", [nothing, steered, moving, new_shot, taken_back, forked])
@pytest.mark.parametrize(("made", "window"), [(1, 12), (5, 9)], ids=["window not full", "window slides"])
def test_every_bit_goes_on(
    pipe: CausalVideoPipeline, change: Callable[[Session], Session], made: int, window: int, tmp_path: Path
) -> None:
    session = pipe.open(RED, seed=3, window=window, sink=1, history=2)
    steps(session, made + 2 * (change is taken_back and made == 1))
    session = change(session)
    session.save(tmp_path / "s")
    session.save(tmp_path / "s")
    resumed = pipe.resume(tmp_path / "s")
    again = pipe.resume(tmp_path / "s")
    expected = steps(session, 2)
    assert_same(steps(resumed, 2), expected)
    resumed.save(tmp_path / "later")
    for each in (session, resumed, again):
        each.set_prompt("a small green triangle bounces" if change is nothing else RED)
    assert_same(steps(resumed, 2), steps(session, 2))
    assert_same(steps(pipe.resume(tmp_path / "later"), 0), [])
    assert [p.prompt for p in resumed.prompts] == [p.prompt for p in session.prompts]


@pytest.mark.parametrize(
    ("name", "load", "options"),
    [
        ("toybox", {"rope": "relative"}, {}),
        ("toybox", {"cache": "int8"}, {}),
        ("toybox", {"cache": "fp8", "rope": "relative"}, {}),
        ("toybox", {"decode": "overlap"}, {}),
        ("toybox", {}, {"image": FILM[5]}),
        ("toybox", {}, {"video": FILM}),
        ("toybox", {"dtype": "float64"}, {}),
        ("toybox-flow", {"num_inference_steps": 2, "guidance_scale": 2.0}, {"negative_prompt": BLUE}),
        ("toybox-flow", {"num_inference_steps": 3, "reuse": None}, {"reuse": "pab:latte"}),
    ],
    ids=["relative", "int8", "fp8, relative", "made ahead", "image", "continued video", "float64", "guidance", "reuse"],
)
def test_every_kind_of_session_goes_on(
    name: str, load: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    load = {key: value for key, value in load.items() if value is not None}
    pipe = CausalVideoPipeline.from_pretrained(name, device="cpu", **load)
    session = pipe.open(RED, seed=3, window=9, sink=1, **options)
    steps(session, 4)
    session.set_prompt(BLUE)
    session.save(tmp_path / "s")
    policy = {"reuse": options["reuse"]} if "reuse" in options else {}
    resumed = pipe.resume(tmp_path / "s", **policy)
    assert_same(steps(resumed, 3), steps(session, 3))
    for each in (session, resumed):
        each.rewind(7)
    assert_same(steps(resumed, 1), steps(session, 1), levels=1)  # both compute their caches anew


def test_a_video_with_an_end_ends(pipe: CausalVideoPipeline, tmp_path: Path) -> None:
    session = pipe.open(RED, seed=3, num_frames=40)
    steps(session, 2)
    session.save(tmp_path / "s")
    resumed = pipe.resume(tmp_path / "s")
    rest, expected = [chunk.frames for chunk in resumed], [chunk.frames for chunk in session]
    assert len(rest) == len(expected) == 2
    assert all(torch.equal(torch.tensor(one), torch.tensor(other)) for one, other in zip(rest, expected, strict=True))
    assert resumed.is_complete
    session.save(tmp_path / "s")
    assert list(pipe.resume(tmp_path / "s")) == []


@pytest.mark.parametrize("decode", ["inline", "overlap"])
def test_without_the_cache_the_window_is_computed_anew(decode: Any, tmp_path: Path) -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox", device="cpu", decode=decode)
    session = pipe.open(RED, seed=3, window=9, sink=1)
    steps(session, 5)
    session.save(tmp_path / "small", cache=False)
    session.save(tmp_path / "whole")
    resumed = pipe.resume(tmp_path / "small")
    made_ahead = decode == "overlap"
    assert_same(steps(resumed, made_ahead), steps(session, made_ahead), levels=1)
    judge = pipe.resume(tmp_path / "whole")
    with torch.inference_mode():
        judge._begun().compute_anew()
    steps(judge, made_ahead)
    assert_same(steps(resumed, 3), steps(judge, 3), levels=1)  # the decoder reads its last frames again
    assert (tmp_path / "small").stat().st_size * 10 < (tmp_path / "whole").stat().st_size


@pytest.mark.parametrize(("dtype", "levels"), [("float64", 1), ("bfloat16", 60)])
def test_another_dtype_goes_on(pipe: CausalVideoPipeline, dtype: str, levels: int, tmp_path: Path) -> None:
    session = pipe.open(RED, seed=3, window=9)
    steps(session, 4)
    session.save(tmp_path / "s")
    other = CausalVideoPipeline.from_pretrained("toybox", device="cpu", dtype=dtype, window=12)
    assert_same(steps(other.resume(tmp_path / "s"), 1), steps(session, 1), levels)


def test_what_the_caller_chooses_anew(pipe: CausalVideoPipeline, tmp_path: Path) -> None:
    seen: list[int] = []
    session = pipe.open(RED, seed=3, window=9, history=1)
    steps(session, 4)
    session.save(tmp_path / "s")
    resumed = pipe.resume(tmp_path / "s", history=3, callback_on_step_end=lambda *call: seen.append(call[3]["chunk"]))
    expected = steps(resumed, 3)
    assert sorted(set(seen)) == [4, 5, 6]
    assert resumed.rewind(2), "the history begins where the session goes on"
    assert_same(steps(resumed, 2), expected[1:])
    assert not resumed.rewind(6)
    with pytest.raises(ConfigError, match="a resumed session has no option seed; there are: history, kept_chunks, cal"):
        pipe.resume(tmp_path / "s", seed=4)
    with pytest.raises(ConfigError, match=r"history must be a whole number of at least 0 .*, not -1"):
        pipe.resume(tmp_path / "s", history=-1)
    with pytest.raises(ConfigError, match="reuse must be that of the saved session, None, not ReusePolicy"):
        pipe.resume(tmp_path / "s", reuse="pab:latte")


def test_what_cannot_be_saved_is_one_sentence(pipe: CausalVideoPipeline, tmp_path: Path) -> None:
    session = pipe.open(RED, window=9)
    with pytest.raises(ConfigError, match="a session can be saved once a chunk was made, and none was"):
        session.save(tmp_path / "s")
    session.step()
    for path, says in ((tmp_path, "it is a folder"), (tmp_path / "none" / "s", "No such file or directory")):
        with pytest.raises(OutputError, match=f"cannot write {path}: {says}"):
            session.save(path)
    with pytest.raises(ConfigError, match="path must be a path, not ''"):
        session.save("")
    session.save(tmp_path / "s")
    session.close()
    with pytest.raises(ConfigError, match="the session is closed"):
        session.save(tmp_path / "s")
    redrawn = pipe.open(RED, window=9, video=FILM, strength=0.5)
    redrawn.step()
    with pytest.raises(ConfigError, match="a session that redraws a video cannot be saved"):
        redrawn.save(tmp_path / "s")
    assert [file.name for file in tmp_path.iterdir()] == ["s"]
    pipe.resume(tmp_path / "s").step()


def test_what_cannot_be_resumed_is_one_sentence(pipe: CausalVideoPipeline, tmp_path: Path) -> None:
    session, path = pipe.open(RED, window=9), tmp_path / "s.safetensors"
    steps(session, 4)
    session.save(path)
    content = path.read_bytes()
    other = another_model(tmp_path / "other")
    with pytest.raises(
        ConfigError, match=r"^the saved session does not fit: the model's digest is '\w{16}' in the file"
    ):
        other.resume(path)

    def changed(**fields: Any) -> Path:
        path.write_bytes(content)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        given = json.loads(metadata["session"]) | fields
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        save_file(tensors, tmp_path / "changed", {**metadata, "session": json.dumps(given)})
        return tmp_path / "changed"

    cache = json.loads(safe_open(path, "pt").metadata()["session"])["cache"]
    other_order = copy.deepcopy(cache)
    other_order["branches"][0]["frames"].reverse()
    cache["branches"][0]["frames"][1] -= 1
    for fields, says in (
        ({"height": 128}, "a latent frame is"),
        ({"height": 65}, "latents of 8×8 are not those of frames of 65×64 pixels"),
        ({"first_chunk": 0, "shown": 5}, "the saved session has 0 chunks that were given, the model begins with 1"),
        ({"cache": cache}, "the saved cache holds the frames .*, but its window those of"),
        ({"cache": other_order}, "the saved cache holds the frames .*, but its window those of"),
        ({"stream": {"window": 6, "chunk_frames": 3}}, "the saved cache holds the frames|its window"),
    ):
        with pytest.raises((ConfigError, CheckpointError), match=says) as caught:
            pipe.resume(changed(**fields))
        assert "\n" not in str(caught.value)
    path.write_bytes(content[:-1])
    for wrong, says in ((path, "truncated"), (tmp_path, "a folder, not a saved session"), (tmp_path / "n", "no such")):
        with pytest.raises(CheckpointError, match=says):
            pipe.resume(wrong)
    assert len(pipe._streams) == 1, "what was refused is not open"


def another_model(folder: Path) -> CausalVideoPipeline:
    """Toybox with other weights."""
    changed = CausalVideoPipeline.from_pretrained("toybox", device="cpu")
    with torch.no_grad():
        changed.model.patch_embedding.weight.mul_(2)
    changed.save_pretrained(folder)
    return CausalVideoPipeline.from_pretrained(folder, device="cpu")


def test_a_model_is_known_by_its_files_whatever_its_dtype(pipe: CausalVideoPipeline, tmp_path: Path) -> None:
    half = CausalVideoPipeline.from_pretrained("toybox", device="cpu", dtype="bfloat16")
    assert half.model_digest == pipe.model_digest == checkpoint_digest(pipe.config.transformer)
    assert another_model(tmp_path).model_digest != pipe.model_digest
