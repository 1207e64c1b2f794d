"""Models that share Wan's transformer and have more layers are named, with what is missing, wherever they are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from causalrope_sp import CheckpointError
from causalrope_sp.weights import inspect_checkpoint, load_model
from tests.support.checkpoints import save_wan, wan_state
from tests.support.shell import shell

# names as the published code has them
LAYERS = {
    "camera conditioning (as LingBot-World": (
        *("blocks.0.cam_injector_layer1.weight", "blocks.1.cam_scale_layer.bias", "patch_embedding_wancamctrl.weight"),
        "c2ws_hidden_states_layer1.weight",
    ),
    "action conditioning by keyboard and mouse": (
        *("blocks.0.action_model.keyboard_embed.0.weight", "blocks.0.action_model.mouse_mlp.0.weight"),
        "blocks.1.action_model.t_qkv.weight",
    ),
    "camera conditioning by an adapter": ("control_adapter.conv.weight",),
    "a reference picture": ("ref_conv.weight",),
    "control blocks (as VACE": ("vace_blocks.0.after_proj.bias", "vace_patch_embedding.weight"),
    "pose and face conditioning": ("face_adapter.fuser_blocks.0.k_norm.weight", "motion_encoder.dec.direction.weight"),
    "a last frame": ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    "audio conditioning": ("casual_audio_encoder.weights", "audio_injector.injector.0.q.weight"),
}


@pytest.mark.parametrize("missing", LAYERS)
def test_what_a_checkpoint_needs_is_named(missing: str, tmp_path: Path) -> None:
    for name in LAYERS[missing]:
        file = save_wan(tmp_path / "model.safetensors", {**wan_state(), name: torch.zeros(2, 2)})
        problem = inspect_checkpoint(file).problem
        assert problem is not None
        assert problem.startswith(f"its model has {missing}")
        assert f"which this version does not run ({name}); 1 unexpected: {name}" in problem
    with pytest.raises(CheckpointError, match="which this version does not run") as caught:
        load_model(file)
    assert "\n" not in str(caught.value)
    shown = shell("inspect", file)
    assert shown.exit_code == 1
    assert f"not_run  its model has {missing}" in shown.output


def test_other_keys_are_no_family(tmp_path: Path) -> None:
    for name in ("blocks.0.camera.weight", "transaction_model.weight", "audio.weight"):
        save_file({**wan_state(), name: torch.zeros(2, 2)}, tmp_path / "m.safetensors", {"config": '{"num_heads": 3}'})
        assert inspect_checkpoint(tmp_path / "m.safetensors").problem == f"1 unexpected: {name}"
