"""The embedded default model: its scenes, its prompt grammar, its text encoder and its weights."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
EMBEDDED = ("toybox", "toybox-flow", "toybox-vin")  # the models by name; each has a recipe NAME.json in WEIGHTS
