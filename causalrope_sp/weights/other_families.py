"""Models that share Wan's transformer and have layers that this library does not run, told by the names of these.

Names are those of the published code: LingBot-World's `wan/modules/model_fast.py`, Matrix-Game 2.0's
`wan/modules/action_module.py`, Wan-Fun's and VACE's transformers in VideoX-Fun and diffusers, and Wan 2.2's own
Animate and S2V models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# what is missing -> parts of names that only such models have
_CAMERA = r"cam_injector_layer\d|cam_(?:scale|shift)_layer|patch_embedding_wancamctrl|c2ws_hidden_states_layer\d"
MISSING = {
    "camera conditioning (as LingBot-World has it)": rf"(?:{_CAMERA})",
    "action conditioning by keyboard and mouse (as Matrix-Game has it)": r"action_model|keyboard_embed|mouse_mlp",
    "camera conditioning by an adapter (as Wan-Fun's camera models have it)": r"control_adapter",
    "a reference picture (as Wan-Fun's control models have it)": r"ref_conv",
    "control blocks (as VACE has them)": r"vace_blocks|vace_patch_embedding",
    "pose and face conditioning (as Wan-Animate has it)": r"face_adapter|motion_encoder|pose_patch_embedding",
    "a last frame (as Wan's first-and-last-frame models have it)": r"emb_pos|pos_embed",
    "audio conditioning (as Wan S2V has it)": r"casual_audio_encoder|audio_injector|audio_proj",
}


def what_is_missing(names: Iterable[str]) -> list[str]:
    """Returns what a checkpoint's model does and this library does not, as texts with an example each.

    Args:
        names: the keys that belong to no parameter.
    """
    found, names = [], list(names)
    for missing, pattern in MISSING.items():
        own = re.compile(rf"(?:^|[._])(?:{pattern})(?:[._\d]|$)")
        example = next((name for name in names if own.search(name)), None)
        if example is not None:
            found.append(f"its model has {missing}, which this version does not run ({example})")
    return found
