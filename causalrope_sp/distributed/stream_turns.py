"""The turns of one stream, and the requests that ranks which only decode follow."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from causalrope_sp.distributed.turns import Pause, Turns, compare
from causalrope_sp.errors import RankLostError


class StreamTurns:
    """The turns of one stream: one a chunk, among the ranks that denoise.

    A rank that only decodes takes no turns. It hears a request a chunk from another rank, for which it waits in the
    rendezvous store and in no collective, so that the other rank may pause for as long as its caller likes.

    Args:
        turns: the turns of this rank.
        ranks: the ranks that denoise.
        ahead: whether a thread works ahead, so that no other call may come in between.

    Attributes:
        ahead: whether a thread works ahead.
        number: the number of the stream, in the order in which streams were opened, the same on all ranks.
        next: the next chunk to be taken.
    """

    def __init__(self, turns: Turns, ranks: Sequence[int], ahead: bool = False) -> None:
        self._turns, self.number = turns, turns.new_stream()
        self._ranks, self.ahead, self.next = ranks, ahead, 0
        self._requests = 0

    def taken(self) -> AbstractContextManager[None]:
        """Runs the body, which takes the chunks; tells the other ranks if it is left before its end."""
        return self._turns.leaving(self.number, lambda: self.next, self.ahead)

    @contextmanager
    def chunk(self, how: str = "") -> Iterator[None]:
        """Runs the body, which makes the next chunk, as soon as all ranks that denoise are about to make it.

        Args:
            how: words that follow those of the call, in which ranks must not differ.

        Raises:
            ConfigError, RankLostError: as `Turns.take` raises them.
        """
        with self._turns.take(self._call + how, self._ranks, self.number, self.next):
            yield
        self.next += 1

    def operation(self, what: str) -> AbstractContextManager[None]:
        """Runs the body, which changes the stream between two chunks, as soon as all ranks are about to change it so.

        Args:
            what: what happens to the stream, such as "changes its prompt".

        Raises:
            ConfigError, RankLostError: as `Turns.take` raises them.
        """
        return self._turns.take(f"{what} (stream {self.number})", self._ranks, self.number, self.next)

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Runs the body, which does this rank's part of the next chunk, on a rank that only decodes."""
        with self._turns.follow(self.number, self.next):
            yield
        self.next += 1

    def announce(self, ranks: Sequence[int], *fields: int) -> None:
        """Sends whole numbers to ranks that `hear` them, and waits for none of them."""
        text = json.dumps([self._turns.number, *fields])
        for rank in ranks:
            self._turns.board.put(self._key(rank), text)
        self._requests += 1

    def hear(self, source: int) -> list[int]:
        """Waits for what a rank announces, for as long as its caller likes, and catches up with its turns.

        Args:
            source: that rank, which denoises.

        Returns:
            The numbers that it announced.

        Raises:
            ConfigError: that rank is about to make another call.
            RankLostError: that rank has ended or failed, and will announce nothing.
        """
        board, key, pause = self._turns.board, self._key(self._turns.rank), Pause()
        while not board.has([key]):
            if pause.is_due():
                self._look_at(source, key)
            pause.sleep()
        self._turns.number, *fields = json.loads(board.texts([key])[0])
        board.remove(key)
        self._requests += 1
        return fields

    def _look_at(self, source: int, key: str) -> None:
        """Raises an error if the rank `source` will not announce the next chunk."""
        turns, board = self._turns, self._turns.board
        notice, coming = board.read(source), f"turn/{turns.number + 1}/{source}"
        call = board.texts([coming])[0] if board.has([coming]) else None
        if board.has([key]):  # it has been announced in the meantime
            return
        if notice is not None and (why := notice.ended or notice.left.get(self.number, (0, ""))[1]):
            raise RankLostError(f"rank {source} {why}, and rank {turns.rank} waits for its latents")
        if call is not None and call != self._call:
            turns.number += 1
            board.put(f"turn/{turns.number}/{turns.rank}", self._call)  # for the other ranks to see
            compare({source: call, turns.rank: self._call})

    def _key(self, rank: int) -> str:
        return f"request/{self.number}/{self._requests}/{rank}"

    @property
    def _call(self) -> str:
        return f"asks for chunk {self.next} of stream {self.number}"
