"""The control of a model that takes one, chunk by chunk: where it goes, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import all_gather_object

from causalrope_sp import CausalVideoPipeline, Chunk, ConfigError, SequenceParallel, VideoChunk
from causalrope_sp.compression import encode
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.errors import RankLostError
from causalrope_sp.pipeline.decoding import LocalFrames
from causalrope_sp.pipeline.session import Session
from tests.support.controlled import circle_at, controlled_toybox, noise_control, seen_at, text_without_place

RED, BLUE = "a red circle slides right", "a blue circle slides right"
OPTIONS: dict[str, Any] = {"seed": 3, "num_inference_steps": 2, "window": 7, "sink": 1}


@pytest.fixture(scope="module")
def pipe() -> CausalVideoPipeline:
    return controlled_toybox()


def take(session: Session, count: int, first: int = 0) -> list[VideoChunk]:
    """The next chunks, each under the noise of its number, from `first` on."""
    chunks = [Chunk(n, 3 * n, 3) for n in range(first, first + count)]
    return [session.step(control=noise_control(chunk)) for chunk in chunks]


def same(one: list[VideoChunk], other: list[VideoChunk]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(a.index == b.index and np.array_equal(a.frames, b.frames) for a, b in pairs)  # type: ignore[arg-type]


@pytest.mark.parametrize("place", [(0.3, 0.3), (0.7, 0.3), (0.5, 0.75)])
def test_an_object_is_where_the_control_says(pipe: CausalVideoPipeline, place: tuple[float, float]) -> None:
    """Without one its place is that of the noise, the same for all of these."""
    session, control = pipe.open(prompt_embeds=text_without_place(pipe), seed=0), circle_at(pipe, *place)
    frames = [session.step(control=control).frames for _ in range(3)][-1]
    assert frames is not None
    assert np.abs(np.subtract(seen_at(frames[-1]), place)).max() < 0.07


def test_a_tensor_a_function_and_single_steps_are_alike(pipe: CausalVideoPipeline) -> None:
    steps = take(pipe.open(RED, **OPTIONS), 4)
    asked: list[Chunk] = []

    def control(chunk: Chunk) -> torch.Tensor:
        asked.append(chunk)
        return noise_control(chunk)

    opened = pipe.open(RED, control=control, **OPTIONS)
    assert same([opened.step() for _ in range(4)], steps)
    assert asked == [Chunk(n, 3 * n, 3) for n in range(4)]
    whole = noise_control(Chunk(0, 0, 12))
    streamed = list(pipe.stream(RED, num_frames=45, control=whole, **OPTIONS))
    assert same(streamed, steps)
    video = pipe(RED, num_frames=45, control=whole, output_type="np", **OPTIONS).frames
    assert np.array_equal((video[0] * 255).round(), np.concatenate([c.frames for c in steps]))
    plain = [pipe.open(RED, control=lambda c: 0 * noise_control(c), **OPTIONS).step()]
    assert not same(plain, steps[:1])


def test_one_number_a_channel_is_the_same_all_over_the_frame(pipe: CausalVideoPipeline) -> None:
    action = torch.linspace(-1, 1, 48).view(1, 3, 16, 1, 1)
    one, other = (pipe.open(RED, **OPTIONS).step(control=c) for c in (action, action.expand(1, 3, 16, 8, 8)))
    assert same([one], [other])


def test_weights_of_zero_leave_the_model_as_it_was(pipe: CausalVideoPipeline, tmp_path: Path) -> None:
    plain = CausalVideoPipeline.from_pretrained("toybox", device="cpu")
    with plain.open(RED, **OPTIONS) as session:
        expected = [session.step()]
        with pytest.raises(ConfigError, match="an open stream cannot be given another model, and 1 are open"):
            plain.model = plain.model.with_control(5)
    plain.model = plain.model.with_control(5)
    assert plain.parts.run is not None
    assert plain.parts.run.work.config.control_channels == 5, "what a session needs is counted with the control"
    plain.save_pretrained(tmp_path)
    loaded = CausalVideoPipeline.from_pretrained(tmp_path, device="cpu")
    assert (loaded.model.config.in_channels, loaded.model.config.control_channels) == (16, 5)
    found = loaded.open(RED, **OPTIONS).step(control=torch.randn(1, 3, 5, 8, 8))
    assert np.abs(found.frames.astype(int) - expected[0].frames).max() <= 1  # type: ignore[union-attr]


def test_what_is_done_to_a_session_keeps_the_control(pipe: CausalVideoPipeline, tmp_path: Path) -> None:
    """The window is computed anew under the control that each of its chunks was made under."""
    options = {**OPTIONS, "guidance_scale": 2.0, "negative_prompt": BLUE, "image": np.full((64, 64, 3), 90, np.uint8)}
    session = pipe.open(RED, history=2, **options)
    take(session, 4)
    session.set_prompt(BLUE)
    made = take(session, 2, first=4)
    assert session.rewind(2) is False, "the window was computed anew since"
    session.close()

    session, asked = pipe.open(RED, history=2, control=noise_control, **options), []
    made = [session.step() for _ in range(6)]
    assert session.rewind(2)
    assert same([session.step() for _ in range(2)], made[4:]), "the function is asked again"
    assert session.rewind(1)
    other = session.step(control=noise_control(Chunk(9, 99, 3)))
    assert not same([other], made[5:]), "another control after a rewind gives another chunk"
    for cache in (True, False):
        session.save(tmp_path / "s", cache=cache)
        by_steps = pipe.resume(tmp_path / "s")
        by_function = pipe.resume(tmp_path / "s", control=noise_control)
        asked = take(by_steps, 2, first=6)
        assert same([by_function.step() for _ in range(2)], asked)
        if cache:
            fork = session.fork()
            assert same(take(fork, 2, first=6), asked)
            assert same([session.fork().step()], asked[:1]), "a fork asks the function too"
    session.set_prompt(BLUE)
    assert not same([session.step()], asked[:1])


def test_a_failed_call_may_be_repeated_under_the_same_control(
    pipe: CausalVideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = take(pipe.open(RED, **OPTIONS), 2)
    session = pipe.open(RED, **OPTIONS)
    made = take(session, 1)

    def fail(*_: Any) -> Any:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(LocalFrames, "decode", fail)
        with pytest.raises(OSError, match="no space left"):
            take(session, 1, first=1)
    with pytest.raises(ConfigError, match="control must be the one that chunk 1 was made under before the call failed"):
        take(session, 1, first=2)
    assert same(made + take(session, 1, first=1), expected)


GIVEN = torch.zeros(1, 3, 16, 8, 8)
BAD = GIVEN.clone()
BAD[0, 1, 2, 3, 4] = torch.nan


@pytest.mark.parametrize(
    ("control", "message"),
    [
        (None, "control must be given: the model takes 16 channels of it for each latent frame"),
        ([1.0], "control must be a tensor of floating-point numbers, not \\[1.0\\]"),
        (GIVEN.long(), "control must be a tensor of floating-point numbers, not torch.int64"),
        (
            GIVEN[:, :2],
            "control has shape \\(1, 2, 16, 8, 8\\), expected \\(1, 3, 16, 8, 8\\) or \\(1, 3, 16, 1, 1\\)",
        ),
        (GIVEN[..., :1], "control has shape \\(1, 3, 16, 8, 1\\), expected"),
        (GIVEN[0], "control has shape \\(3, 16, 8, 8\\), expected"),
        (BAD, "control must be finite, and hold NaN or infinity in float32"),
    ],
)
def test_a_wrong_control_is_one_sentence_and_the_session_goes_on(
    pipe: CausalVideoPipeline, control: Any, message: str
) -> None:
    session = pipe.open(RED, **OPTIONS)
    with pytest.raises(ConfigError, match=message):
        session.step(control=control)
    opened = pipe.open(RED, control=None if control is None else lambda _: control, **OPTIONS)
    with pytest.raises(ConfigError, match=message):
        opened.step()
    assert same(take(session, 1), take(pipe.open(RED, **OPTIONS), 1))


def test_wrong_options_are_refused_before_anything_is_made(pipe: CausalVideoPipeline) -> None:
    plain = CausalVideoPipeline.from_pretrained("toybox", device="cpu")
    with pytest.raises(ConfigError, match="control must be None: the model takes none"):
        plain.open(RED, control=noise_control)
    with pytest.raises(ConfigError, match="control must be None: the model takes none"):
        plain.open(RED).step(control=GIVEN)
    with pytest.raises(ConfigError, match="control must be a tensor or a function of a chunk, not 'left'"):
        pipe.open(RED, control="left")
    with pytest.raises(ConfigError, match="control must be a function for a video without end, since a tensor ends"):
        pipe.open(RED, control=GIVEN)
    with pytest.raises(ConfigError, match="expected \\(1, 6, channels, height, width\\) for the 6 latent frames"):
        pipe.stream(RED, control=GIVEN, num_frames=20)
    ahead = controlled_toybox(decode="overlap")
    with pytest.raises(ConfigError, match="control must be a function given to `open` where chunks are made ahead"):
        ahead.open(RED).step(control=GIVEN)
    made_ahead = ahead.open(RED, control=noise_control, **OPTIONS)
    assert same([made_ahead.step() for _ in range(3)], take(pipe.open(RED, **OPTIONS), 3))


def test_compression_takes_no_control(pipe: CausalVideoPipeline) -> None:
    with pytest.raises(ConfigError, match="compression needs a model that takes no control"):
        list(encode(pipe, [np.zeros((64, 64, 3), np.uint8)] * 13, RED, rate=1.0))


def steered(pipe: CausalVideoPipeline) -> list[Any]:
    session = pipe.open(RED, history=2, negative_prompt=BLUE, **OPTIONS)
    made = take(session, 4)
    session.set_prompt(BLUE)
    made += take(session, 1, first=4)
    session.rewind(3)
    made += take(session, 2, first=7)
    return [chunk.frames for chunk in made]


def on_ranks(group: Any, device: str, strategy: str, cfg: int) -> list[Any]:
    torch.use_deterministic_algorithms(True)
    parallel = SequenceParallel(group, strategy, device, cfg=cfg)
    pipe, said = controlled_toybox(parallel, guidance_scale=2.0), []
    made, first = steered(pipe), parallel.rank == 0
    session = pipe.open(RED, **OPTIONS)
    for control in (
        noise_control(Chunk(parallel.rank, 0, 3)) + parallel.rank,
        GIVEN if first else None,
        GIVEN if first else BAD,
    ):
        try:
            session.step(control=control)
            said.append("nothing")
        except (ConfigError, RankLostError) as error:
            said.append(str(error))
    made.append(take(session, 1)[0].frames)
    ranks: list[Any] = [None] * group.size()
    all_gather_object(ranks, (made, said), group)
    return ranks


@pytest.mark.parametrize(("ranks", "strategy", "cfg"), [(2, "gather-kv", 1), (3, "ulysses", 1), (2, "auto", 2)])
def test_ranks_share_the_control(pool: RankPool, ranks: int, strategy: str, cfg: int) -> None:
    pipe = controlled_toybox(guidance_scale=2.0)
    expected = [*steered(pipe), take(pipe.open(RED, **OPTIONS), 1)[0].frames]
    for rank, (made, said) in enumerate(pool.run(on_ranks, ranks, strategy, cfg)):
        assert "ranks differ in control" in said[0]
        assert "ranks part ways" in said[1]
        assert "control must be finite" in said[2]
        for mine, alone in zip(made if rank == 0 else [], expected, strict=rank == 0):
            assert np.abs(mine.astype(int) - alone).max() <= 2, "float32 on ranks, to rounding"
