#!/usr/bin/env bash
# Library    triton 3.9.0 (TRITON_INTERPRET=1), numpy 2.4.6, torch 2.13.0.
#
# Expected   The interpreter does no arithmetic in bfloat16, as its documentation says: one computes in float32 and
#            casts at the end. A kernel that does so, tested on a CPU, stores what the compiled kernel stores: the
#            nearest bfloat16, all the more where fp_downcast_rounding="rtne" asks for it.
#
# Seen       The interpreter cuts the lower 16 bits off, whatever rounding is asked for. Every result that is not exact
#            is too small in magnitude, by half a unit in the last place on average, and half of all values are not the
#            nearest. The same kernel compiled for compute capability 9.0 (this needs no GPU) holds cvt.rn.bf16.f32, to
#            the nearest. The interpreter does round float16 to the nearest, so a test that is exact in float16 and off
#            in bfloat16 looks like the kernel's fault, and errors of one sign add up in whatever sums the outputs.
#
# Output, 2026-11-28:
#   1.005859375 to bfloat16: torch 1.0078125, interpreted 1.0, with rtne 1.0
#   nearest, of 4096 values in [1, 2): bfloat16 50 %, with rtne 50 %, float16 100 %
#   mean error in units of the last place: interpreted -0.50, torch 0.00
#   compiled for sm_90: cvt.rn.bf16.f32, with rtne cvt.rn.bf16.f32
#   as seen on 2026-11-28
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
# Some builds of torch bring a triton of their own; pip then remarks that this one takes its place.
"$work/venv/bin/pip" install --quiet triton==3.9.0 numpy==2.4.6
export TRITON_CACHE_DIR="$work/cache"

cat > "$work/kernels.py" <<'PYTHON'
import triton
import triton.language as tl


@triton.jit
def store_bfloat16(source, target, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(target + at, tl.load(source + at).to(tl.bfloat16))


@triton.jit
def store_bfloat16_rtne(source, target, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(target + at, tl.load(source + at).to(tl.bfloat16, fp_downcast_rounding="rtne"))


@triton.jit
def store_float16(source, target, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(target + at, tl.load(source + at).to(tl.float16))
PYTHON

cat > "$work/interpreted.py" <<'PYTHON'
import torch
from kernels import store_bfloat16, store_bfloat16_rtne, store_float16


def run(kernel, source, dtype):
    target = torch.empty(source.numel(), dtype=dtype)
    kernel[(1,)](source, target, source.numel())
    return target


one = torch.tensor([1.0 + 0.75 * 2**-7])  # three quarters of the way from 1 to the next bfloat16
plain, rtne = run(store_bfloat16, one, torch.bfloat16).item(), run(store_bfloat16_rtne, one, torch.bfloat16).item()
print(f"{one.item()} to bfloat16: torch {one.bfloat16().item()}, interpreted {plain}, with rtne {rtne}")

many = 1 + torch.rand(4096, generator=torch.Generator().manual_seed(0))
cut = run(store_bfloat16, many, torch.bfloat16)
cut_rtne = run(store_bfloat16_rtne, many, torch.bfloat16)
half = run(store_float16, many, torch.float16)
near = (cut == many.bfloat16()).double().mean().item()
near_rtne = (cut_rtne == many.bfloat16()).double().mean().item()
near_half = (half == many.half()).double().mean().item()
print(
    f"nearest, of 4096 values in [1, 2): bfloat16 {100 * near:.0f} %, with rtne {100 * near_rtne:.0f} %, "
    f"float16 {100 * near_half:.0f} %"
)
bias = ((cut.double() - many.double()) * 2**7).mean().item()
bias_torch = ((many.bfloat16().double() - many.double()) * 2**7).mean().item()
print(f"mean error in units of the last place: interpreted {bias:.2f}, torch {abs(bias_torch):.2f}")

cut_bits = (many.view(torch.int32) >> 16).to(torch.int16)
seen = (
    (plain, rtne, one.bfloat16().item()) == (1.0, 1.0, 1.0078125)
    and torch.equal(cut.view(torch.int16), cut_bits)
    and torch.equal(cut_rtne.view(torch.int16), cut_bits)
    and near_half == 1
)
if not seen:
    raise SystemExit("interpreted: no longer as seen on 2026-11-28")
PYTHON

cat > "$work/compiled.py" <<'PYTHON'
import re

import triton
from kernels import store_bfloat16, store_bfloat16_rtne
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def conversions(kernel):
    source = ASTSource(
        fn=kernel, signature={"source": "*fp32", "target": "*bf16", "n": "constexpr"}, constexprs={"n": 1024}
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    return " ".join(sorted(set(re.findall(r"cvt\.\S*bf16\S*", made.asm["ptx"]))))


plain, rtne = conversions(store_bfloat16), conversions(store_bfloat16_rtne)
print(f"compiled for sm_90: {plain}, with rtne {rtne}")
if not plain.startswith("cvt.rn.") or rtne != plain:
    raise SystemExit("compiled: no longer as seen on 2026-11-28")
print("as seen on 2026-11-28")
PYTHON
TRITON_INTERPRET=1 "$work/venv/bin/python" -W ignore "$work/interpreted.py"
TRITON_INTERPRET=0 "$work/venv/bin/python" -W ignore "$work/compiled.py"
