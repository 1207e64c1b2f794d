"""Draws the pictures of docs/parallelism.md: python docs/drawings/parallelism.py [png]

shards.svg      which rank owns which tokens of which latent frame
strategies.svg  what every strategy sends in a layer, and what a rank keeps
mesh.svg        the axes of the mesh of ranks
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

DOCS = Path(__file__).parent.parent
COLORS = ("#4477aa", "#ee8866", "#44aa77", "#aa77bb")
INK, PALE, MUTED = "#222222", "#f2f2f2", "#666666"
TITLE: dict[str, Any] = {"ha": "left", "weight": "bold", "fontsize": 12}
NOTE: dict[str, Any] = {"ha": "left", "color": MUTED, "fontsize": 9}
ROWS, COLUMNS, RANKS = 4, 5, 3
OWNED = (7, 7, 6)  # tokens of a frame on each rank


def main() -> None:
    matplotlib.rcParams.update({"svg.hashsalt": "causalrope_sp", "font.size": 10})
    suffix = "png" if "png" in sys.argv[1:] else "svg"
    for name, draw in (("shards", draw_shards), ("strategies", draw_strategies), ("mesh", draw_mesh)):
        figure = draw()
        metadata = {"Date": None} if suffix == "svg" else None
        figure.savefig(DOCS / f"{name}.{suffix}", metadata=metadata, facecolor="white", dpi=100)


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A page of width × height in units of half an inch, with the origin at the upper left."""
    figure = pyplot.figure(figsize=(width / 2, height / 2))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(height, 0))
    axis.axis("off")
    return figure, axis


def write(axis: Axes, x: float, y: float, text: str, **style: Any) -> None:
    axis.text(x, y, text, **{"ha": "center", "va": "center", "color": INK, **style})


def box(axis: Axes, x: float, y: float, width: float, height: float, color: str, text: str = "", **style: Any) -> None:
    shape = "round,pad=0,rounding_size=0.12"
    axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=color, edgecolor="white"))
    write(axis, x + width / 2, y + height / 2, text, **{"color": "white", **style})


def arrow(axis: Axes, start: tuple[float, float], stop: tuple[float, float], color: str = MUTED) -> None:
    axis.add_patch(FancyArrowPatch(start, stop, arrowstyle="-|>", mutation_scale=9, color=color, linewidth=1.1))


def owner(token: int) -> int:
    return 0 if token < OWNED[0] else 1 if token < OWNED[0] + OWNED[1] else 2


def draw_frame(axis: Axes, x: float, y: float, size: float, numbers: int | None = None) -> None:
    """A latent frame of tokens, coloured by rank; `numbers` writes the global index from there on."""
    for token in range(ROWS * COLUMNS):
        row, column = divmod(token, COLUMNS)
        corner = x + column * size, y + row * size
        axis.add_patch(Rectangle(corner, size, size, facecolor=COLORS[owner(token)], edgecolor="white", linewidth=0.8))
        if numbers is not None:
            write(axis, corner[0] + size / 2, corner[1] + size / 2, str(numbers + token), color="white", fontsize=7)


def draw_shards() -> Figure:
    figure, axis = canvas(20, 9.6)
    write(axis, 0.4, 0.5, "Every rank owns the same tokens of every latent frame", **TITLE)
    size, step = 0.5, 3.1
    for frame in range(6):
        left = 1.0 + frame * step
        draw_frame(axis, left, 1.9, size, frame * ROWS * COLUMNS)
        write(axis, left + COLUMNS * size / 2, 1.55, f"t = {frame}", fontsize=10)
    for first, count, text in ((0, 3, "window: committed chunk, in the cache"), (3, 3, "current chunk, denoised")):
        left, right = 1.0 + first * step, 1.0 + (first + count - 1) * step + COLUMNS * size
        axis.plot([left, left, right, right], [4.1, 4.25, 4.25, 4.1], color=MUTED, linewidth=1)
        write(axis, (left + right) / 2, 4.6, text, color=MUTED)
    write(axis, 0.4, 5.5, "What each rank computes, from patch embedding to output head", **TITLE)
    for rank in range(RANKS):
        top, first = 6.0 + rank * 0.85, sum(OWNED[:rank])
        box(axis, 1.0, top, 1.5, 0.65, COLORS[rank], f"rank {rank}")
        spans = ", ".join(f"{t * 20 + first}–{t * 20 + first + OWNED[rank] - 1}" for t in (3, 4, 5))
        write(axis, 2.8, top + 0.32, f"tokens [{first}, {first + OWNED[rank]}) of each frame: global indices {spans}",
              ha="left")  # fmt: skip
    note = (
        "A number in a cell is the global index g = t·S + y·columns + x, here with S = 20 tokens a frame. It gives t, "
        "y and x, the three angles of RoPE."
    )
    write(axis, 0.4, 9.0, note, **NOTE)
    return figure


STRATEGIES = (  # name, collectives before and after attention, what is cached, what a rank attends, what it keeps
    ("ulysses", "all-to-all\nq, k, v", "all-to-all\noutput", "heads", "all tokens of\nits own heads", "1/P of heads"),
    ("gather-kv", "all-gather\nk, v of the chunk", "none", "whole", "its own queries,\nall keys", "all of it"),
    (
        "shard-kv",
        "all-gather\nq",
        "all-to-all\npartial outputs, LSE",
        "tokens",
        "all queries,\nits own keys",
        "1/P of tokens",
    ),
)


def draw_cache(axis: Axes, x: float, y: float, kept: str, rank: int) -> None:
    """A cache as heads (rows) × tokens (columns); what `rank` of three keeps is filled."""
    for head in range(3):
        for part in range(3):
            mine = kept == "whole" or (kept == "heads" and head == rank) or (kept == "tokens" and part == rank)
            axis.add_patch(
                Rectangle((x + part * 0.5, y + head * 0.3), 0.5, 0.3, facecolor=COLORS[rank] if mine else PALE,
                          edgecolor="white", linewidth=0.8)
            )  # fmt: skip


def draw_strategies() -> Figure:
    figure, axis = canvas(20, 12.6)
    columns = ((1.5, "strategy"), (4.4, "before attention"), (8.1, "attention on a rank"), (12.6, "after attention"),
               (17.0, "cache of ranks 0, 1, 2"))  # fmt: skip
    for x, title in columns:
        write(axis, x, 0.6, title, weight="bold")
    for number, (name, before, after, kept, attends, share) in enumerate(STRATEGIES):
        top = 1.2 + number * 3.5
        axis.add_patch(Rectangle((0.2, top), 19.6, 3.2, facecolor="#fafafa", edgecolor="#dddddd"))
        write(axis, 1.5, top + 1.6, name, weight="bold", fontsize=12)
        for x, text in ((4.4, before), (12.6, after)):
            sends = text != "none"
            if sends:
                for start in range(3):
                    for stop in range(3):
                        here, there = top + 0.55 + start * 0.5, top + 0.55 + stop * 0.5
                        axis.plot([x - 1.0, x + 1.0], [here, there], color=COLORS[start], linewidth=1.1)
                write(axis, x, top + 2.5, text)
            else:
                write(axis, x, top + 1.05, "no collective", color=MUTED)
        for rank in range(3):
            box(axis, 7.3, top + 0.35 + rank * 0.5, 1.6, 0.42, COLORS[rank], f"rank {rank}", fontsize=9)
            draw_cache(axis, 14.4 + rank * 1.75, top + 0.55, kept, rank)
        write(axis, 8.1, top + 2.5, attends)
        write(axis, 17.0, top + 2.5, share)
        arrow(axis, (5.6, top + 1.05), (7.1, top + 1.05))
        arrow(axis, (9.1, top + 1.05), (11.4, top + 1.05))
    note = (
        "P ranks, here three. A cache is drawn as heads (down) × tokens (across). Partial outputs are merged by LSE,\n"
        "the log-sum-exp of the attention scores."
    )
    write(axis, 0.4, 12.1, note, **NOTE)
    return figure


def draw_mesh() -> Figure:
    figure, axis = canvas(20, 7.6)
    write(
        axis,
        0.4,
        0.6,
        "torchrun with 8 ranks, cfg = 2, decode_ranks = 2: the sp axis has (8 - 2) / 2 = 3 ranks",
        **TITLE,
    )
    for branch, name in enumerate(("conditional", "unconditional")):
        top = 1.9 + branch * 2.2
        write(axis, 3.3, top + 0.6, f"cfg {branch}: {name}", ha="right")
        axis.add_patch(Rectangle((3.6, top - 0.25), 8.9, 1.7, facecolor="#fafafa", edgecolor="#dddddd"))
        for sp in range(3):
            box(axis, 3.9 + sp * 2.9, top, 2.5, 1.2, COLORS[sp], f"rank {branch * 3 + sp}\nsp {sp}")
    for sp in range(3):
        x = 5.15 + sp * 2.9
        axis.add_patch(FancyArrowPatch((x, 3.1), (x, 4.1), arrowstyle="<|-|>", mutation_scale=8, color=MUTED))
    write(axis, 8.05, 1.25, "sp: the tokens of every frame; collectives in every layer", color=MUTED)
    write(axis, 8.05, 5.9, "cfg: one all-gather of velocities a denoising step, between the two ranks above each other",
          color=MUTED)  # fmt: skip
    for worker in range(2):
        box(axis, 15.6, 1.9 + worker * 2.2, 2.9, 1.2, COLORS[3], f"rank {6 + worker}\ndecode {worker}")
    arrow(axis, (12.8, 3.6), (15.3, 3.6))
    write(axis, 14.1, 3.2, "latents", color=MUTED)
    write(axis, 17.05, 1.25, "decode: spatial shards of the VAE", color=MUTED)
    write(axis, 17.05, 5.9, "no transformer here", color=MUTED)
    note = (
        "A fourth axis, chunk, lies between cfg and sp. Only chunks that are denoised in parallel (VIN) use it: every "
        "rank of a chunk\ngroup denoises other chunks."
    )
    write(axis, 0.4, 6.8, note, **NOTE)
    return figure


if __name__ == "__main__":
    main()
