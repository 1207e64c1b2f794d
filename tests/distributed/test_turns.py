"""Ranks make the same calls in the same order, or each of them says which rank makes another one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from causalrope_sp.distributed.notices import KEPT, NoticeBoard
from causalrope_sp.distributed.stream_turns import StreamTurns
from causalrope_sp.distributed.turns import Turns
from causalrope_sp.errors import ConfigError, RankLostError

Program = Callable[[Turns, NoticeBoard], object]


def run(*programs: Program) -> list[str]:
    """Runs one program a rank, each in a thread; returns what each returned or raised."""
    store, size = HashStore(), len(programs)
    boards = [NoticeBoard(store, rank, size) for rank in range(size)]
    said = [""] * size

    def work(rank: int) -> None:
        try:
            said[rank] = str(programs[rank](Turns(boards[rank], rank, lambda: 0), boards[rank]))
        except Exception as error:
            said[rank] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=work, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads), said
    return said


def chunks(turns: StreamTurns, count: int, leave: BaseException | None = None) -> int:
    """Takes so many chunks of a stream, and may leave it by an error."""
    with turns.taken():
        for _ in range(count):
            with turns.chunk():
                pass
        if leave is not None:
            raise leave
        return turns.next


def test_two_streams_taken_in_the_same_order_agree_whatever_the_pauses() -> None:
    def program(wait_s: float) -> Program:
        def by_turns(turns: Turns, board: NoticeBoard) -> list[int]:
            streams = [StreamTurns(turns, range(3)) for _ in range(2)]
            for number in (0, 1, 1, 0, 1):
                with streams[number].chunk():
                    time.sleep(wait_s)
            return [stream.next for stream in streams]

        return by_turns

    assert run(program(0), program(0.02), program(0)) == ["[2, 3]"] * 3


def test_two_streams_taken_in_another_order_are_named_on_every_rank() -> None:
    def program(order: tuple[int, ...]) -> Program:
        def by_turns(turns: Turns, board: NoticeBoard) -> None:
            streams = [StreamTurns(turns, range(3)) for _ in range(2)]
            for number in order:
                with streams[number].chunk():
                    pass

        return by_turns

    said = run(program((0, 1, 0)), program((0, 0, 1)), program((0, 1, 0)))
    assert (
        said
        == [
            "ConfigError: ranks part ways: rank 0 asks for chunk 0 of stream 2; rank 1 asks for chunk 1 of stream 1; "
            "rank 2 asks for chunk 0 of stream 2: all must make the same calls in the same order"
        ]
        * 3
    )


def test_after_a_disagreement_the_ranks_go_on_together() -> None:
    def program(call: str) -> Program:
        def twice(turns: Turns, board: NoticeBoard) -> str:
            with pytest.raises(ConfigError, match="ranks part ways"), turns.take(call, range(2)):
                raise AssertionError
            with turns.take("saves its model", range(2)):
                return "saved"

        return twice

    assert run(program("calls stream"), program("warms up")) == ["saved", "saved"]


def test_a_call_of_all_ranks_beside_one_of_some_is_named() -> None:
    """Ranks 0 and 1 denoise. Rank 0's call needs rank 2, which never comes."""

    def of_all(turns: Turns, board: NoticeBoard) -> None:
        with turns.take("saves its model", range(3)):
            pass

    def of_some(turns: Turns, board: NoticeBoard) -> None:
        chunks(StreamTurns(turns, range(2)), 1)

    said = run(of_all, of_some, lambda turns, board: "waits")
    part = "rank 0 saves its model; rank 1 asks for chunk 0 of stream 1"
    assert all(part in line for line in said[:2])


@pytest.mark.parametrize(
    ("leave", "says"),
    [
        (GeneratorExit(), "rank 1 has closed stream 1 before chunk 2"),
        (ValueError("boom"), "rank 1 raised ValueError: boom, in chunk 2"),
    ],
    ids=["closed", "raised"],
)
def test_a_rank_that_left_the_stream_is_named_at_once(leave: BaseException, says: str) -> None:
    def leaves(turns: Turns, board: NoticeBoard) -> str:
        with pytest.raises(type(leave)):
            chunks(StreamTurns(turns, range(2)), 2, leave=leave)
        return "left"

    started = time.monotonic()
    said = run(lambda turns, board: chunks(StreamTurns(turns, range(2)), 3), leaves)
    assert said == [f"RankLostError: {says}, and rank 0 asks for chunk 2 of stream 1", "left"]
    assert time.monotonic() - started < 5


def test_a_rank_that_has_ended_is_named_with_its_words() -> None:
    said = run(
        lambda turns, board: chunks(StreamTurns(turns, range(2)), 1),
        lambda turns, board: board.end("raised KeyError: 'x'", 0),
    )
    assert said[0] == "RankLostError: rank 1 raised KeyError: 'x', and rank 0 asks for chunk 0 of stream 1"


def test_a_failed_turn_is_hopeless_for_the_ranks_that_are_in_it_alone() -> None:
    said: list[Any] = []

    def fails(turns: Turns, board: NoticeBoard) -> None:
        with turns.take("warms up", range(2)):
            raise ValueError("boom")

    def looks(turns: Turns, board: NoticeBoard) -> None:
        with turns.take("warms up", range(2)):
            while (notice := board.read(1)) is None or notice.failure is None:
                time.sleep(0.01)
            said.append(turns.hopeless(1, notice))
        said.append(turns.hopeless(1, notice))

    assert run(looks, fails)[1] == "ValueError: boom"
    assert said == ["rank 1 raised ValueError: boom", None]


def test_a_stream_that_works_ahead_allows_no_call_in_between() -> None:
    def program(turns: Turns, board: NoticeBoard) -> str:
        stream = StreamTurns(turns, range(2), ahead=True)
        with stream.taken():
            with stream.chunk():
                pass
            with pytest.raises(ConfigError, match="another stream is open and works ahead"), turns.take("x", range(2)):
                raise AssertionError
        with turns.take("saves its model", range(2)):
            return "saved"

    assert run(program, program) == ["saved", "saved"]


def test_a_call_within_a_call_is_refused() -> None:
    def program(turns: Turns, board: NoticeBoard) -> None:
        with turns.take("calls stream", range(2)), turns.take("calls stream", range(2)):
            raise AssertionError

    assert (
        run(program, program)
        == ["ConfigError: a callback cannot call its pipeline on several ranks: call it between two chunks"] * 2
    )


def test_threads_of_a_rank_take_turns_one_at_a_time() -> None:
    inside, most = [0], [0]

    def program(turns: Turns, board: NoticeBoard) -> str:
        def work() -> None:
            with turns.take("warms up", range(1)):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.02)
                inside[0] -= 1

        threads = [threading.Thread(target=work) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return "done"

    assert run(program) == ["done"]
    assert most == [1]


def test_a_rank_that_follows_hears_requests_catches_up_and_names_who_left() -> None:
    def leads(turns: Turns, board: NoticeBoard) -> None:
        stream = StreamTurns(turns, range(1))
        with stream.taken():
            for chunk in range(3):
                with stream.chunk():
                    stream.announce([1], chunk, 7)
            time.sleep(1)
            raise ValueError("boom")

    def follows(turns: Turns, board: NoticeBoard) -> str:
        stream, heard = StreamTurns(turns, range(1)), []
        for _ in range(3):
            heard.append(stream.hear(0))
            with stream.followed():
                assert turns.open is not None
                assert turns.open.number == len(heard)
        with pytest.raises(RankLostError, match="rank 0 raised ValueError: boom, in chunk 3, and rank 1 waits"):
            stream.hear(0)
        return str(heard)

    assert run(leads, follows) == ["ValueError: boom", "[[0, 7], [1, 7], [2, 7]]"]


def test_a_turn_of_all_ranks_can_be_read_by_the_one_that_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 0 and 1 denoise and are several chunks on before rank 2 looks whether they have come to the first turn."""
    late, has = threading.Event(), NoticeBoard.has

    def program(turns: Turns, board: NoticeBoard) -> str:
        with turns.take("opens a stream", range(3)):
            stream = StreamTurns(turns, range(2))
        if turns.rank < 2:
            chunks(stream, 3)
            late.set()
        return "done"

    def looks_late(board: NoticeBoard, keys: list[str]) -> bool:
        if keys == [f"turn/1/{rank}" for rank in range(3)] and threading.current_thread().name == "rank 2":
            late.wait(10)
        return has(board, keys)

    monkeypatch.setattr(NoticeBoard, "has", looks_late)
    assert run(program, program, program) == ["done"] * 3


def test_a_rank_that_follows_and_one_that_makes_another_call_name_each_other() -> None:
    def leads(turns: Turns, board: NoticeBoard) -> None:
        StreamTurns(turns, range(1))
        with turns.take("saves its model", range(2)):
            pass

    said = run(leads, lambda turns, board: StreamTurns(turns, range(1)).hear(0))
    part = "rank 0 saves its model; rank 1 asks for chunk 0 of stream 1"
    assert said == [f"ConfigError: ranks part ways: {part}: all must make the same calls in the same order"] * 2


def test_what_ranks_tell_does_not_grow() -> None:
    """Neither with the turns nor with the streams that were closed early."""
    store = HashStore()
    boards = [NoticeBoard(store, rank, 2) for rank in range(2)]
    turns = [Turns(boards[rank], rank, lambda: 0) for rank in range(2)]

    def work(rank: int) -> None:
        for _ in range(3 * KEPT):
            with pytest.raises(GeneratorExit):
                chunks(StreamTurns(turns[rank], range(2)), 1, leave=GeneratorExit())

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    told = boards[0].read(1)
    assert told is not None
    assert len(told.left) == KEPT
    assert store.num_keys() <= 2 * 3
