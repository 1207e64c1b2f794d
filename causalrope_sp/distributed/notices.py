"""What each rank tells the others through the rendezvous store: signs of life, and how it left a stream or ended."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch.distributed import PrefixStore, ProcessGroup, Store  # type: ignore[attr-defined]

from causalrope_sp.errors import RankLostError, first_line, printable

KEPT = 16  # streams whose end a notice still tells
DONE = "has closed its group of ranks"
EXITED = "has ended its program"


@dataclass(frozen=True)
class Failure:
    """A turn that an error cut short on a rank.

    Args:
        turn: the turn's number (see `turns`).
        begun: how many collectives the rank has started in all.
        why: what it raised.
    """

    turn: int
    begun: int
    why: str


@dataclass(frozen=True)
class Notice:
    """What a rank last told of itself.

    Args:
        beat: a number that grows as long as the rank is alive.
        begun: how many collectives it has reached.
        ended: how it ended, in words that follow its name; empty while it goes on.
        failure: the last turn that an error cut short; None without one.
        left: for streams that it left before their end, the first chunk that it did not get, and how it left, in words
            that follow its name.
    """

    beat: int = 0
    begun: int = 0
    ended: str = ""
    failure: Failure | None = None
    left: Mapping[int, tuple[int, str]] = field(default_factory=dict)

    def as_text(self) -> str:
        """Returns the notice as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> Notice:
        """Reads what `as_text` wrote."""
        fields: dict[str, Any] = json.loads(text)
        failure, left = fields.pop("failure"), fields.pop("left")
        return cls(
            **fields,
            failure=None if failure is None else Failure(**failure),
            left={int(stream): (chunk, why) for stream, (chunk, why) in left.items()},
        )


class NoticeBoard:
    """The notices of all ranks in the rendezvous store. Any thread may use it.

    Args:
        store: the store; it must answer every request at once.
        rank: this rank.
        size: how many ranks there are.
        holder: who holds the store, for a message.
    """

    def __init__(self, store: Store, rank: int, size: int, holder: str = "another rank") -> None:
        self._store: Any = store  # its type stubs lack half of its methods
        self._rank, self._holder = rank, holder
        self._lock = threading.RLock()  # a stream that garbage collection closes may post within a post
        self._own, self._answers = Notice(), True
        self.others = [other for other in range(size) if other != rank]
        self.last: dict[int, Notice] = {}  # what was last read of each rank

    @classmethod
    def of_group(cls, group: ProcessGroup) -> NoticeBoard:
        """Makes a board in the store of a process group, apart from those of other objects around the same group."""
        store, rank = group.get_group_store(), group.rank()
        number = store.add(f"causalrope/{rank}", 1)  # how many of them this rank has made
        return cls(PrefixStore(f"causalrope/{number}", store), rank, group.size())

    @property
    def alone(self) -> bool:
        """Whether all other ranks have told their end, so that nobody reads this one's notices."""
        return all(rank in self.last and self.last[rank].ended for rank in self.others)

    def beat(self, begun: int) -> None:
        """Gives a sign of life, with the number of collectives that this rank has reached.

        Raises:
            RankLostError: the store does not answer.
        """
        self._post(lambda own: replace(own, beat=own.beat + 1, begun=begun))

    def leave(self, stream: int, chunk: int, why: str) -> None:
        """Tells that this rank takes no chunk of a stream from `chunk` on, and why, if the store still answers."""
        with suppress(RankLostError):
            self._post(lambda own: replace(own, left=dict([*own.left.items(), (stream, (chunk, why))][-KEPT:])))

    def fail(self, failure: Failure) -> None:
        """Tells that an error cut a turn short, if the store still answers."""
        with suppress(RankLostError):
            self._post(lambda own: replace(own, failure=failure))

    def end(self, why: str, begun: int) -> None:
        """Tells that this rank makes no more calls, if the store still answers. Only the first reason counts."""
        with suppress(RankLostError):
            self._post(lambda own: own if own.ended else replace(own, ended=why, begun=begun))

    def read(self, rank: int) -> Notice | None:
        """Returns a rank's notice, or None if it has given none yet.

        Raises:
            RankLostError: the store does not answer.
        """
        key, last = f"notice/{rank}", self.last.get(rank)
        if last is not None and last.ended:
            return last  # it tells nothing more, and the store may have gone with it
        if not self.has([key]):
            return None
        self.last[rank] = Notice.of(self.texts([key])[0])
        return self.last[rank]

    def last_words(self, rank: int) -> str | None:
        """Returns what a rank told last of an error or its end, in words that follow its name, or None."""
        try:
            notice = self.read(rank)
        except RankLostError:  # the store has gone with the rank
            notice = self.last.get(rank)
        if notice is None:
            return None
        return notice.ended or (None if notice.failure is None else notice.failure.why)

    def put(self, key: str, text: str) -> None:
        """Sets a key of the store. All requests raise RankLostError if the store does not answer."""
        self._ask(lambda: self._store.set(key, text))

    def has(self, keys: list[str]) -> bool:
        """Returns whether the store has all these keys."""
        return bool(self._ask(lambda: self._store.check(keys)))

    def texts(self, keys: list[str]) -> list[str]:
        """Returns the values of keys that the store has."""
        return [value.decode() for value in self._ask(lambda: self._values(keys))]

    def remove(self, key: str) -> None:
        """Removes a key from the store, if it is there."""
        self._ask(lambda: self._store.delete_key(key))

    def _values(self, keys: list[str]) -> list[bytes]:
        if self._store.has_extended_api():
            values: list[bytes] = self._store.multi_get(keys)  # one request in place of many
            return values
        return [self._store.get(key) for key in keys]

    def _ask(self, request: Callable[[], Any]) -> Any:
        """Returns the store's answer. Raises RankLostError without one, which names a rank that has told its end."""
        try:
            if not self._answers:
                raise RuntimeError("it did not before")
            return request()
        except RuntimeError as error:
            self._answers = False
            told = next((f"rank {rank} {seen.ended}" for rank, seen in self.last.items() if seen.ended), None)
            gone = f"{self._holder} is gone: the rendezvous store that it holds does not answer ({first_line(error)})"
            raise RankLostError(told or gone) from None

    def _post(self, change: Callable[[Notice], Notice]) -> None:
        with self._lock:
            self._own = change(self._own)
            if not self.alone:
                self.put(f"notice/{self._rank}", self._own.as_text())


def raised(error: BaseException) -> str:
    """Returns what a rank raised, in words that follow its name."""
    if isinstance(error, KeyboardInterrupt):
        return f"was interrupted ({type(error).__name__})"
    return f"raised {type(error).__name__}: {printable(first_line(error))}"
