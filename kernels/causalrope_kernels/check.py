"""Checks of an operation's arguments before a launch. A ValueError names the argument, the expected and the actual.

One function checks one operation and has its name; the other functions check one kind of argument each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from causalrope_kernels import check_quantized
from causalrope_kernels.arguments import (
    Affine,
    Norm,
    Pieces,
    Projection,
    QuantizedPieces,
    Slots,
    SlotsByHeads,
    Source,
)
from causalrope_kernels.rotation import Rotation


def shape(name: str, x: Tensor, expected: Sequence[int | None], meaning: str) -> None:
    """Checks the shape of `x`; `expected` holds None where any size is right, `meaning` names the axes."""
    if x.ndim != len(expected) or any(e is not None and e != n for n, e in zip(x.shape, expected)):
        sizes = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{name}: expected shape {meaning} = ({sizes}), not {tuple(x.shape)}")


def same(name: str, x: Tensor, like: Tensor, *, dtype: bool = True) -> None:
    """Checks that `x` is on the device of `like` and, with `dtype`, has its dtype."""
    if x.device != like.device:
        raise ValueError(f"{name}: expected to be on {like.device}, not {x.device}")
    if dtype and x.dtype != like.dtype:
        raise ValueError(f"{name}: expected {like.dtype}, not {x.dtype}")
    if not x.is_floating_point():
        raise ValueError(f"{name}: expected floating-point numbers, not {x.dtype}")


def dense(name: str, x: Tensor, axes: int = 1) -> None:
    """Checks that the last `axes` axes lie in memory without gaps."""
    if not x.numel():
        return
    step = 1
    for axis in range(1, axes + 1):
        if x.shape[-axis] > 1 and x.stride(-axis) != step:
            raise ValueError(f"{name}: expected stride {step} in axis {-axis}, not {x.stride(-axis)}")
        step *= x.shape[-axis]


def whole_numbers(name: str, x: Tensor, count: int, like: Tensor) -> None:
    """Checks that `x` holds `count` integers on the device of `like`."""
    if x.shape != (count,) or x.dtype not in (torch.int32, torch.int64) or x.device != like.device:
        raise ValueError(
            f"{name}: expected {count} integers on {like.device}, not {x.dtype} of shape {tuple(x.shape)} on {x.device}"
        )
    dense(name, x)


def vector(name: str, x: Tensor, width: int, like: Tensor) -> None:
    """Checks that `x` is (width,), on the device of `like`."""
    shape(name, x, (width,), "(D,)")
    same(name, x, like, dtype=False)
    dense(name, x)


def by_frame(name: str, vectors: Tensor, x_BTD: Tensor) -> None:
    """Checks that there is one vector per frame, and that the number of frames divides the tokens of `x_BTD`."""
    batch, tokens, width = x_BTD.shape
    if vectors.ndim not in (2, 3):
        raise ValueError(f"{name}: expected two or three axes, not {tuple(vectors.shape)}")
    shape(name, vectors, (batch, None, width)[3 - vectors.ndim :], "(B, F, D)" if vectors.ndim == 3 else "(F, D)")
    same(name, vectors, x_BTD, dtype=False)
    dense(name, vectors)
    if vectors.shape[-2] < 1 or tokens % vectors.shape[-2]:
        raise ValueError(f"{name}: expected as many frames as divide {tokens} tokens, not {vectors.shape[-2]}")


def add_norm(x_BTD: Tensor, y_BTD: Tensor | None, gate: Tensor | None, norm: Norm, out: Tensor | None) -> None:
    """Checks the arguments of `add_norm`."""
    shape("x", x_BTD, (None, None, None), "(B, T, D)")
    same("x", x_BTD, x_BTD)
    dense("x", x_BTD)
    if y_BTD is not None:
        shape("y", y_BTD, x_BTD.shape, "(B, T, D)")
        same("y", y_BTD, x_BTD, dtype=False)
        dense("y", y_BTD)
    elif gate is not None:
        raise ValueError("gate: expected none without y, not a gate")
    width = x_BTD.shape[2]
    if isinstance(norm, Affine):
        vector("weight", norm.weight, width, x_BTD)
        vector("bias", norm.bias, width, x_BTD)
    vectors = {"gate": gate} if isinstance(norm, Affine) else {"gate": gate, "shift": norm.shift, "factor": norm.factor}
    frames = set()
    for name, each in vectors.items():
        if each is not None:
            by_frame(name, each, x_BTD)
            frames.add(tuple(each.shape))
    if len(frames) > 1:
        raise ValueError(f"gate, shift, factor: expected the same frames, not {sorted(frames)}")
    if out is not None:
        shape("out", out, x_BTD.shape, "(B, T, D)")
        same("out", out, x_BTD, dtype=False)
        dense("out", out, 3)
        dense("x, which is overwritten,", x_BTD, 3)


def rms_norm(x: Tensor, weight: Tensor, out: Tensor | None) -> None:
    """Checks the arguments of `rms_norm`."""
    if x.ndim < 1:
        raise ValueError("x: expected at least one axis, not a number")
    same("x", x, x)
    dense("x", x)
    vector("weight", weight, x.shape[-1], x)
    if out is not None:
        shape("out", out, x.shape, "that of x")
        same("out", out, x)
        dense("out", out, out.ndim)


def source(value: Source) -> None:
    """Checks where `norm_rope_store` reads q, k and v."""
    if isinstance(value, Pieces):
        _pieces(value.pieces)
    elif isinstance(value, Projection):
        _projection(value)
    elif isinstance(value, QuantizedPieces):
        check_quantized.pieces(value)
    else:
        raise ValueError(f"source: expected a Projection, Pieces or QuantizedPieces, not {type(value).__name__}")


def _projection(projection: Projection) -> None:
    qkv, rotation = projection.qkv_BFSN, projection.rotation
    shape("qkv", qkv, (None, None, None, None), "(B, F, s, 3·D)")
    same("qkv", qkv, qkv)
    dense("qkv", qkv)
    frames, tokens, numbers = qkv.shape[1:]
    heads = projection.heads
    if heads < 1 or numbers % (6 * heads):
        raise ValueError(f"qkv: expected 3 × {heads} heads of an even width in the last axis, not {numbers}")
    vector("q_weight", projection.q_weight, numbers // 3, qkv)
    vector("k_weight", projection.k_weight, numbers // 3, qkv)
    _rotation(rotation, frames, tokens, numbers // 6 // heads, qkv)


def _rotation(rotation: Rotation, frames: int, tokens: int, pairs: int, like: Tensor) -> None:
    tables = {"time": rotation.time, "row": rotation.row, "column": rotation.column}
    for name, table in tables.items():
        shape(f"rotation.{name}", table, (None, 2, None), "(positions, 2, E)")
        same(f"rotation.{name}", table, like, dtype=False)
        dense(f"rotation.{name}", table, 3)
    widths = [table.shape[2] for table in tables.values()]
    if sum(widths) != pairs:
        raise ValueError(f"rotation: expected {pairs} angles of a token, not {' + '.join(map(str, widths))}")
    whole_numbers("rotation.query_times_F", rotation.query_times_F, frames, like)
    whole_numbers("rotation.key_times_F", rotation.key_times_F, frames, like)
    if rotation.columns < 1:
        raise ValueError(f"rotation.columns: expected at least 1, not {rotation.columns}")
    if rotation.tokens != tokens:
        raise ValueError(f"rotation.tokens: expected {tokens}, as qkv has, not {rotation.tokens}")
    rows, columns, stop = rotation.row.shape[0], rotation.column.shape[0], rotation.start + tokens
    if rotation.start < 0 or rotation.columns > columns or stop > rows * rotation.columns:
        raise ValueError(
            f"rotation: expected tokens within {rows}×{columns} positions, not [{rotation.start}, {stop}) of rows of "
            f"{rotation.columns}"
        )


def _pieces(pieces: Sequence[Tensor]) -> None:
    if not pieces:
        raise ValueError("pieces: expected at least one, not none")
    kinds, batch, frames, _, heads, width = pieces[0].shape if pieces[0].ndim == 6 else (0,) * 6
    for number, piece in enumerate(pieces):
        name = f"pieces[{number}]"
        shape(name, piece, (kinds, batch, frames, None, heads, width), "(N, B, F, s, H, d)")
        same(name, piece, pieces[0])
        dense(name, piece, 3)
    if kinds not in (2, 3):
        raise ValueError(f"pieces: expected k, v or q, k, v in the first axis, not {kinds}")


def split(x_BFSHD: Tensor, pieces: Sequence[Tensor]) -> None:
    """Checks the arguments of `split_tokens`."""
    shape("x", x_BFSHD, (None,) * 5, "(B, F, S, H, d)")
    same("x", x_BFSHD, x_BFSHD)
    dense("x", x_BFSHD, 2)
    batch, frames, tokens, heads, width = x_BFSHD.shape
    for number, piece in enumerate(pieces):
        shape(f"pieces[{number}]", piece, (batch, frames, None, heads, width), "(B, F, s, H, d)")
        same(f"pieces[{number}]", piece, x_BFSHD)
        dense(f"pieces[{number}]", piece, 5)
    if sum(piece.shape[2] for piece in pieces) != tokens:
        raise ValueError(f"pieces: expected {tokens} tokens in all, not {[piece.shape[2] for piece in pieces]}")


def kv_slots(source: Source, **by_name: SlotsByHeads) -> None:
    """Checks where `norm_rope_store` writes q, k and v."""
    batch, frames, tokens, heads, width = source.shape
    alone = isinstance(source, QuantizedPieces) and not source.q
    if by_name["q"] and (alone or (isinstance(source, Pieces) and len(source.pieces[0]) == 2)):
        raise ValueError("q: expected no Slots for pieces of k, v alone, not some")
    for name, found in by_name.items():
        if not isinstance(found, Sequence) or not all(isinstance(slots, Slots) for slots in found):
            raise ValueError(f"{name}: expected a list of Slots, not {type(found).__name__}")
        for number, slots in enumerate(found):
            label = f"{name}[{number}]"
            count = frames if slots.slots_F is None else None
            shape(label, slots.x, (batch, count, tokens, None, width), "(B, F, s, H, d)")
            if slots.scales is None:
                same(label, slots.x, source.like)
            dense(label, slots.x)
            if slots.slots_F is not None and frames and not slots.x.shape[1]:
                raise ValueError(f"{label}: expected a ring with slots, not one of none")
            if slots.slots_F is not None:
                whole_numbers(f"{label}.slots_F", slots.slots_F, frames, source.like)
                if slots.slots_F.dtype != torch.int64:
                    raise ValueError(f"{label}.slots_F: expected int64, not {slots.slots_F.dtype}")
        if found and sum(slots.x.shape[3] for slots in found) != heads:
            raise ValueError(
                f"{name}: expected Slots for {heads} heads in all, not {[slots.x.shape[3] for slots in found]}"
            )
        quantized = any(slots.scales is not None for slots in found)
        if quantized and name == "q":
            raise ValueError("q: expected Slots without scales, not quantized ones")
        if quantized and isinstance(source, Pieces):
            raise ValueError(f"{name}: expected QuantizedPieces for Slots with scales, not Pieces")
        if name != "q" and (quantized or (found and isinstance(source, QuantizedPieces))):
            check_quantized.slots(name, found, source)
        if len({slots.slots_F is None for slots in found}) > 1:
            raise ValueError(f"{name}: expected slots_F in all Slots or in none, not in some")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Checks the arguments of `linear` and `linear_gelu`."""
    if x.ndim < 2:
        raise ValueError(f"x: expected at least two axes, not {tuple(x.shape)}")
    shape("weight", weight, (None, x.shape[-1]), "(N, K)")
    same("weight", weight, x, dtype=not torch.is_autocast_enabled(x.device.type))
    if bias is not None:
        shape("bias", bias, (weight.shape[0],), "(N,)")
        same("bias", bias, weight)
