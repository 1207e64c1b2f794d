"""The report of `causalrope-sp profile-heads`: the share of each head, as text, as JSON and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from causalrope_sp.heads.policy import HeadPolicy
from causalrope_sp.io.report_files import import_pyplot, save_plot
from causalrope_sp.profiling.head_search import Searched

Shares = Sequence[Sequence[float]]


def fields(shares: Shares, policy: HeadPolicy, searched: Searched | None, window: int | None) -> dict[str, Any]:
    """Returns the report as the fields of a JSON object.

    Args:
        shares: of each layer and head, the share of the newest frames of the attention mass outside the sink.
        policy: what was proposed.
        searched: what a search found, or None.
        window: the window of the stream, in latent frames; None where it is the whole video.
    """
    return {
        "shares": [[round(share, 4) for share in layer] for layer in shares],
        "heads": sum(map(len, shares)),
        "shortened": policy.shortened,
        "keys_seen": None if window is None else round(policy.share_of_frames(window), 4),
        "curve": None if searched is None else [(round(kept, 4), error) for kept, error in searched.curve],
    }


def text(found: dict[str, Any]) -> str:
    """Formats the report, of which `fields` returned the fields: a line of shares for each layer, then a sentence."""
    lines = [f"layer {n:2}  " + " ".join(f"{share:4.2f}" for share in layer) for n, layer in enumerate(found["shares"])]
    lines.append("(share of the newest frames of the attention mass outside the sink, head by head)")
    seen = "" if found["keys_seen"] is None else f"; heads see {found['keys_seen']:.0%} of the window's keys"
    error = "" if not found["curve"] else f"; relative squared error of the velocity {found['curve'][-1][1]:.2g}"
    return "\n".join([*lines, f"{found['shortened']} of {found['heads']} heads get a shorter window{seen}{error}."])


def plot(shares: Shares, policy: HeadPolicy, searched: Searched | None, path: Path) -> None:
    """Draws the shares as a map of layers and heads, with a mark on each head whose window is shortened; beside it,
    after a search, the error of the velocity over the share of keys.

    Args:
        shares: see `fields`.
        policy: what was proposed.
        searched: what a search found, or None.
        path: the .png, .svg or .pdf file to write.

    Raises:
        ConfigError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    pyplot = import_pyplot()
    size = 2 if searched is not None else 1
    figure, axes = pyplot.subplots(1, size, figsize=(5 * size, 3.6), constrained_layout=True, squeeze=False)
    image = axes[0][0].imshow(shares, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    marked = [(h, n) for n, layer in enumerate(policy.windows) for h, window in enumerate(layer) if window is not None]
    if marked:
        axes[0][0].scatter(*zip(*marked, strict=True), s=9, c="white", edgecolors="black", linewidths=0.5)
    axes[0][0].set(xlabel="head", ylabel="layer", title="share of the newest frames; dots: shortened")
    figure.colorbar(image, ax=axes[0][0])
    if searched is not None:
        kept, error = zip(*searched.curve, strict=True)
        axes[0][1].plot(kept, error, marker="o", markersize=3)
        axes[0][1].set(
            xlabel="keys seen", ylabel="relative squared error of the velocity", xlim=(1.02, min(kept) - 0.02)
        )
        axes[0][1].grid(alpha=0.3)
    save_plot(figure, path)
