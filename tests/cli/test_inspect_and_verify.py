"""`causalrope-sp --help`, `inspect` and `verify`."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from PIL import Image

from causalrope_sp.compression.bitstream import Header
from causalrope_sp.heads import HeadPolicy, write_heads
from causalrope_sp.reuse.policy_file import find_policy, write_policy
from causalrope_sp.text.embeds import save_embeds
from tests.support.sessions import write_whole
from tests.support.shell import shell


def test_help_names_the_commands() -> None:
    result = shell("--help")
    assert result.exit_code == 0
    assert all(name in result.output for name in ("generate", "inspect", "verify", "torchrun"))


def test_inspect_tells_what_a_checkpoint_is(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from causalrope_sp.pipeline.model_config import ModelConfig
    from causalrope_sp.toybox import WEIGHTS

    weights = ModelConfig.load(WEIGHTS / "toybox.json").transformer
    text, plain = shell("inspect", weights), shell("inspect", weights, "--json")
    assert (text.exit_code, plain.exit_code) == (0, 0), text.output
    report = json.loads(plain.output)
    assert {"path", "layout", "config", "dtype", "parameters", "missing", "unexpected"} <= set(report)
    assert (report["missing"], report["unexpected"]) == ([], [])
    assert f"{report['parameters']:,}" in text.output
    save_file({"nonsense": torch.zeros(3)}, tmp_path / "other.safetensors")
    assert shell("inspect", tmp_path / "other.safetensors").exit_code == 2


def test_inspect_opens_the_pipeline_files_that_generate_opens(tmp_path: Path) -> None:
    from causalrope_sp.pipeline.model_config import ModelConfig
    from causalrope_sp.toybox import WEIGHTS

    config = ModelConfig.load(WEIGHTS / "toybox.json")
    own = {"transformer": str(config.transformer), "codec": str(config.codec), "text": "toybox"}
    (tmp_path / "pipeline.json").write_text(json.dumps(own))
    for path in (tmp_path, tmp_path / "pipeline.json"):
        result = shell("inspect", path, "--json")
        assert result.exit_code == 0, result.output
        report = json.loads(result.output)
        assert (report["preset"], report["missing"]) == ("own", [])
        assert any("no preset fits" in line for line in report["evidence"])
    (tmp_path / "pipeline.json").write_text(json.dumps({"fps": 16}))
    refused = shell("inspect", tmp_path)
    assert (refused.exit_code, len(refused.output.splitlines())) == (2, 1)
    assert "pipeline.json names no transformer" in refused.output


def test_inspect_tells_the_sizes_of_a_vin(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    from causalrope_sp.toybox import WEIGHTS

    text, plain = shell("inspect", "toybox-vin"), shell("inspect", "toybox-vin", "--json")
    vin = json.loads(plain.output)["vin"]
    assert {"global_tokens", "dim", "layers", "chunk_frames", "overlap", "global_guidance_scale"} <= set(vin)
    with safe_open(vin["path"], "pt") as file:
        assert vin["parameters"] == sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
        metadata = file.metadata()
    for name in ("vin", "chunks"):
        assert json.loads(metadata[name]).items() <= vin.items()
    alone = shell("inspect", vin["path"])
    assert alone.exit_code == 1
    assert alone.stdout == (
        f"{vin['path']}: a Video Interface Network of {vin['global_tokens']} global tokens of width {vin['dim']}, for "
        f'parallel chunks of {vin["chunk_frames"]} latent frames; a model configuration names it as `"vin"`\n'
    )
    assert f"global_tokens = {vin['global_tokens']}" in text.output
    with safe_open(vin["path"], "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    for wrong, message in (
        ({"chunks": '{"chunk_frames": 0, "overlap": 1, "keyframe_every": 2}'}, "chunk_frames must be"),
        ({"layout": "causalrope_sp-vin-1"}, "in the earlier layout"),
    ):
        save_file(tensors, tmp_path / "wrong.safetensors", metadata | wrong)
        refused = shell("inspect", tmp_path / "wrong.safetensors")
        assert (refused.exit_code, len(refused.output.splitlines())) == (2, 1)
        assert message in refused.output
    guided = json.dumps(json.loads(metadata["chunks"]) | {"global_guidance_scale": 2.5})
    save_file(tensors, tmp_path / "guided.safetensors", metadata | {"chunks": guided})
    assert "latent frames, guided at a scale of 2.5; " in shell("inspect", tmp_path / "guided.safetensors").output
    toybox = json.loads(shell("inspect", "toybox", "--json").output)
    assert "vin" not in toybox
    assert toybox["timesteps"] == toybox["sampler"]["steps"], "a shift of 1"
    assert "stream" in toybox
    assert "stream" not in json.loads(plain.output)
    assert json.loads(plain.output)["timesteps"][:2] == [1000, 986.3]
    names = {"transformer": "toybox.safetensors", "vin": "toybox.safetensors", "codec": "codec"}
    of_no_vin = {name: str(WEIGHTS / file) for name, file in names.items()} | {"text": "toybox"}
    (tmp_path / "pipeline.json").write_text(json.dumps(of_no_vin))
    refused, plain = shell("inspect", tmp_path), shell("inspect", tmp_path, "--json")
    assert (refused.exit_code, plain.exit_code) == (1, 1)
    assert "not a Video Interface Network" in refused.output
    assert json.loads(plain.output)["vin"]["path"] == str(WEIGHTS / "toybox.safetensors")


@pytest.mark.parametrize(("verdicts", "status"), [([True, None], 0), ([True, False], 1)])
def test_verify_prints_its_checks(verdicts: list[bool | None], status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from causalrope_sp.verification.runner import Check

    checks = [Check(f"case{i}", i + 1, "ulysses", [1e-7, float("nan")][i], ok, "") for i, ok in enumerate(verdicts)]
    monkeypatch.setattr("causalrope_sp.verification.runner.run_verification", lambda *_: checks)
    result = shell("verify", "--json")
    assert result.exit_code == status
    assert json.loads(result.output) == [
        {"case": "case0", "ranks": 1, "strategy": "ulysses", "error": 1e-7, "ok": True},
        {"case": "case1", "ranks": 2, "strategy": "ulysses", "error": None, "ok": verdicts[1]},
    ]
    table = shell("verify").output
    assert "case1" in table
    assert "1 of 2 checks passed" in table


def test_verify_starts_its_own_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = shell("verify")
    assert (result.exit_code, result.output) == (
        2,
        "error: verify starts its own processes: run it without torchrun\n",
    )


def test_inspect_says_what_other_files_of_the_library_are(tmp_path: Path) -> None:
    write_whole(tmp_path / "session.safetensors")
    save_embeds(tmp_path / "embeds.safetensors", torch.ones(1, 5, 4), "a red circle", "small UMT5")
    header = Header("a red \x1b[31mcircle", "56a21375", 64, 48, 16.0)
    (tmp_path / "video.cvc").write_bytes(header.pack())
    policy = HeadPolicy(((None, None), (5, 0), (None, 7)), ((2, None), (None, None), (None, None)))
    write_heads(policy, tmp_path / "heads.json", model="toybox")
    write_policy(find_policy("pab:latte"), tmp_path / "reuse.json", model="toybox")
    published = [{"layer_idx": n, "static_head": [1], "dynamic_head": [0, 2]} for n in range(3)]
    (tmp_path / "published.json").write_text(json.dumps(published))
    told = {
        "heads.json": "windows of heads, for `--heads`: 3 layers of 2 heads, 4 of them with a window or rows of "
        "their own",
        "published.json": "windows of heads, for `--heads`: 3 layers of 3 heads, 2 of them static, in the form of "
        "Forcing-KV",
        "reuse.json": "a policy of reuse, for `--reuse`: 6 rules",
        "session.safetensors": "a session of 16×24 pixels that was saved after 4 chunks under the prompt "
        '"ein Würfel fällt", with keys and values, of the model with the digest 0123456789abcdef, with '
        "style.safetensors (weight 0.5); `pipe.resume` goes on with it",
        "embeds.safetensors": 'embeddings of the prompt "a red circle" by small UMT5, 5 tokens of 4 numbers, for '
        "`--text-embeds`",
        "video.cvc": "a video of 64×48 pixels at 16 fps that `causalrope-sp compress` coded with the model whose "
        'digest begins with 56a21375, under the prompt "a red \\x1b[31mcircle"; `causalrope-sp decompress` decodes it',
    }
    for name, sentence in told.items():
        plain, as_json = shell("inspect", tmp_path / name), shell("inspect", tmp_path / name, "--json")
        assert (plain.exit_code, as_json.exit_code) == (1, 1)
        assert plain.stdout == f"{tmp_path / name}: {sentence}\n"
        assert json.loads(as_json.stdout) == {"path": str(tmp_path / name), "what": sentence}
    (tmp_path / "heads.json").write_text('{"windows": [[5], [5, 0]]}')
    wrong = shell("inspect", tmp_path / "heads.json")
    assert (wrong.exit_code, wrong.stderr) == (2, "error: heads: expected 1 heads in layer 1, as in layer 0, got 2\n")
    (tmp_path / "video.cvc").write_bytes(header.pack()[:-1])
    cut = shell("inspect", tmp_path / "video.cvc")
    assert (cut.exit_code, cut.stderr.count("\n")) == (2, 1)
    assert "the header of the compressed video is damaged or cut off" in cut.stderr


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "bmp", "tiff", "webp", "avif"])
def test_inspect_names_a_picture(tmp_path: Path, ending: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / f"picture.{ending}")
    refused = shell("inspect", tmp_path / f"picture.{ending}")
    kind = {"jpg": "JPEG", "webp": "WebP", "avif": "AVIF or HEIF"}.get(ending, ending.upper())
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert re.search(f": an? {kind} picture, and no checkpoint", refused.stderr)


@pytest.mark.parametrize(
    ("ending", "codec", "named"),
    [
        ("mp4", "libx264", "an MP4 or QuickTime video"),
        ("mov", "libx264", "an MP4 or QuickTime video"),
        ("webm", "libvpx-vp9", "a Matroska or WebM video"),
        ("avi", "mpeg4", "an AVI video"),
        ("mpg", "mpeg2video", "an MPEG video"),
        ("flv", "flv1", "an FLV video"),
    ],
)
def test_a_video_is_named_where_a_model_is_asked_for(tmp_path: Path, ending: str, codec: str, named: str) -> None:
    with av.open(str(tmp_path / f"video.{ending}"), "w") as container:
        stream: Any = container.add_stream(codec, rate=24)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for packet in (*stream.encode(av.VideoFrame(32, 32, "yuv420p")), *stream.encode(None)):
            container.mux(packet)
    for command in (("inspect",), ("generate", "a red circle", "--model")):
        refused = shell(*command, tmp_path / f"video.{ending}")
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
        assert f": {named}, and no checkpoint" in refused.stderr
