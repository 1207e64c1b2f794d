#!/bin/sh
# Builds the wheel, installs it in a fresh environment and generates a video outside the repository.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH || true

"${PYTHON:-python3}" -m venv "$work/venv"
pip="$work/venv/bin/pip --quiet"

# A copy without build/: setuptools would pack modules that an earlier build left there.
mkdir "$work/source"
(cd "$root" && git ls-files -z | xargs -0 tar cf -) | tar xf - -C "$work/source"
$pip wheel --no-deps --wheel-dir "$work/dist" "$work/source"

$pip install "torch==${TORCH:-2.13.0}"
$pip install "$work"/dist/*.whl

mkdir "$work/elsewhere"
cd "$work/elsewhere"
"$work/venv/bin/causalrope-sp" generate "a red circle slides right" --frames 21 --out smoke.mp4
test -s smoke.mp4
"$work/venv/bin/causalrope-sp" inspect toybox >/dev/null
"$work/venv/bin/python" -c "from causalrope_sp import CausalVideoPipeline; import causalrope_kernels"
echo "the wheel works: $(basename "$work"/dist/*.whl)"
