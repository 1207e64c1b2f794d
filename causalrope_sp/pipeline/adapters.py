"""LoRAs that are added to a loaded pipeline and taken out again, under diffusers' names, also under open streams."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from causalrope_sp.checks import check_flag, check_number, check_text, shown
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import ConfigError
from causalrope_sp.pipeline.experts import loras_of_models
from causalrope_sp.pipeline.live_weights import between_chunks, change_weights
from causalrope_sp.pipeline.loading import Parts
from causalrope_sp.pipeline.open_streams import OpenStreams
from causalrope_sp.weights.digest import digest
from causalrope_sp.weights.dit_loader import Remerge, checkpoint_digest
from causalrope_sp.weights.lora import EXPERTS, Lora

_log = logging.getLogger(__name__)
Adapters = Mapping[str, tuple[Lora, bool]]
_NONE: Adapters = {}
P = ParamSpec("P")
T = TypeVar("T")


def _by_one_thread(
    method: Callable[Concatenate[WithAdapters, P], T],
) -> Callable[Concatenate[WithAdapters, P], T]:
    """Lets one thread at a time call the methods that change LoRAs, each of which goes on from those before it."""

    @wraps(method)
    def alone(self: WithAdapters, *args: P.args, **kwargs: P.kwargs) -> T:
        if not self._streams.changing.acquire(blocking=False):
            raise ConfigError("another thread changes the LoRAs of this pipeline: let one thread at a time do so")
        try:
            return method(self, *args, **kwargs)
        finally:
            self._streams.changing.release()

    return alone


class WithAdapters:
    """The methods of a pipeline that change its LoRAs. Every rank must call them.

    The parameters that LoRAs change are read again from the checkpoint, with the LoRAs merged, so that they have the
    checkpoint's bits again when the LoRAs are taken out. LoRAs of the loading options and of a pipeline.json stay.

    Open streams go on with the new weights from the next chunk that is made. The keys and values of the chunks before
    it stay those of the old weights, or with `recache` are computed anew under the new ones, from the clean latents of
    the window and its sink. Chunks that are taken back across the change are made again with the new weights.

    Attributes:
        parts: the loaded parts of the model.
        parallel: the ranks.
    """

    parts: Parts
    parallel: SequenceParallel
    _streams: OpenStreams
    _adapters: Adapters = _NONE  # in order, each with whether it is merged
    _changed: Sequence[frozenset[str]] = ()  # by transformer, the parameters that these change
    _digest: str | None = None

    @property
    def model_digest(self) -> str:
        """A hash of the transformers' files with the LoRAs that are merged, which does not depend on dtype and ranks.

        Raises:
            CheckpointError: the files cannot be read any more.
        """
        if self._digest is None:
            paths = self.parts.config.transformers
            digests = [checkpoint_digest(*each) for each in zip(paths, self._loras(self._adapters), strict=True)]
            both = hashlib.blake2b(" ".join(digests).encode(), digest_size=8).hexdigest()
            self._digest = digests[0] if len(digests) == 1 else both
        return self._digest

    @property
    def merged_loras(self) -> tuple[str, ...]:
        """The LoRAs that are merged, as texts, in order."""
        return tuple(map(str, self._merged(self._adapters)))

    @_by_one_thread
    def load_lora_weights(
        self,
        path: str | os.PathLike[str] | Lora,
        adapter_name: str | None = None,
        *,
        load_into_transformer_2: bool | None = None,
        recache: bool = False,
    ) -> list[int]:
        """Adds a LoRA, DoRA, LoHa or LoKr to the transformer. Those that were loaded before stay.

        Args:
            path: its file or folder, also as FILE:WEIGHT, or a `Lora`.
            adapter_name: its name for `set_adapters`; None names it default_0, default_1, ...
            load_into_transformer_2: of two transformers, whether it is of the one of the steps at low noise; None takes
                what the `Lora`, or the name of its file, says.
            recache: whether open streams compute the keys and values of their windows anew under the new weights.

        Returns:
            Of each open stream, in the order in which they were opened, the number of the first chunk that is made with
            the new weights.

        Raises:
            CheckpointError: the file cannot be read or does not fit; model and streams are as they were.
            ConfigError: the name is taken, nothing says of which of two transformers the LoRA is, or a stream cannot
                be changed while it is open.
        """

        def wanted() -> Adapters:
            lora = Lora.of(path)
            if load_into_transformer_2 is not None:
                lora = replace(lora, expert=EXPERTS[check_flag("load_into_transformer_2", load_into_transformer_2)])
            free = (f"default_{number}" for number in range(len(self._adapters) + 1))
            name = next(name for name in free if name not in self._adapters)
            name = name if adapter_name is None else check_text("adapter_name", adapter_name)
            if name in self._adapters:
                raise ConfigError(f"adapter_name must be new, and {name!r} is loaded: unload it, or take another name")
            return {**self._adapters, name: (lora, True)}

        return self._change(wanted, recache)

    @_by_one_thread
    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: float | Sequence[float] | None = None,
        *,
        recache: bool = False,
    ) -> list[int]:
        """Chooses the loaded LoRAs that are merged, and their weights; the others are taken out and stay loaded.

        Args:
            adapter_names: the names of those to merge.
            adapter_weights: one weight for all, or one for each; None keeps the present ones.
            recache: as for `load_lora_weights`.

        Returns:
            As `load_lora_weights`.

        Raises:
            ConfigError: a name is not loaded, a weight is no finite number, or a stream cannot be changed while it is
                open.
        """
        return self._change(lambda: self._chosen(adapter_names, adapter_weights), recache)

    def _chosen(self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None) -> Adapters:
        """The loaded LoRAs, those of `set_adapters` merged."""
        if not isinstance(adapter_names, Sequence):
            raise ConfigError(f"adapter_names must be a name or several, not {shown(adapter_names)}")
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(set(map(str, names))) < len(names):
            raise ConfigError(f"adapter_names must be different ones, not {shown(adapter_names)}")
        unknown = [name for name in names if not isinstance(name, str) or name not in self._adapters]
        if unknown:
            loaded = ", ".join(self._adapters) or "none"
            raise ConfigError(f"adapter_names must be of the loaded LoRAs, {loaded}, not {shown(unknown[0])}")
        weights = list(adapter_weights) if isinstance(adapter_weights, Sequence) else [adapter_weights] * len(names)
        if len(weights) != len(names):
            raise ConfigError(f"adapter_weights must be {len(names)}, as many as the names, not {len(weights)}")
        chosen = {name: (lora, False) for name, (lora, _) in self._adapters.items()}
        for name, weight in zip(names, weights, strict=True):
            lora = chosen[name][0]
            weight = None if weight is None else check_number("adapter_weights", weight)
            chosen[name] = (lora if weight is None else replace(lora, weight=weight), True)
        return chosen

    @_by_one_thread
    def unload_lora_weights(self, *, recache: bool = False) -> list[int]:
        """Takes out and forgets all LoRAs that were loaded by `load_lora_weights`.

        Args:
            recache: as for `load_lora_weights`.

        Returns:
            As `load_lora_weights`.

        Raises:
            ConfigError: a stream cannot be changed while it is open.
        """
        return self._change(dict, recache)

    def get_active_adapters(self) -> list[str]:
        """Returns the names of the LoRAs that were loaded by `load_lora_weights` and are merged."""
        return [name for name, (_, active) in self._adapters.items() if active]

    def _change(self, wanted: Callable[[], Adapters], recache: bool) -> list[int]:
        """Merges other adapters; on an error the model is as it was.

        Args:
            wanted: checks the arguments of the call and returns all adapters; an error of one rank is raised on all.
            recache: as for `load_lora_weights`.

        Returns:
            The next chunk of each open stream.
        """

        def checked() -> Adapters:
            check_flag("recache", recache)
            return wanted()

        with between_chunks(self._streams, self.parallel, "changes its LoRAs") as loops:
            adapters = self.parallel.everyone.run_collectively(checked)
            self.parallel.everyone.agree({"recache": recache})
            new = self._opened(adapters)
            changed = [each.parameters for each in new]
            change_weights(
                loops,
                lambda: self._write(new, self._changed),
                lambda: self._write(self._opened(self._adapters), changed),
                recache=recache,
            )
            self._adapters, self._changed, self._digest = dict(adapters), changed, None
            starts = [loop.chunks_made for loop in loops]
        if starts and self.parallel.rank == 0:
            _log.info("LoRAs of open streams are %s from chunks %s on", ", ".join(self.merged_loras) or "none", starts)
        return starts

    def _merged(self, adapters: Adapters) -> list[Lora]:
        """The LoRAs that are merged, in order."""
        active = [lora for lora, merged in adapters.values() if merged]
        return [*self.parts.config.loras, *map(Lora.of, self.parts.options.loras), *active]

    def _loras(self, adapters: Adapters) -> list[list[Lora]]:
        """The LoRAs that are merged, of each transformer."""
        return loras_of_models(self._merged(adapters), len(self.parts.config.transformers))

    def _opened(self, adapters: Adapters) -> list[Remerge]:
        """Opens adapters and matches them to each transformer; none on a rank that only decodes."""
        loras = self.parallel.everyone.run_collectively(lambda: self._loras(adapters))
        if self.parallel.decodes:
            return []
        models = zip(self.parts.models, self.parts.config.transformers, loras, strict=True)
        return [Remerge(model, path, own, self.parallel.denoisers) for model, path, own in models]

    def _write(self, merges: Sequence[Remerge], changed: Sequence[frozenset[str]]) -> None:
        """Merges adapters into each transformer, of which earlier ones have changed some parameters."""
        for number, merge in enumerate(merges):
            merge.write(changed[number] if changed else ())
        if not self.parallel.decodes and self.parallel.denoisers.size > 1:
            self.parallel.denoisers.agree({"weights": tuple(map(digest, self.parts.models))})
