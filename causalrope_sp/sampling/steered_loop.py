"""A stream of latents that is steered between two chunks: its text changes, chunks are taken back, and it is forked.

Shapes: B batch, F latent frames, C channels, H×W latent size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from causalrope_sp.diffusion.noise import Noise
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk
from causalrope_sp.sampling.chunk import LatentChunk, check_text
from causalrope_sp.sampling.chunk_loop import ChunkLoop
from causalrope_sp.sampling.guidance import CONDITIONAL, UNCONDITIONAL, GuidanceBranch
from causalrope_sp.sampling.pass_inputs import Part
from causalrope_sp.sampling.recompute import newest_is_sink, recompute_all, recompute_window
from causalrope_sp.sampling.settled import SettledWeights


class SteeredLoop(ChunkLoop):
    """A `ChunkLoop` whose text can change, whose chunks can be taken back, and that can be forked.

    Attributes:
        later_texts: the embeddings of the chunks after the next one while the text changes over several, each with
            `recache` and `recache_sink` of `set_text`.
        text: the embeddings of the next chunk.
    """

    def __init__(self, *arguments: Any) -> None:
        _, self.text, *_ = arguments
        super().__init__(*arguments)
        self.later_texts: list[tuple[Tensor, bool, bool]] = []
        self._unreturned: LatentChunk | None = None  # a chunk that was made before its step was cut short
        self._texts_at: dict[int, tuple[Tensor, list[tuple[Tensor, bool, bool]]]] = {}  # by chunk: its text, later ones

    def step(self, control: Tensor | None = None) -> LatentChunk:
        """Makes the next chunk; see `ChunkLoop.step`."""
        if self._unreturned is not None and control is not None:
            self.check_made_under(self._unreturned.chunk, control)
        output, self._unreturned = self._unreturned, None
        if output is None:
            made_under = self.text, list(self.later_texts)
            output = super().step(control)
            oldest = min(part.chunk.index for part in self.kept.newest())
            self._texts_at = {index: at for index, at in self._texts_at.items() if index >= oldest}
            self._texts_at[output.chunk.index] = made_under
        if self.later_texts:
            try:
                self._change_text(*self.later_texts[0])
            except BaseException:
                self._unreturned = output
                raise
            self.later_texts.pop(0)
        return output

    def check_made_under(self, chunk: Chunk, control: Tensor) -> None:
        """Raises ConfigError unless a chunk that was made already, by a call that failed later, has this control."""
        given, part = self.control_of(chunk, control), self.kept.part(chunk.index)
        assert given is not None, "`control_of` refuses a control that the model does not take"
        assert part is not None, "the newest chunk is kept"
        assert part.control_BFSE is not None, "every chunk of the model has one"
        if not self.parallel.denoisers.all_say(torch.equal(given, part.control_BFSE)):
            raise ConfigError(
                f"control must be the one that chunk {chunk.index - self.first_chunk} was made under before the call "
                "failed, or None: the chunk is made already"
            )

    def set_text(
        self,
        texts: Sequence[Tensor],
        *,
        recache: bool = True,
        recache_sink: bool = False,
        new_shot: bool = False,
    ) -> None:
        """Gives the following chunks another text.

        Args:
            texts: embeddings, (B, text_len, text_dim), the same on all ranks: one for each of the next chunks, of which
                the last holds from there on.
            recache: whether the keys and values of the window are computed anew under each text, from its clean
                latents, chunk by chunk. Without, those of the chunks so far stay as they are.
            recache_sink: whether those of the sink are computed anew too.
            new_shot: whether the next frames become the sink, in place of the present one.

        Raises:
            ConfigError: embeddings do not fit the model, or differ between ranks.
        """
        for embeds in texts:
            check_text(self.model, embeds, self.context.grid)
            self.agree("text", embeds)
        first, *later = texts
        self._change_text(first, recache, recache_sink)
        self.later_texts = [(embeds, recache, recache_sink) for embeds in later]
        if new_shot:
            for each in self.branches.branches:
                cache = each.stream.cache
                cache.window = cache.window.shot(self.position[1])

    def _change_text(self, embeds: Tensor, recache: bool, recache_sink: bool) -> None:
        """Changes the text from the next chunk on. If that is cut short, the text before holds again, and the cache is
        computed anew under it."""
        branches = self.branches.of(CONDITIONAL)
        try:
            for branch in branches:
                if not recache or (not recache_sink and newest_is_sink(branch, self.kept)):
                    branch.commit()
                branch.stream.set_text(embeds)
                if recache:
                    recompute_window(branch, self.kept, self.position[1], with_sink=recache_sink)
        except BaseException:
            for branch in branches:
                branch.stream.set_text(self.text)
                self._compute_anew(branch)
            raise
        self.text = embeds

    def renew_weights(self, settled: tuple[SettledWeights, ...], *, recache: bool) -> None:
        """Goes on with weights of the models that have changed in place; the next chunk is the first one under them.

        Args:
            settled: how each model is computed now.
            recache: whether the keys and values of the window and its sink are computed anew under the new weights,
                from the clean latents. Without, those of the chunks so far stay as they are, and the pending context
                pass must have run before the weights changed.
        """
        self.settled = settled
        for which, text in ((CONDITIONAL, self.text), (UNCONDITIONAL, self.options.negative_embeds)):
            for branch, weights in zip(self.branches.of(which), settled, strict=False):
                assert text is not None, "both branches have a text"
                branch.stream.renew_weights(weights, text)
                if recache:
                    recompute_window(branch, self.kept, self.position[1], with_sink=True)
                else:
                    branch.stream.cache.forget_history()

    def rewind(self, chunks: int, embeds: Tensor) -> bool:
        """Takes the last chunks back.

        If that is cut short, none is taken back, and the cache is computed anew.

        Args:
            chunks: how many, at most `chunks_made`.
            embeds: the text of the chunk before them, if the stream does not know it, since it was resumed later.

        Returns:
            Whether the stream is as it was, bit for bit. If not, its cache was computed anew from the clean latents
            that are kept.

        Raises:
            ConfigError: no latents are kept from which to go on.
        """
        first = self.position[0] - chunks
        before, start = self._rewind_to(first)
        text, later = self._texts_at.get(first - 1, (embeds, []))
        was = self.kept.fork(), self.next_chunk, [b.stream.cache.window for b in self.branches.branches]
        self.kept.drop(start)
        try:
            self.next_chunk = self.chunk_at(first, start)
            self._set_text(text)
            exact = self._take_back(first, before, start)
        except BaseException:
            self.kept, self.next_chunk, windows = was
            self._set_text(self.text)
            for branch, window in zip(self.branches.branches, windows, strict=True):
                branch.stream.cache.window = window
                self._compute_anew(branch)
            raise
        self.text, self.later_texts, self.unread, self._unreturned = text, list(later), None, None
        if self.later_texts:
            self._change_text(*self.later_texts.pop(0))
        return self.parallel.denoisers.all_say(exact)

    def _set_text(self, embeds: Tensor) -> None:
        for branch in self.branches.of(CONDITIONAL):
            branch.stream.set_text(embeds)

    def _take_back(self, first: int, before: Part | None, start: int) -> bool:
        """Lets every branch stand where it stood before the chunk `first`; returns whether all is as it was."""
        initial, exact = self.options.initial_latents, True
        if first == self.first_chunk and initial is not None:
            for branch in self.branches.branches:
                window = branch.stream.cache.window.before(0).since(0, 0)
                branch.recompute([], window, 0)
            self.kept.drop(0)
            self._commit_initial(initial)
            return True
        for branch in self.branches.branches:
            stream = branch.stream
            window = stream.cache.window.before(start)
            if before is not None and stream.cache.can_rewind(before.chunk):
                branch.rewind(before, window)
            else:
                stream.cache.window = window
                whole = self._compute_anew(branch)
                exact &= whole and first == self.first_chunk
        return exact

    def compute_anew(self) -> None:
        """Computes the caches anew from the latents that are kept, under the present text."""
        for branch in self.branches.branches:
            self._compute_anew(branch)

    def resume(self, branch: GuidanceBranch, oldest: int, kept_shot: int, pending: tuple[int, int] | None) -> None:
        """Lets a branch of a resumed stream stand where it stood, before its cache is filled.

        Args:
            branch: one of `branches`.
            oldest: frames before this global time index are not in its window, but for a sink.
            kept_shot: where a shot begins; the sinks of shots before it are not in the window.
            pending: the first frame of the newest chunk whose context pass has yet to run, and the frame after its last
                one; None if all were written.
        """
        part, last = None, self.kept.last
        if pending is not None:
            assert last is not None, "what is pending is of the newest chunk"
            start, stop = pending
            part = last.cut(start, stop - start)
        window = replace(branch.stream.cache.window, oldest=oldest, kept_shot=kept_shot)
        branch.resume(window, self.position[1], part)

    def chunk_before(self, chunks: int) -> Chunk:
        """Returns the chunk that comes next once so many are taken back.

        Raises:
            ConfigError: no latents are kept from which to go on.
        """
        first = self.position[0] - chunks
        chunk = self.chunk_at(first, self._rewind_to(first)[1])
        assert chunk is not None, "a chunk that was made comes again"
        return chunk

    def latents_before(self, stop: int, first: int, most: int) -> Tensor:
        """Returns clean latents that are kept, (B, F, C, H, W), whole, on every rank. All ranks must call.

        Args:
            stop: the global time index of the frame after the last one.
            first: the global time index before which none are wanted.
            most: the most frames to return.
        """
        parts = [part for part in self.kept.newest() if part.chunk.stop <= stop][-most:]  # of a frame or more each
        tokens = torch.cat([part.tokens_BFSE for part in parts], 1)[:, -most:]
        tokens = tokens[:, -max(1, stop - first) :]
        grid = self.context.grid
        return grid.unpatchify(self.parallel.gather_tokens(tokens.contiguous(), grid))

    def _rewind_to(self, first: int) -> tuple[Part | None, int]:
        """The chunk before the chunk `first`, and where that one starts."""
        if first == 0:
            return None, 0
        if first == self.first_chunk and self.options.initial_latents is not None:
            return None, self.options.initial_latents.shape[1]
        before = self.kept.part(first - 1)
        if before is None:
            raise ConfigError(f"cannot rewind to chunk {first - self.first_chunk}: its latents are not kept any more")
        return before, before.chunk.stop

    def fork(self, noise: Noise | None = None) -> SteeredLoop:
        """Returns a stream that goes on from here by itself.

        Args:
            noise: its noise; None takes this stream's.
        """
        fork = copy.copy(self)
        fork.branches, fork.kept, fork.later_texts = self.branches.fork(), self.kept.fork(), list(self.later_texts)
        fork._texts_at = dict(self._texts_at)
        if noise is not None:
            fork.noise, fork.drawn = noise, False
        return fork

    def _compute_anew(self, branch: GuidanceBranch) -> bool:
        return recompute_all(branch, self.kept, self.position[1])
