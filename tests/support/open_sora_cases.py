"""Open-Sora's reference cases: their model, settings and tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.reuse import After, Broadcast, ReusePolicy
from causalrope_sp.reuse.policy import Rule
from causalrope_sp.spatiotemporal.open_sora import OpenSoraDiT, load_open_sora, packed
from causalrope_sp.spatiotemporal.open_sora.sampling import sample, timesteps

WEIGHTS = "weights-open-sora.safetensors"


@dataclass(frozen=True)
class OpenSoraCase:
    """A case: its settings, and its tensors by name."""

    settings: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def load(cls, path: Path) -> OpenSoraCase:
        """Loads a case."""
        with safe_open(path, "pt") as file:
            return cls(json.loads(file.metadata()["case"]), load_file(path))

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The timesteps of the passes, by the library's rule."""
        return timesteps(*(self.settings[name] for name in ("steps", "height", "width", "num_frames")))

    @property
    def texts(self) -> tuple[list[Tensor], list[Tensor]]:
        """The prompt and the null text, without padding."""
        mask = self.tensors["mask"][None]
        return packed(self.tensors["prompt_embeds"], mask), packed(self.tensors["null_embeds"], mask)

    @property
    def noise(self) -> Tensor:
        """The start, (1, F, C, H, W)."""
        return self.tensors["noise"].transpose(1, 2)

    @property
    def latents(self) -> Tensor:
        """The result to match, (1, F, C, H, W)."""
        return self.tensors["latents"].transpose(1, 2)

    @property
    def policy(self) -> ReusePolicy | None:
        """The policy of the case, from its settings."""
        pab = self.settings.get("pab")
        if pab is None:
            return None
        window, ranges = tuple(pab["window"]), pab["ranges"]
        kinds = (("self", "spatial"), ("temporal", "temporal"), ("cross", "cross"), ("temporal-cross", "cross"))
        rules: list[Rule] = [Broadcast(kind, ranges[name], window) for kind, name in kinds]  # type: ignore[arg-type]
        (shared,) = {(rule["skip_count"], *rule["block"]) for rule in pab["mlp"].values()}
        after, *blocks = shared
        keys = tuple(map(float, pab["mlp"]))
        rules += [After("mlp", keys, after, tuple(blocks)), After("temporal-mlp", keys, after, tuple(blocks))]
        return ReusePolicy(tuple(rules), pab["stored"])

    def run(
        self, model: OpenSoraDiT, parallel: SequenceParallel | None = None, reuse: ReusePolicy | None = None
    ) -> Tensor:
        """Samples the case."""
        return sample(
            model,
            self.noise,
            *self.texts,
            timesteps=self.timesteps,
            guidance_scale=self.settings["guidance_scale"],
            fps=self.settings["fps"],
            given=self.settings.get("given_frames", 0),
            parallel=parallel,
            reuse=reuse,
        )


def write_model(cases: Path, folder: Path) -> Path:
    """Writes the cases' weights and config as a published folder has them, and returns the folder."""
    weights = cases / WEIGHTS
    with safe_open(weights, "pt") as file:
        config = {"model_type": "STDiT3", **json.loads(file.metadata()["config"])}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(load_file(weights), folder / "model.safetensors")
    return folder


def load_model(folder: Path) -> OpenSoraDiT:
    """Loads the model that `write_model` wrote, in float64."""
    return load_open_sora(folder, dtype=torch.float64)
