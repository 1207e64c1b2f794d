#!/usr/bin/env bash
# Library    safetensors 0.8.0, against 0.7.0.
#
# Expected   save_file makes a file with the permissions of any new file: read and write for all, less the umask. So it
#            is for open(), torch.save, numpy.save, and save_file up to 0.7.0; and a file that is written anew keeps the
#            permissions that it had.
#
# Seen       From 0.8.0 on the file has mode 0600, whatever the umask, also in the place of one that had 0664. Weights
#            that one user of a machine saves, or that a container writes into a shared folder, no longer load for
#            anybody else, while the config.json beside them does. Nothing is printed when they are written.
#
#            The cause is the temporary file that pull request 764 brought; issue 782 reports it and is open.
#
# Instead    os.chmod after save_file.
#
# Output, 2026-11-29 (umask 0022):
#   safetensors 0.7.0   new file 0644   in the place of one with 0664: 0664
#   safetensors 0.8.0   new file 0600   in the place of one with 0664: 0600
#   open()              new file 0644
#   as seen on 2026-11-29
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"

cat > "$work/run.py" <<'PYTHON'
import os
import stat
import sys

import numpy as np
import safetensors
from safetensors.numpy import save_file

os.umask(0o022)
os.chdir(sys.argv[1])


def mode(path):
    return f"{stat.S_IMODE(os.stat(path).st_mode):04o}"


save_file({"x": np.ones(2)}, "new.safetensors")
open("old.safetensors", "w").close()
os.chmod("old.safetensors", 0o664)
save_file({"x": np.ones(2)}, "old.safetensors")
open("plain", "w").close()
seen = mode("new.safetensors"), mode("old.safetensors")
print(f"safetensors {safetensors.__version__}   new file {seen[0]}   in the place of one with 0664: {seen[1]}")
if safetensors.__version__ == "0.8.0":
    print(f"open()              new file {mode('plain')}")
wanted = {"0.7.0": ("0644", "0664"), "0.8.0": ("0600", "0600")}[safetensors.__version__]
if seen != wanted or mode("plain") != "0644":
    raise SystemExit("no longer as seen on 2026-11-29")
PYTHON
for version in 0.7.0 0.8.0; do
  "$work/venv/bin/pip" install --quiet safetensors==$version numpy==2.4.6
  mkdir "$work/$version"
  "$work/venv/bin/python" "$work/run.py" "$work/$version"
done
echo "as seen on 2026-11-29"
