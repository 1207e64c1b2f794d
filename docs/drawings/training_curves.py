"""Draws docs/toybox_training.png from toybox_training.csv, the log of the training that made the shipped toybox.

python docs/drawings/training_curves.py
"""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).parent
CHUNKS = {
    "first": "the first chunk",
    "second": "the second chunk",
    "later": "later chunks, after frames of the scene",
    "own": "later chunks, after frames of its own",
}

CHANGES = {17000: "20480 scenes", 27400: "36864", 38649: "25600"}  # what was trained on from which step


def main() -> None:
    with open(HERE / "toybox_training.csv", newline="") as file:
        points = list(csv.DictReader(file))
    figure, axis = pyplot.subplots(figsize=(9, 3.6), constrained_layout=True)
    for chunk, label in CHUNKS.items():
        seen = [(int(point["step"]), float(point[chunk])) for point in points if point[chunk]]
        axis.plot(*zip(*seen, strict=True), label=label, linewidth=1)
    for step, change in CHANGES.items():
        axis.axvline(step, color="grey", linewidth=1, linestyle="--")
        axis.annotate(change, (step, 0.38), xytext=(6, 0), textcoords="offset points")
    axis.set(xlabel="training step", ylabel="mean square error of the velocity\nat pure noise", ylim=(0, 0.4))
    axis.grid(alpha=0.3)
    axis.legend(ncols=2)
    figure.savefig(HERE.parent / "toybox_training.png", dpi=110)


if __name__ == "__main__":
    main()
