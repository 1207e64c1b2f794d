"""LoRAs that are loaded, weighted and taken out while streams are open.

The judge is a fresh pipeline that was loaded with the LoRAs and is given the same cache.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from causalrope_sp import CausalVideoPipeline, CheckpointError, ConfigError, SequenceParallel
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.pipeline.session import Session
from causalrope_sp.sampling import settled
from causalrope_sp.sampling.recompute import recompute_window
from causalrope_sp.sampling.steered_loop import SteeredLoop
from causalrope_sp.weights import Lora
from tests.support.graph_runs import install
from tests.support.loras import save_lora
from tests.support.published_folders import i2v_pipeline

RED, BLUE = "a red circle slides right", "a blue circle slides right"
OPTIONS: dict[str, Any] = {"num_inference_steps": 2, "window": 7, "sink": 1, "seed": 3}
MODULES = {  # module -> inputs and outputs: what runs on tokens, on text, and on timesteps
    "blocks.0.self_attn.q": (192, 192),
    "blocks.1.cross_attn.k": (192, 192),
    "time_projection.1": (192, 1152),
}


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    whole: dict[str, Tensor] = {}
    for number, (module, sizes) in enumerate(MODULES.items()):
        whole |= load_file(save_lora(tmp_path / "part", module, number, 0.3, sizes))
    save_file(whole, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


def opened(**options: Any) -> CausalVideoPipeline:
    return CausalVideoPipeline.from_pretrained("toybox", device="cpu", **options)


def take(session: Session, count: int) -> list[Any]:
    return [session.step().frames for _ in range(count)]


def same(one: list[Any], other: list[Any]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def loop_of(session: Session) -> SteeredLoop:
    return session.rested()


def judged(plain: CausalVideoPipeline, merged: CausalVideoPipeline, call: dict[str, Any], recache: bool) -> list[Any]:
    """Three chunks of one pipeline, then three of another one, which gets the first one's latents and cache."""
    first, second = plain.open(RED, **call), merged.open(RED, **call)
    made = take(first, 3)
    take(second, 3)
    source, target = loop_of(first), loop_of(second)
    with torch.inference_mode():
        target.kept = source.kept.fork()
        target.commit()
        source.commit()
        for own, other in zip(target.branches.branches, source.branches.branches, strict=True):
            for ring, from_ring in zip(own.stream.cache.rings, other.stream.cache.rings, strict=True):
                for layer, from_layer in zip(ring.storage, from_ring.storage, strict=True):
                    layer.numbers_2BKSHD.copy_(from_layer.numbers_2BKSHD)
            if (similar := own.stream._similar) is not None and (known := other.stream._similar) is not None:
                similar._keys, similar._pending = dict(known._keys), list(known._pending)  # of the copied frames
            if recache:
                recompute_window(own, target.kept, target.position[1], with_sink=True)
    second._decoder = first._decoder
    return [*made, *take(second, 3)]


@pytest.mark.parametrize(
    ("load", "call", "recache"),
    [
        ({}, {}, False),
        ({}, {}, True),
        ({"dtype": "bfloat16"}, {"rope": "relative"}, True),
        ({"weights": "fp8"}, {}, False),
        ({"weights": "fp8-dynamic"}, {}, True),
        ({"similar_frames": 1}, {}, False),
        ({"similar_frames": 1}, {}, True),
        ({"guidance_scale": 3.0}, {"negative_prompt": BLUE}, True),
        ({}, {"reuse": "pab:latte", "num_inference_steps": 4}, False),
    ],
    ids=[
        *("plain", "plain, recache", "relative bf16, recache", "fp8", "fp8-dynamic, recache", "similar"),
        *("similar, recache", "guided, recache", "reuse"),
    ],
)
def test_the_next_chunk_is_that_of_a_pipeline_loaded_with_the_lora(
    lora: Path, load: dict[str, Any], call: dict[str, Any], recache: bool
) -> None:
    if "rope" in call:
        load, call = {**load, **call}, {}
    pipe, call = opened(**load), {**OPTIONS, **call}
    session = pipe.open(RED, **call)
    made = take(session, 3)
    assert pipe.load_lora_weights(lora, recache=recache) == [3]
    made += take(session, 3)
    expected = judged(opened(**load), opened(**load, loras=[lora]), call, recache)
    assert same(made, expected)
    unchanged = take(opened(**load).open(RED, **call), 6)
    assert same(made[:3], unchanged[:3])
    assert not same(made[3:], unchanged[3:])


def test_weights_move_chunk_by_chunk_and_the_bits_return(lora: Path) -> None:
    pipe = opened()
    plain = {name: tensor.clone() for name, tensor in pipe.model.state_dict().items()}
    session = pipe.open(RED, **OPTIONS)
    take(session, 1)
    assert pipe.load_lora_weights(f"{lora}:0", "style") == [1]
    for chunk, weight in enumerate((0.25, 0.5, -1.0), start=1):
        assert pipe.set_adapters("style", weight) == [chunk]
        merged = opened(loras=[Lora(lora, weight)]).model.state_dict()
        assert all(torch.equal(tensor, merged[name]) for name, tensor in pipe.model.state_dict().items())
        take(session, 1)
    assert pipe.unload_lora_weights() == [4]
    assert all(torch.equal(tensor, plain[name]) for name, tensor in pipe.model.state_dict().items())
    assert same(take(pipe.open(RED, **OPTIONS), 3), take(opened().open(RED, **OPTIONS), 3))
    take(session, 1)


def test_at_weight_0_nothing_changes(lora: Path) -> None:
    """The pending context pass runs in a forward of its own, so equal to rounding."""
    pipe = opened()
    session, expected = pipe.open(RED, **OPTIONS), take(opened().open(RED, **OPTIONS), 6)
    made = take(session, 3)
    pipe.load_lora_weights(f"{lora}:0")
    made += take(session, 3)
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(made, expected, strict=True)) <= 1


def test_other_threads_neither_begin_a_stream_nor_change_loras_meanwhile(
    lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, made, told = opened(), list[Any](), list[str]()
    session, write = pipe.open(RED, **OPTIONS), pipe._write

    def change() -> None:
        try:
            pipe.unload_lora_weights()
        except ConfigError as error:
            told.append(str(error))

    threads = [threading.Thread(target=lambda: made.extend(take(session, 2))), threading.Thread(target=change)]

    def write_meanwhile(*arguments: Any) -> None:
        for thread in threads:
            thread.start()
            thread.join(0.5)
        assert not made
        write(*arguments)

    monkeypatch.setattr(pipe, "_write", write_meanwhile)
    assert pipe.load_lora_weights(lora, "style") == []
    threads[0].join()
    assert same(made, take(opened(loras=[lora]).open(RED, **OPTIONS), 2))
    assert told == ["another thread changes the LoRAs of this pipeline: let one thread at a time do so"]
    assert pipe.get_active_adapters() == ["style"]


def test_every_open_stream_goes_on_with_the_new_weights(lora: Path) -> None:
    pipe = opened()
    first, second, later = (pipe.open(prompt, **OPTIONS) for prompt in (RED, BLUE, RED))
    take(first, 3)
    take(second, 1)
    fork = first.fork()
    stream = pipe.stream(RED, num_frames=60, **OPTIONS)
    begun = [next(stream).frames for _ in range(3)]
    assert pipe.load_lora_weights(lora) == [3, 1, 3, 3]
    made = take(first, 2)
    assert same(take(fork, 2), made)
    assert same([next(stream).frames for _ in range(2)], made)
    assert same(begun, take(opened().open(RED, **OPTIONS), 3))
    assert same(take(later, 3), take(opened(loras=[lora]).open(RED, **OPTIONS), 3))


def test_where_a_chunk_is_made_ahead_the_one_after_it_is_the_first(lora: Path) -> None:
    pipe = opened(decode="overlap")
    with pipe.open(RED, **OPTIONS) as session:
        made = take(session, 3)
        assert pipe.load_lora_weights(lora) == [4]
        made += take(session, 2)
    inline = opened()
    expected = inline.open(RED, **OPTIONS)
    again = take(expected, 4)
    inline.load_lora_weights(lora)
    assert same(made, again + take(expected, 1))


def test_chunks_are_taken_back_across_the_change(lora: Path) -> None:
    """They are made again with the present weights, and the session is not as it was."""
    pipe = opened()
    session = pipe.open(RED, history=6, **OPTIONS)
    take(session, 3)
    pipe.load_lora_weights(lora)
    made = take(session, 2)
    assert session.rewind(1)
    assert same(take(session, 1), made[1:])
    assert not session.rewind(2)
    plain, merged = opened().open(RED, **OPTIONS), opened(loras=[lora]).open(RED, **OPTIONS)
    take(plain, 3)
    take(merged, 3)
    loop_of(merged).kept = loop_of(plain).kept
    with torch.inference_mode():
        loop_of(merged).compute_anew()
    merged._decoder = plain._decoder
    assert same(take(session, 2), take(merged, 2))


def test_a_lora_that_does_not_fit_leaves_streams_as_they_were(lora: Path, tmp_path: Path) -> None:
    pipe = opened()
    session = pipe.open(RED, **OPTIONS)
    take(session, 3)
    expected = take(opened().open(RED, **OPTIONS), 5)[3:]
    with pytest.raises(CheckpointError, match="fit no parameter"):
        pipe.load_lora_weights(save_lora(tmp_path / "other.safetensors", "blocks.99.self_attn.q", 5))
    assert same(take(session, 1), expected[:1])
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        pipe.load_lora_weights(save_lora(tmp_path / "nan.safetensors", "blocks.0.self_attn.q", 5, float("nan")))
    assert pipe.get_active_adapters() == []
    assert np.abs(take(session, 1)[0].astype(int) - expected[1]).max() <= 1  # its context pass ran by itself


def test_a_change_that_is_cut_short_leaves_the_old_weights(lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = opened()
    session = pipe.open(RED, kept_chunks=9, num_frames=None, **OPTIONS)
    take(session, 2)
    plain = {name: tensor.clone() for name, tensor in pipe.model.state_dict().items()}

    def interrupted(*arguments: Any, **options: Any) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr("causalrope_sp.sampling.steered_loop.recompute_window", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipe.load_lora_weights(lora, recache=True)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in pipe.model.state_dict().items())
    assert pipe.get_active_adapters() == []
    expected = take(opened().open(RED, **OPTIONS), 4)[2:]
    made = take(session, 2)
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(made, expected, strict=True)) <= 1


def test_captured_graphs_read_the_new_weights(lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settled, "MOST_PACKED", 0)  # as on a GPU: packed copies are made on a CPU alone

    def run() -> list[Any]:
        pipe = opened()
        session = pipe.open(RED, **OPTIONS)
        made = take(session, 7)
        pipe.load_lora_weights(lora)
        return made + take(session, 3)

    eager = run()
    graphs = install(monkeypatch)
    assert same(run(), eager)
    assert graphs[0].replays > 4


def test_keys_of_image_tokens_are_those_of_the_new_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eagerly, and by graphs, which read them where they are."""
    i2v_pipeline(tmp_path, image_tokens=True).save_pretrained(tmp_path / "model")
    lora = save_lora(tmp_path / "style.safetensors", "blocks.0.attn2.add_v_proj", 5, 0.5, (24, 24))
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    load: dict[str, Any] = {"device": "cpu", "chunk_frames": 1, "window": 3, "num_inference_steps": 2}
    call: dict[str, Any] = {"image": image, "height": 32, "width": 48, "seed": 3, "num_frames": None}

    def run(**options: Any) -> tuple[list[Any], list[Tensor]]:
        pipe = CausalVideoPipeline.from_pretrained(tmp_path / "model", **load, **options)
        session = pipe.open("the lazy dog", **call)
        made = take(session, 5)
        if not options:
            pipe.load_lora_weights(lora)
        made += take(session, 3)
        stream = loop_of(session).branches.branches[0].stream
        return made, [x.clone() for x in list(stream.tensors())[len(list(stream.cache.tensors())) :]]

    eager, keys = run()
    assert all(torch.equal(own, other) for own, other in zip(keys, run(loras=[lora])[1], strict=True))
    monkeypatch.setattr(settled, "MOST_PACKED", 0)
    graphs = install(monkeypatch)
    assert same(run()[0], eager)
    assert graphs[0].replays > 4


def test_what_cannot_change_says_so(lora: Path) -> None:
    pipe = opened()
    with pytest.raises(ConfigError, match="recache must be True or False, not 1"):
        pipe.load_lora_weights(lora, recache=1)  # type: ignore[arg-type]
    told: list[str] = []

    def callback(*_: Any) -> None:
        try:
            pipe.load_lora_weights(lora)
        except ConfigError as error:
            told.append(str(error))

    take(pipe.open(RED, callback_on_step_end=callback, **OPTIONS), 1)
    assert told == ["a callback cannot call its session: call it between two chunks"] * 2
    video = CausalVideoPipeline.from_pretrained("toybox-vin", parallel_chunks="vin", device="cpu")
    stream = video.stream(RED, num_frames=40)
    next(stream)
    with pytest.raises(ConfigError, match="chunks are made in parallel cannot be changed while it is made"):
        video.unload_lora_weights()


def test_a_saved_session_names_its_loras_and_refuses_others(lora: Path, tmp_path: Path) -> None:
    pipe = opened()
    session = pipe.open(RED, **OPTIONS)
    take(session, 2)
    pipe.load_lora_weights(f"{lora}:0.5")
    take(session, 1)
    session.save(tmp_path / "session")
    expected = take(session, 2)
    same_loras = opened(loras=[f"{lora}:0.5"])
    assert same(take(same_loras.resume(tmp_path / "session"), 2), expected)
    resumed = pipe.resume(tmp_path / "session")
    assert pipe.unload_lora_weights() == [5, 3]
    assert not same(take(resumed, 2), expected)
    told = r"LoRAs are 'style.safetensors \(weight 0.5\)' in the file and 'none' here"
    with pytest.raises(ConfigError, match=told):
        pipe.resume(tmp_path / "session")
    with pytest.raises(ConfigError, match=r"and 'style.safetensors \(weight 0.25\)' here"):
        opened(loras=[f"{lora}:0.25"]).resume(tmp_path / "session")


def change_on_ranks(group: dist.ProcessGroup | None, device: str, lora: Path, load: Any) -> list[Any]:
    """From where its LoRAs change, whether ranks hear that they want different things, and a session's frames."""
    parallel = SequenceParallel(group, "ulysses", device)
    pipe = CausalVideoPipeline.from_pretrained("toybox", parallel=parallel, **load)
    with pipe.open(RED, **OPTIONS) as session:
        made = take(session, 3)
        with pytest.raises(ConfigError) as different:
            pipe.load_lora_weights(lora, recache=parallel.rank == 1)
        starts = pipe.load_lora_weights(lora)
        made += take(session, 2)
        pipe.unload_lora_weights(recache=True)
        made += take(session, 1)
    return [starts, "recache" in str(different.value), made]


@pytest.mark.parametrize("decode", ["inline", "overlap"])
def test_ranks_change_their_loras_in_one_chunk(pool: RankPool, lora: Path, decode: str) -> None:
    starts, told, made = pool.run(change_on_ranks, 2, lora, {"decode": decode})
    assert told
    pipe = opened(decode=decode)
    session = pipe.open(RED, **OPTIONS)
    expected = take(session, 3)
    assert pipe.load_lora_weights(lora) == starts
    expected += take(session, 2)
    pipe.unload_lora_weights(recache=True)
    expected += take(session, 1)
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(made, expected, strict=True)) <= 1
