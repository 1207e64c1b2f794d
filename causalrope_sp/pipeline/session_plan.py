"""The plan of a session: how its ranks share attention, and whether it fits into memory beside the open ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from causalrope_sp.config import StreamConfig
from causalrope_sp.diffusion.schedule import guided_steps
from causalrope_sp.distributed.layout import Layout
from causalrope_sp.pipeline.loading import choose_layout, describe_for
from causalrope_sp.pipeline.open_streams import OpenStreams
from causalrope_sp.pipeline.preflight import Run, check_memory
from causalrope_sp.pipeline.stream_settings import StreamSettings

if TYPE_CHECKING:
    from causalrope_sp.pipeline.pipeline import CausalVideoPipeline


@dataclass(frozen=True)
class SessionPlan:
    """The plan of a session.

    Args:
        pipe: the pipeline.
        streams: its open streams.
        run: what the session runs, with its history.
        layout: how the ranks share attention.
    """

    pipe: CausalVideoPipeline
    streams: OpenStreams
    run: Run
    layout: Layout

    @classmethod
    def of(
        cls,
        pipe: CausalVideoPipeline,
        streams: OpenStreams,
        settings: StreamSettings,
        stream: StreamConfig,
        history: int,
        kept_chunks: int,
    ) -> SessionPlan:
        """Takes the layout that was chosen at loading, or for another size or guidance a new one. All ranks must call.

        Args:
            pipe: the pipeline.
            streams: its open streams.
            settings: size and sampler of the session.
            stream: its chunks and window.
            history: how many chunks can be taken back, those that are made ahead counted.
            kept_chunks: of how many chunks beyond the window latents are kept.

        Raises:
            ConfigError: the session is predicted not to fit into memory, or the strategy cannot use these ranks.
        """
        parts, parallel, own = pipe.parts, pipe.parallel, pipe.settings()
        guided = [any(guided_steps(sampler)) for sampler in (own.sampler, settings.sampler)]
        same = own.grid == settings.grid and guided[0] == guided[1] and pipe.config.stream == stream
        run = parts.run
        if run is None or not same:
            config = replace(
                pipe.config,
                height=settings.height,
                width=settings.width,
                sampler=settings.sampler,
                stream=stream,
            )
            run = describe_for(config, parts.options, parallel)
        run = replace(run, work=replace(run.work, history=history, kept_chunks=kept_chunks))
        if same:
            run = replace(run, strategy=parts.layout.name)
        plan = cls(pipe, streams, run, parts.layout)
        parallel.everyone.run_collectively(plan.check)  # always: what is open may differ between the ranks
        return plan if same else replace(plan, layout=choose_layout(run, parallel))

    def check(self) -> None:
        """Checks that one more session of this plan fits into the memory of this rank beside the open ones.

        Raises:
            ConfigError: it does not.
        """
        if self.pipe.parts.options.preflight:
            run = replace(self.run, other_sessions=self.streams.planned_bytes)
            check_memory(run, self.pipe.parallel, self.streams.held_bytes)

    @cached_property
    def bytes(self) -> int:
        """What a session keeps on this rank between two chunks once its window is full."""
        return 0 if self.pipe.parallel.decodes else self.run.plan().session.bytes
