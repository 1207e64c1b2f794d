"""The embedded toybox models: scenes, prompt grammar, text encoder and weights."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
EMBEDDED = (
    "toybox",
    "toybox-flow",
    "toybox-vin",
)  # names of the models; each has a pipeline.json, NAME.json, in WEIGHTS
