"""Draws docs/toybox_training.png from toybox_training.csv: python docs/drawings/toybox_training.py

The log of that run was not kept. The points were read back from the plot that the run itself drew, to about ±0.002;
steps at which one curve covered another are missing.
"""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).parent
TITLES = {"teacher": "Teacher (toybox-flow)", "student": "Student (toybox)"}
CHUNKS = {"first": "first chunk of a video", "later": "later chunks, from the frames before them"}


def main() -> None:
    with open(HERE / "toybox_training.csv", newline="") as file:
        points = list(csv.DictReader(file))
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    for axis, (stage, title) in zip(axes, TITLES.items(), strict=True):
        for chunk, label in CHUNKS.items():
            seen = [p for p in points if (p["stage"], p["chunk"]) == (stage, chunk)]
            axis.plot([int(p["step"]) for p in seen], [float(p["error"]) for p in seen], label=label)
        axis.set(title=title, xlabel="training step", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean square error of the velocity\nat pure noise (normalised latents)")
    axes[0].legend(loc="lower left")
    figure.savefig(HERE.parent / "toybox_training.png", dpi=110)


if __name__ == "__main__":
    main()
