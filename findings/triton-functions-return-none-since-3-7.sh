#!/usr/bin/env bash
# Library    triton 3.6.0 and 3.7.0. torch 2.11 brings the first of them.
#
# Expected   A jitted function that is called by a kernel may return None, as None may be an argument: which branch is
#            taken is known when it is compiled. That holds in the interpreter in both versions, and by the compiler of
#            3.7.0.
#
# Seen       The compiler of 3.6.0 refuses the kernel: the error points at the line of the call and says that None
#            cannot be converted to a tensor. Whoever tests kernels on a CPU, by the interpreter or by compiling with
#            the newest release, learns of it on the first machine with an older torch.
#
# Output, 2026-11-29:
#   triton 3.6.0: interpreted 3.0; compiled for sm_90: TypeError("cannot convert None of type <class 'NoneType'> to tensor")
#   triton 3.7.0: interpreted 3.0; compiled for sm_90: yes
#   as seen on 2026-11-29
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export TRITON_CACHE_DIR="$work/cache"

cat > "$work/kernels.py" <<'PYTHON'
import triton
import triton.language as tl


@triton.jit
def factor_of(table, row):
    if table is None:
        return None
    else:
        return tl.load(table + row)


@triton.jit
def scale(source, target, table):
    row = tl.program_id(0)
    value = tl.load(source + row)
    factor = factor_of(table, row)
    if factor is not None:
        value *= factor
    tl.store(target + row, value)
PYTHON

cat > "$work/interpreted.py" <<'PYTHON'
import torch
from kernels import scale

target = torch.zeros(1)
scale[(1,)](torch.tensor([3.0]), target, None)
print(f"interpreted {target.item()}", end="; ")
PYTHON

cat > "$work/compiled.py" <<'PYTHON'
import triton
from kernels import scale
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

source = ASTSource(scale, {"source": "*fp32", "target": "*fp32", "table": "constexpr"}, {"table": None})
try:
    triton.compile(source, target=GPUTarget("cuda", 90, 32))
    said = "yes"
except triton.CompilationError as error:
    while error.__cause__ is not None:
        error = error.__cause__
    said = str(error).strip().splitlines()[-1]
print("compiled for sm_90:", said)
PYTHON

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
for version in 3.6.0 3.7.0; do
    # Some builds of torch bring a triton of their own; pip then remarks that this one takes its place. numpy 2.4
    # stops the interpreter of 3.6.0 for another reason.
    "$work/venv/bin/pip" install --quiet triton==$version numpy==2.3.5
    printf 'triton %s: ' $version
    (cd "$work" && TRITON_INTERPRET=1 venv/bin/python interpreted.py && venv/bin/python compiled.py)
done | tee "$work/seen"

diff "$work/seen" - <<'SEEN'
triton 3.6.0: interpreted 3.0; compiled for sm_90: TypeError("cannot convert None of type <class 'NoneType'> to tensor")
triton 3.7.0: interpreted 3.0; compiled for sm_90: yes
SEEN
echo "as seen on 2026-11-29"
