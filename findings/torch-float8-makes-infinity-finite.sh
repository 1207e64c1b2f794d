#!/usr/bin/env bash
# Library    torch 2.13.0 (casts to 8-bit floats on the CPU), against ml_dtypes 0.5.4.
#
# Expected   float8_e4m3fn has no infinity, so a cast from float32 turns one into NaN, as ml_dtypes does, and as torch
#            does for its own float8_e4m3fnuz, which has none either. Whoever looks for broken weights after they
#            were stored in 8 bits then finds them.
#
# Seen       Infinity becomes 448, the largest number there is, and minus infinity -448; only NaN stays NaN. (Finite
#            values beyond 448 become 448 as well: casts to e4m3fn saturate since this year. The change that brought
#            it, pytorch pull request 178817, speaks of finite overflow in its title.) So torch's four 8-bit formats
#            do three things with the same infinity: 448 in e4m3fn, infinity in e5m2, NaN in e4m3fnuz and e5m2fnuz.
#            A check for finite numbers after the cast passes a weight that has no value, and torch and ml_dtypes
#            make different bytes of the same float32.
#
# Output, 2026-11-28 (from 480, 1e9, inf, -inf, nan):
#   torch     float8_e4m3fn   [448.0, 448.0, 448.0, -448.0, nan]
#   ml_dtypes float8_e4m3fn   [nan, nan, nan, nan, nan]
#   torch     float8_e4m3fnuz [nan, nan, nan, nan, nan]
#   torch     float8_e5m2     [512.0, inf, inf, -inf, nan]
#   ml_dtypes float8_e5m2     [512.0, inf, inf, -inf, nan]
#   torch     float8_e5m2fnuz [512.0, nan, nan, nan, nan]
#   float32 with one infinity among 1000: finite before the cast False, after it True
#   as seen on 2026-11-28
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet ml_dtypes==0.5.4 numpy==2.4.6

cat > "$work/run.py" <<'PYTHON'
import ml_dtypes
import numpy as np
import torch

values = np.array([480, 1e9, np.inf, -np.inf, np.nan], np.float32)


def by_torch(name):
    return torch.from_numpy(values).to(getattr(torch, name)).float().tolist()


def by_ml_dtypes(name):
    return values.astype(getattr(ml_dtypes, name)).astype(np.float32).tolist()


seen = {
    (by_torch, "float8_e4m3fn"): "[448.0, 448.0, 448.0, -448.0, nan]",
    (by_ml_dtypes, "float8_e4m3fn"): "[nan, nan, nan, nan, nan]",
    (by_torch, "float8_e4m3fnuz"): "[nan, nan, nan, nan, nan]",
    (by_torch, "float8_e5m2"): "[512.0, inf, inf, -inf, nan]",
    (by_ml_dtypes, "float8_e5m2"): "[512.0, inf, inf, -inf, nan]",
    (by_torch, "float8_e5m2fnuz"): "[512.0, nan, nan, nan, nan]",
}
same = True
for (cast, name), was in seen.items():
    now = str(cast(name))
    same = same and now == was
    print(f"{cast.__name__.removeprefix('by_'):9} {name:15} {now}")

# In the middle of many and at any length: the vectorised cast and the one for what is left over agree.
for length in (1, 7, 33, 1000):
    weights = torch.ones(length)
    weights[length // 2] = torch.inf
    folded = weights.to(torch.float8_e4m3fn).float()
    same = same and folded.max().item() == 448 and folded.isfinite().all().item()
before, after = weights.isfinite().all().item(), folded.isfinite().all().item()
print(f"float32 with one infinity among {length}: finite before the cast {before}, after it {after}")
if not same or before or not after:
    raise SystemExit("no longer as seen on 2026-11-28")
print("as seen on 2026-11-28")
PYTHON
"$work/venv/bin/python" "$work/run.py"
