#!/usr/bin/env bash
# Library    peft 0.21.2 (LoraConfig's alpha_pattern and rank_pattern), torch 2.13.0.
#
# Expected   An adapter that is saved and loaded again computes what it computed before.
#
# Seen       A layer takes the first pattern that fits the end of its name, in the order of the dictionary, so one
#            writes the particular layer before the general rule. save_pretrained writes adapter_config.json with
#            its keys sorted, inner dictionaries too, and from_pretrained takes that order. Where the general pattern
#            sorts first ("attn1.to_q" before "blocks.0.attn1.to_q") the particular one never matches again. With
#            alpha_pattern nothing is said: the layer's scale falls from 16 to 2 and outputs differ. With
#            rank_pattern the same swap makes peft's own checkpoint fail to load, as a mismatch of sizes.
#
# Output, 2026-11-28:
#   alpha_pattern, as given: {'blocks.0.attn1.to_q': 64, 'attn1.to_q': 8} scales {0: 16.0, 1: 2.0}
#   alpha_pattern, as read:  {'attn1.to_q': 8, 'blocks.0.attn1.to_q': 64} scales {0: 2.0, 1: 2.0}
#   warnings while saving and loading: 0, equal weights: True, equal outputs: False
#   rank_pattern, saved and loaded: RuntimeError, size mismatch: True
#   as seen on 2026-11-28
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0 \
    numpy==2.4.6

cat > "$work/run.py" <<'PYTHON'
import copy
import sys
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

folder = sys.argv[1]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(16, 16)

    def forward(self, x):
        return self.to_q(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn1 = Attention()

    def forward(self, x):
        return x + self.attn1(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def scales(model):
    layers = [layer for layer in model.modules() if hasattr(layer, "scaling")]
    return {index: layer.scaling["default"] for index, layer in enumerate(layers)}


torch.manual_seed(0)
base = Model()
x = torch.randn(4, 16)

given = {"blocks.0.attn1.to_q": 64, "attn1.to_q": 8}
config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q"], alpha_pattern=given, init_lora_weights=False)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    before = get_peft_model(copy.deepcopy(base), config)
    before.save_pretrained(f"{folder}/alpha")
    after = PeftModel.from_pretrained(copy.deepcopy(base), f"{folder}/alpha")
read = after.peft_config["default"].alpha_pattern
scales_before, scales_after = scales(before), scales(after)
print("alpha_pattern, as given:", given, "scales", scales_before)
print("alpha_pattern, as read: ", read, "scales", scales_after)

weights_before, weights_after = get_peft_model_state_dict(before), get_peft_model_state_dict(after)
same_weights = weights_before.keys() == weights_after.keys() and all(
    torch.equal(weights_before[name], weights_after[name]) for name in weights_before
)
same_outputs = torch.allclose(before(x), after(x), rtol=1e-3, atol=1e-3)
said = [warning for warning in said if issubclass(warning.category, UserWarning)]
print(f"warnings while saving and loading: {len(said)}, equal weights: {same_weights}, equal outputs: {same_outputs}")

ranked = LoraConfig(r=4, target_modules=["to_q"], rank_pattern={"blocks.0.attn1.to_q": 8, "attn1.to_q": 2})
get_peft_model(copy.deepcopy(base), ranked).save_pretrained(f"{folder}/rank")
try:
    PeftModel.from_pretrained(copy.deepcopy(base), f"{folder}/rank")
    refused = False
except RuntimeError as error:
    refused = "size mismatch" in str(error)
print("rank_pattern, saved and loaded: RuntimeError, size mismatch:", refused)

seen = (
    scales_before == {0: 16.0, 1: 2.0}
    and scales_after == {0: 2.0, 1: 2.0}
    and read == given
    and list(read) == sorted(given)
    and not said
    and same_weights
    and not same_outputs
    and refused
)
if not seen:
    raise SystemExit("no longer as seen on 2026-11-28")
print("as seen on 2026-11-28")
PYTHON
"$work/venv/bin/python" "$work/run.py" "$work"
