#!/usr/bin/env bash
# Library    lycoris-lora 4.1.3 (LokrModule), torch 2.13.0.
#
# Expected   A LoKr module changes its layer's output by the same amount while it is applied and after it was merged:
#            get_diff_weight() and get_merged_weight() give the weight that its forward adds, scaled by alpha / rank.
#
# Seen       Where alpha differs from the rank, they scale twice: the weight that is merged is alpha / rank times what
#            the forward adds, a quarter at alpha 1 and rank 4, with no warning. At alpha = rank both agree.
#            Whoever merges LoKr files by hand should take the module's forward as the judge.
#
# Output, 2026-11-29:
#   alpha / rank 0.25: get_diff_weight 0.250, get_merged_weight 0.250 of what forward adds
#   alpha / rank 0.50: get_diff_weight 0.500, get_merged_weight 0.500 of what forward adds
#   alpha / rank 1.00: get_diff_weight 1.000, get_merged_weight 1.000 of what forward adds
#   as seen on 2026-11-29
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet lycoris-lora==4.1.3 numpy==2.4.6

cat > "$work/run.py" <<'PYTHON'
import sys

import torch
from lycoris.modules.lokr import LokrModule
from torch import nn

torch.manual_seed(0)
found = []
for alpha in (1, 2, 4):
    layer = nn.Linear(64, 64, bias=False)
    module = LokrModule("layer", layer, multiplier=1.0, lora_dim=4, alpha=alpha, factor=4)
    for parameter in module.parameters():
        if parameter is not layer.weight:
            nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        x = torch.eye(64)
        plain = layer(x)
        module.apply_to()
        added = (layer(x) - plain).T
        difference = module.get_diff_weight(1.0)
        difference = difference[0] if isinstance(difference, tuple) else difference
        merged = module.get_merged_weight(1.0)[0] - layer.weight
    shares = [float(weight.norm() / added.norm()) for weight in (difference, merged)]
    found.append((alpha / 4, *shares))
    print(
        f"alpha / rank {alpha / 4:.2f}: get_diff_weight {shares[0]:.3f}, get_merged_weight {shares[1]:.3f} "
        "of what forward adds"
    )
as_seen = all(abs(share - ratio) < 1e-3 for ratio, *shares in found for share in shares)
print("as seen on 2026-11-29" if as_seen else "changed")
sys.exit(not as_seen)
PYTHON
"$work/venv/bin/python" "$work/run.py" 2>/dev/null
