"""Wrong arguments of kernels are refused by name, the backend is chosen per call, and the example runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from causalrope_kernels import (
    Affine,
    Bands,
    Keys,
    Modulation,
    Pieces,
    Projection,
    RotateOnRead,
    Slots,
    add_norm,
    attention,
    backend,
    linear_gelu,
    merge,
    norm_rope_store,
    reference,
    rms_norm,
    split_tokens,
)
from causalrope_kernels.backend import use_triton
from tests.support.kernel_inputs import EPS, WIDTH, B, D, F, H, S, T, a_rotation
from tests.support.paths import ROOT

X, Q = torch.zeros(B, T, WIDTH), torch.zeros(B, T, H, D)
VECTOR, PER_FRAME = torch.zeros(WIDTH), torch.zeros(F, WIDTH)
PLAIN, AFFINE = Modulation(PER_FRAME, PER_FRAME, EPS), Affine(VECTOR, VECTOR, EPS)
LSE = torch.zeros(B, T, H)
THREE_SLOTS = RotateOnRead(torch.zeros(3, 2, 4), 4)


def projecting(qkv: Tensor | None = None, **changed: Any) -> Projection:
    rotation = replace(a_rotation(), **{name: changed.pop(name) for name in [*changed] if name in vars(a_rotation())})
    numbers = torch.zeros(B, F, S, 3 * WIDTH, dtype=torch.float64) if qkv is None else qkv
    given: dict[str, Any] = {
        "q_weight": torch.zeros(WIDTH),
        "k_weight": torch.zeros(WIDTH),
        "heads": H,
        "eps": EPS,
    } | changed
    return Projection(numbers, rotation=rotation, **given)


def kv_slots(*shape: int, dtype: torch.dtype = torch.float64, slots: Tensor | None = None) -> list[Slots]:
    return [Slots(torch.zeros(*shape, dtype=dtype), slots)]


def interpreted(call: Callable[[], object], flag: str = "1") -> object:
    """Calls where Triton's interpreter is asked for, or is not, whatever the device of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", flag)
        return call()


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "x of no batch": (lambda: add_norm(X[0], None, None, PLAIN), r"x: expected shape \(B, T, D\).*, not \(12, 24\)"),
    "x of integers": (lambda: add_norm(X.int(), None, None, PLAIN), "x: expected floating-point.*, not torch.int32"),
    "x across memory": (
        lambda: add_norm(X.mT.contiguous().mT, None, None, PLAIN),
        "x: expected stride 1 in axis -1, not 12",
    ),
    "y shorter than x": (lambda: add_norm(X, X[:, 1:], None, PLAIN), r"y: expected shape .*, not \(2, 11, 24\)"),
    "y on another device": (lambda: add_norm(X, X.to("meta"), None, PLAIN), "y: expected to be on cpu, not meta"),
    "a gate without y": (lambda: add_norm(X, None, PER_FRAME, PLAIN), "gate: expected none without y"),
    "frames that do not divide": (
        lambda: add_norm(X, X, torch.zeros(5, WIDTH), AFFINE),
        "gate: expected as many frames as divide 12 tokens, not 5",
    ),
    "frames that differ": (
        lambda: add_norm(X, X, torch.zeros(4, WIDTH), PLAIN),
        "gate, shift, factor: expected the same frames",
    ),
    "a short vector": (lambda: add_norm(X, X, None, Affine(VECTOR[1:], VECTOR, EPS)), r"weight: expected shape \(D,\)"),
    "a long weight": (lambda: rms_norm(X, torch.zeros(WIDTH + 1), EPS), r"weight: expected shape \(D,\) = \(24\), not"),
    "a linear layer too wide": (
        lambda: linear_gelu(X, torch.zeros(7, 25), torch.zeros(7)),
        r"weight: expected shape \(N, K\)",
    ),
    "heads that do not divide": (lambda: norm_rope_store(projecting(heads=5)), "qkv: expected 3 × 5 heads"),
    "too many angles": (
        lambda: norm_rope_store(projecting(time=torch.zeros(60, 2, 9))),
        r"rotation: expected 4 angles of a token, not 9 \+ 1 \+ 1",
    ),
    "times for fewer frames": (
        lambda: norm_rope_store(projecting(key_times_F=torch.zeros(2, dtype=torch.int64))),
        "rotation.key_times_F: expected 3 integers on cpu, not torch.int64 of shape",
    ),
    "times that are no integers": (
        lambda: norm_rope_store(projecting(query_times_F=torch.zeros(3))),
        "query_times_F: expected 3 integers",
    ),
    "tokens outside the grid": (
        lambda: norm_rope_store(projecting(start=6)),
        "rotation: expected tokens within 3×3 positions, not",
    ),
    "tokens of another shard": (
        lambda: norm_rope_store(projecting(tokens=5)),
        "rotation.tokens: expected 4, as qkv has, not 5",
    ),
    "rooms for too few heads": (
        lambda: norm_rope_store(projecting(), q=kv_slots(B, F, S, 2, D)),
        r"q: expected Slots for 3 heads in all, not \[2\]",
    ),
    "a room of another dtype": (
        lambda: norm_rope_store(projecting(), k=kv_slots(B, F, S, H, D, dtype=torch.float32)),
        r"k\[0\]: expected torch.float64, not torch.float32",
    ),
    "a room for fewer tokens": (
        lambda: norm_rope_store(projecting(), v=kv_slots(B, F, 3, H, D)),
        r"v\[0\]: expected shape \(B, F, s, H, d\)",
    ),
    "slots for fewer frames": (
        lambda: norm_rope_store(projecting(), k=kv_slots(B, 9, S, H, D, slots=torch.tensor([1, 2]))),
        r"k\[0\].slots_F: expected 3 integers",
    ),
    "pieces of nothing": (lambda: norm_rope_store(Pieces([])), "pieces: expected at least one, not none"),
    "pieces of other heads": (
        lambda: norm_rope_store(Pieces([torch.zeros(2, B, F, S, H, D), torch.zeros(2, B, F, S, 1, D)])),
        r"pieces\[1\]: expected shape",
    ),
    "tokens split into too few": (
        lambda: split_tokens(torch.zeros(B, F, S, H, D), [torch.zeros(B, F, 1, H, D)]),
        r"pieces: expected 4 tokens in all, not \[1\]",
    ),
    "keys of other heads": (
        lambda: attention(Q, Keys(Q[:, :, 1:], Q)),
        r"k: expected shape \(B, L, H, d\) = .*, not \(2, 12, 2, 8\)",
    ),
    "values for fewer keys": (lambda: attention(Q, Keys(Q, Q[:, 1:])), "v: expected shape"),
    "half queries": (lambda: attention(Q.half(), Keys(Q, Q)), "k: expected torch.float16, not torch.float32"),
    "a stretch beyond the keys": (
        lambda: attention(Q, Keys(Q, Q, ((0, 13),))),
        r"ranges: expected .* within 12 rows, not \[0, 13\)",
    ),
    "bounds for other stretches": (
        lambda: attention(Q, Keys(Q, Q, ((0, 3),), torch.zeros(2, 2, dtype=torch.int32))),
        r"bounds_N2: expected int32 of shape \(1, 2\)",
    ),
    "rows of too few heads": (
        lambda: attention(Q, Keys(Q, Q, head_ranges=(((0, 3),),))),
        r"head_ranges: expected as many ranges, and one or more, for each of 3 heads, not \[1\]",
    ),
    "more rows of one head": (
        lambda: attention(Q, Keys(Q, Q, head_ranges=(((0, 3),), ((0, 3), (4, 5)), ((0, 3),)))),
        r"head_ranges: expected as many ranges, and one or more, for each of 3 heads, not \[1, 2, 1\]",
    ),
    "rows of a head beyond the keys": (
        lambda: attention(Q, Keys(Q, Q, head_ranges=(((0, 3),), ((0, 13),), ((0, 3),)))),
        r"ranges: expected .* within 12 rows, not \[0, 13\)",
    ),
    "rows of all heads and of each": (
        lambda: attention(Q, Keys(Q, Q, ((0, 3),), head_ranges=(((0, 3),),) * 3)),
        "head_ranges: expected None with ranges",
    ),
    "bounds of all heads for rows of each": (
        lambda: attention(Q, Keys(Q, Q, None, torch.zeros(1, 2, dtype=torch.int32), head_ranges=(((0, 3),),) * 3)),
        r"bounds_N2: expected int32 of shape \(3, 1, 2\)",
    ),
    "half a slot of a head": (
        lambda: attention(Q, Keys(Q, Q, rotate_on_read=THREE_SLOTS, head_ranges=(((0, 4),), ((0, 6),), ((0, 4),)))),
        "ranges: expected whole slots of 4 rows",
    ),
    "too few turns": (
        lambda: attention(Q, Keys(Q, Q, rotate_on_read=RotateOnRead(torch.zeros(2, 2, 4), 4))),
        "rotate_on_read: expected angles for 12 rows",
    ),
    "half a slot": (
        lambda: attention(Q, Keys(Q, Q, ((0, 6),), rotate_on_read=THREE_SLOTS)),
        "ranges: expected whole slots of 4 rows",
    ),
    "bands with a gap": (
        lambda: attention(Q, Keys(Q, Q, bands=Bands(((0, 2), (3, 4)), ((0, 4), (0, 4)), 4))),
        r"bands: expected queries of a frame, of 12 in all, that follow each other, with keys for each, not \(\(0, 2\)",
    ),
    "bands of frames that do not divide": (
        lambda: attention(Q, Keys(Q, Q, bands=Bands(((0, 5),), ((0, 4),), 4))),
        "bands: expected queries of a frame, of 12 in all",
    ),
    "bands outside a slot": (
        lambda: attention(Q, Keys(Q, Q, bands=Bands(((0, 4),), ((0, 5),), 4))),
        r"bands: expected keys within a slot, and whole slots in 12 rows, not \(\(0, 5\),\) in slots of 4",
    ),
    "bands of other slots than those that are rotated": (
        lambda: attention(Q, Keys(Q, Q, rotate_on_read=THREE_SLOTS, bands=Bands(((0, 4),), ((0, 6),), 6))),
        "bands: expected slots of 4 rows, as keys are rotated on read, not 6",
    ),
    "bands of half a slot": (
        lambda: attention(Q, Keys(Q, Q, ((0, 6),), bands=Bands(((0, 4),), ((0, 4),), 4))),
        "ranges: expected whole slots of 4 rows, as queries see some tokens of each",
    ),
    "no parts": (lambda: merge([]), "parts: expected at least one, not none"),
    "parts that differ": (lambda: merge([(Q, LSE), (Q[:, 1:], LSE[:, 1:])]), r"parts\[1\] output: expected shape"),
    "an unknown backend": (
        lambda: rms_norm(X, VECTOR, EPS, backend="cuda"),  # type: ignore[arg-type]
        "backend: expected auto, triton or torch, not 'cuda'",
    ),
    "an unknown attention": (
        lambda: attention(Q, Keys(Q, Q), "magic"),
        "backend: expected one of auto, torch, triton, cudnn.*not 'magic'",
    ),
    "triton in float64": (
        lambda: rms_norm(X.double(), VECTOR, EPS, backend="triton"),
        "backend: triton runs in float32.*not in torch.float64",
    ),
    "triton where a gradient is wanted": (
        lambda: interpreted(lambda: rms_norm(X.clone().requires_grad_(), VECTOR, EPS, backend="triton")),
        "backend: triton has no backward",
    ),
    "triton on the CPU": (
        lambda: interpreted(lambda: rms_norm(X, VECTOR, EPS, backend="triton"), "0"),
        "backend: triton runs on cuda, not on cpu",
    ),
    "bfloat16 interpreted": (
        lambda: interpreted(lambda: rms_norm(X.bfloat16(), VECTOR, EPS, backend="triton")),
        "backend: triton is interpreted in float32 and float16; in bfloat16",
    ),
    "a room that is no list": (
        lambda: norm_rope_store(projecting(), q=kv_slots(B, F, S, H, D)[0]),  # type: ignore[arg-type]
        "q: expected a list of Slots, not Slots",
    ),
    "queries from pieces of k, v": (
        lambda: norm_rope_store(Pieces([torch.zeros(2, B, F, S, H, D)]), q=kv_slots(B, F, S, H, D)),
        "q: expected no Slots for pieces of k, v alone",
    ),
    "slots with gaps between": (
        lambda: norm_rope_store(projecting(), k=kv_slots(B, 9, S, H, D, slots=torch.arange(6)[::2])),
        r"k\[0\].slots_F: expected stride 1",
    ),
    "a ring of none": (
        lambda: norm_rope_store(projecting(), k=kv_slots(B, 0, S, H, D, slots=torch.arange(3))),
        r"k\[0\]: expected a ring with slots",
    ),
    "bounds alone": (
        lambda: attention(Q, Keys(Q, Q, None, torch.zeros(0, 2, dtype=torch.int32))),
        "bounds_N2: expected ranges with it",
    ),
    "no columns": (lambda: norm_rope_store(projecting(columns=0)), "rotation.columns: expected at least 1, not 0"),
    "a source that is none": (
        lambda: norm_rope_store(X),  # type: ignore[arg-type]
        "source: expected a Projection, Pieces or QuantizedPieces, not Tensor",
    ),
    "a layer in another dtype": (
        lambda: linear_gelu(X, torch.zeros(7, WIDTH).double(), torch.zeros(7).double()),
        "weight: expected torch.float32, not torch.float64",
    ),
    "a library on the CPU": (lambda: attention(Q, Keys(Q, Q), "cudnn"), "backend: cudnn runs on cuda, not on cpu"),
    "a library that is not there": (
        lambda: attention(Q, Keys(Q, Q), "flash-attn-3"),
        "backend: flash-attn-3 is not installed",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_refused_by_name_before_anything_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, message = WRONG[name]
    for operation in ("add_norm", "rms_norm", "attention", "attention_lse", "merge", "rotate", "linear_gelu"):
        monkeypatch.setattr(reference, operation, None)
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_auto_is_torch_on_the_cpu_and_where_a_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not use_triton("auto", X)
    monkeypatch.setattr(backend, "runs_triton", lambda device: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert use_triton("auto", X)
    assert not use_triton("auto", X.double())
    assert not use_triton("auto", X, X.clone().requires_grad_())
    with torch.no_grad():
        assert use_triton("auto", X, X.clone().requires_grad_())


def test_the_example_runs() -> None:
    run = subprocess.run([sys.executable, str(ROOT / "examples" / "fused_kernels.py")], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "torch.Size([1, 48, 2, 16])\n"), run.stderr
