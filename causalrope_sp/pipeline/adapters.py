"""LoRAs that are added to a loaded pipeline and taken out again, under diffusers' names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from causalrope_sp.checks import check_number, check_text, shown
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import CausalRopeError, ConfigError
from causalrope_sp.pipeline.loading import Parts
from causalrope_sp.pipeline.open_streams import OpenStreams
from causalrope_sp.weights.digest import digest
from causalrope_sp.weights.dit_loader import checkpoint_digest, remerge
from causalrope_sp.weights.lora import Lora


class WithAdapters:
    """The methods of a pipeline that change its LoRAs between two streams. Every rank must call them.

    The parameters that LoRAs change are read again from the checkpoint, with the LoRAs merged, so that they have the
    checkpoint's bits again when the LoRAs are taken out. LoRAs of the loading options and of a pipeline.json stay.

    Attributes:
        parts: the loaded parts of the model.
        parallel: the ranks.
    """

    parts: Parts
    parallel: SequenceParallel
    _streams: OpenStreams
    _adapters: Mapping[str, tuple[Lora, bool]] = {}  # in order, each with whether it is merged
    _changed: frozenset[str] = frozenset()
    _digest: str | None = None

    @property
    def model_digest(self) -> str:
        """A hash of the transformer's files with the LoRAs that are merged, which does not depend on dtype and ranks.

        Raises:
            CheckpointError: the files cannot be read any more.
        """
        if self._digest is None:
            config, merged = self.parts.config, self._merged(self._adapters)
            self._digest = checkpoint_digest(config.transformer, merged)
            if config.transformer_2 is not None:
                both = f"{self._digest} {checkpoint_digest(config.transformer_2)}"
                self._digest = hashlib.blake2b(both.encode(), digest_size=8).hexdigest()
        return self._digest

    def load_lora_weights(self, path: str | os.PathLike[str] | Lora, adapter_name: str | None = None) -> None:
        """Adds a LoRA, DoRA, LoHa or LoKr to the transformer. Those that were loaded before stay.

        Args:
            path: its file or folder, also as FILE:WEIGHT, or a `Lora`.
            adapter_name: its name for `set_adapters`; None names it default_0, default_1, ...

        Raises:
            CheckpointError: the file cannot be read or does not fit; the model is as it was.
            ConfigError: the name is taken, or a stream is open.
        """
        lora = path if isinstance(path, Lora) else Lora.of(path)
        free = (f"default_{number}" for number in range(len(self._adapters) + 1))
        name = next(name for name in free if name not in self._adapters)
        name = name if adapter_name is None else check_text("adapter_name", adapter_name)
        if name in self._adapters:
            raise ConfigError(f"adapter_name must be new, and {name!r} is loaded: unload it, or take another name")
        self._change({**self._adapters, name: (lora, True)})

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Chooses the loaded LoRAs that are merged, and their weights; the others are taken out and stay loaded.

        Args:
            adapter_names: the names of those to merge.
            adapter_weights: one weight for all, or one for each; None keeps the present ones.

        Raises:
            ConfigError: a name is not loaded, a weight is no finite number, or a stream is open.
        """
        if not isinstance(adapter_names, Sequence):
            raise ConfigError(f"adapter_names must be a name or several, not {shown(adapter_names)}")
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(set(map(str, names))) < len(names):
            raise ConfigError(f"adapter_names must be different ones, not {shown(adapter_names)}")
        unknown = [name for name in names if name not in self._adapters]
        if unknown:
            raise ConfigError(f"adapter_names must be of {', '.join(self._adapters) or 'none'}, not {unknown[0]!r}")
        weights = list(adapter_weights) if isinstance(adapter_weights, Sequence) else [adapter_weights] * len(names)
        if len(weights) != len(names):
            raise ConfigError(f"adapter_weights must be {len(names)}, as many as the names, not {len(weights)}")
        chosen = {name: (lora, False) for name, (lora, _) in self._adapters.items()}
        for name, weight in zip(names, weights, strict=True):
            lora = chosen[name][0]
            weight = None if weight is None else check_number("adapter_weights", weight)
            chosen[name] = (lora if weight is None else replace(lora, weight=weight), True)
        self._change(chosen)

    def unload_lora_weights(self) -> None:
        """Takes out and forgets all LoRAs that were loaded by `load_lora_weights`.

        Raises:
            ConfigError: a stream is open.
        """
        self._change({})

    def get_active_adapters(self) -> list[str]:
        """Returns the names of the LoRAs that were loaded by `load_lora_weights` and are merged."""
        return [name for name, (_, active) in self._adapters.items() if active]

    def _change(self, adapters: Mapping[str, tuple[Lora, bool]]) -> None:
        """Merges other adapters; on an error the model is as it was."""
        if self.parts.low_noise is not None:
            raise ConfigError("a pipeline of two transformers takes no LoRA: each of the two has LoRAs of its own")
        if self._streams:
            raise ConfigError(
                f"the LoRAs of a pipeline cannot change under an open stream, and {len(self._streams)} are open: "
                "finish them, or call their close(), first"
            )
        with self.parallel.turn("changes its LoRAs"):
            try:
                changed = self._remerge(adapters)
            except CausalRopeError:
                self._remerge(self._adapters)
                raise
        self._adapters, self._changed, self._digest = dict(adapters), changed, None

    def _merged(self, adapters: Mapping[str, tuple[Lora, bool]]) -> list[str | os.PathLike[str] | Lora]:
        """The LoRAs that are merged, in order."""
        active = [lora for lora, merged in adapters.values() if merged]
        return [*self.parts.config.loras, *self.parts.options.loras, *active]

    def _remerge(self, adapters: Mapping[str, tuple[Lora, bool]]) -> frozenset[str]:
        parts, denoisers = self.parts, self.parallel.denoisers
        loras = self._merged(adapters)

        def merge() -> frozenset[str]:
            if self.parallel.decodes:
                return frozenset()
            return remerge(parts.model, parts.config.transformer, loras, self._changed, denoisers)

        changed = self.parallel.everyone.run_collectively(merge)
        if not self.parallel.decodes and denoisers.size > 1:
            denoisers.agree({"weights": digest(parts.model)})
        return changed
