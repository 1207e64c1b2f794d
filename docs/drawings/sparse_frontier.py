"""Draws docs/sparse_frontier.png from sparse_frontier.json.

python docs/drawings/sparse_frontier.py

The file has the form of the last line that `benchmarks/sparse.py` prints. Its rows were put together from several runs
of that command; benchmarks/LOG.md, *sparse attention against oracles*, says which rows are of which run.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).parent
LEFT_OUT = ("8 bits", "sums")  # they do not lie on the curve of attention alone


def main() -> None:
    rows = json.loads((HERE / "sparse_frontier.json").read_text())["rows"]
    figure, axis = pyplot.subplots(figsize=(9, 4.4), constrained_layout=True)
    for series in dict.fromkeys(row["series"] for row in rows if "series" in row):
        if series in LEFT_OUT:
            continue
        points = sorted((100 * row["keys"], row["psnr_db"]) for row in rows if row.get("series") == series)
        style = "--" if series.startswith("oracle") else "-"
        axis.plot(*zip(*points, strict=True), style, marker="o", markersize=4, label=series)
    axis.set(xlabel="keys seen over all passes, %", ylabel="PSNR against all keys, dB, mean of the prompts")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(HERE.parent / "sparse_frontier.png", dpi=110)


if __name__ == "__main__":
    main()
