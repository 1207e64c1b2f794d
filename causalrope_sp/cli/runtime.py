"""The process of a command: exit status, signals, messages by rank, and an iterator in a background thread."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import click

from causalrope_sp.cli.standard_streams import guard_standard_streams
from causalrope_sp.errors import (
    CausalRopeError,
    ConfigError,
    OutputError,
    RankLostError,
    escaped_line,
    first_line,
    is_out_of_memory,
)
from causalrope_sp.rank_environment import RankEnvironment

T = TypeVar("T")
_RANK_0_PRINTS_WITHIN_S = 10.0
_LEAST_ADDRESS_SPACE = 600_000_000  # bytes; with less, torch 2.13 for CPUs aborts while it is imported
AHEAD = 3  # items that may be ready and not yet taken, the one in progress not counted


class Terminated(KeyboardInterrupt):
    """SIGTERM ended the command. A launcher sends it to all ranks as soon as one of them has failed."""


class CommandLine(click.Group):
    """A group of commands whose errors become one line on stderr and an exit status."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Runs a command and exits with its status."""
        with _signals_interrupt() as received:
            status = self._status(received, *args, **{**kwargs, "standalone_mode": False})
        sys.exit(status)

    def _status(self, received: Sequence[int], *args: Any, **kwargs: Any) -> int:
        """The status of a command; `received` gets the signals."""
        try:
            return super().main(*args, **kwargs) or 0
        except (KeyboardInterrupt, click.Abort):
            return 130
        except click.ClickException as error:
            hint = ""
            if isinstance(error, click.UsageError) and error.ctx is not None:
                hint = f" See {error.ctx.command_path} --help"
            _print_wrong_input(error.format_message() + hint)
            return 2
        except CausalRopeError as error:
            _print_wrong_input(str(error))
            return 2
        except RankLostError as error:
            click.echo(f"error: {error}", err=True)
            return 1
        except Exception as error:
            if received:  # a library made another error of the interruption
                return 130
            without_words = isinstance(error, SystemError) and _memory_limit()  # C code that got no memory
            if is_out_of_memory(error) or without_words:
                click.echo(f"error on rank {rank()}: out of memory: {first_line(error)}{_memory_limit()}", err=True)
                return 1
            traceback.print_exc()
            click.echo(f"error on rank {rank()}: {type(error).__name__}: {error}", err=True)
            return 1

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a command; an interruption becomes status 130."""
        _check_process()
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            return 130


def run(cli: click.Group) -> None:
    """Runs a command line to its end.

    A failed process exits at once, and waits neither for other ranks nor for threads that wait for them. What cannot
    be written to the standard streams is an error of one sentence, see `standard_streams`.

    Args:
        cli: the group of commands.
    """
    guard_standard_streams()
    try:
        cli()
    except SystemExit as done:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OutputError):
                stream.flush()
        if done.code:
            os._exit(done.code if isinstance(done.code, int) else 1)


class _LogFile(logging.FileHandler):
    """A log file. The first message that cannot be written is an error of one line; the log ends there."""

    def handleError(self, record: logging.LogRecord) -> None:
        self.setLevel(logging.CRITICAL + 1)
        click.echo(f"cannot write {self.baseFilename}: {first_line(sys.exc_info()[1] or OSError())}", err=True)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what is still held back cannot be written either
            super().close()


class _OneLine(logging.Formatter):
    """Formats a message as one printable line: it may quote a file."""

    def format(self, record: logging.LogRecord) -> str:
        return escaped_line(super().format(record))


def set_up_logging(verbose: bool = False, log_file: str | None = None, silent: bool = False) -> None:
    """Sends the packages' log to stderr and to a file.

    Args:
        verbose: whether rank 0 logs all messages to stderr; by default it logs those of level INFO and above.
        log_file: a file to which every rank appends all messages; None for no file.
        silent: whether rank 0 logs warnings alone to stderr, unless `verbose` is set.

    Raises:
        OutputError: the file cannot be written.
    """
    names = ("causalrope_sp", "causalrope_kernels")
    level = logging.DEBUG if verbose else logging.WARNING if silent else logging.INFO
    handlers: list[logging.Handler] = []
    if rank() == 0:
        handlers.append(logging.StreamHandler())
        handlers[0].setFormatter(_OneLine("%(message)s"))
        handlers[0].setLevel(level)
    if log_file is not None:
        try:
            handlers.append(_LogFile(log_file))
        except (OSError, ValueError) as reason:
            raise OutputError(f"cannot write {log_file}: {first_line(reason)}") from reason
        handlers[-1].setFormatter(_OneLine(f"%(asctime)s rank {rank()} %(name)s %(levelname)s: %(message)s"))
    for name in names:
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG if log_file is not None else level)
        for handler in handlers:
            logger.addHandler(handler)


class Background(Generic[T]):
    """Runs an iterator in a background thread, up to `AHEAD` items ahead. It can be iterated over once.

    Python handles signals in the main thread, between two of its instructions. A main thread that waits here, and not
    in a collective whose other ranks have ended, can finish the video at once.

    Args:
        iterate: a function that returns the iterator; it is called in the background thread.
    """

    def __init__(self, iterate: Callable[[], Iterator[T]]) -> None:
        self._iterate = iterate
        self._results: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue()
        self._slots, self._left = threading.Semaphore(AHEAD), threading.Event()

    def fail(self, error: BaseException) -> None:
        """Raises `error` in the iterating thread after the items that are ready. Any thread may call it."""
        self._results.put((None, error))

    def __iter__(self) -> Iterator[T]:
        threading.Thread(target=self._work, name="generate", daemon=True).start()
        try:
            while True:
                item, error = self._results.get()
                if error is not None:
                    raise error
                if item is None:
                    return
                self._slots.release()
                yield item
        finally:
            self._left.set()
            self._slots.release()

    def _work(self) -> None:
        try:
            for item in self._iterate():
                self._slots.acquire()
                if self._left.is_set():
                    return
                self._results.put((item, None))
            self._results.put((None, None))
        except BaseException as error:
            self._results.put((None, error))


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[Sequence[int]]:
    """Turns SIGINT into KeyboardInterrupt and SIGTERM into `Terminated`, and ignores further signals: torchrun forwards
    the Ctrl-C that the terminal has already sent, and the second signal must not interrupt the completion of the file.
    Yields the list that gets the first one.
    """
    signals, all_received = (signal.SIGINT, signal.SIGTERM), list[int]()

    def interrupt(received: int, _: object) -> None:
        all_received.append(received)
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        raise Terminated if received == signal.SIGTERM else KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield all_received
        return
    before = {number: signal.signal(number, interrupt) for number in signals}
    try:
        yield all_received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_wrong_input(message: str) -> None:
    """Prints a message on rank 0. Other ranks wait for torchrun to end them, and print only if that does not happen."""
    line = escaped_line(message)
    try:
        own = rank()
    except CausalRopeError:  # the environment says nonsense, and that is the message
        own = 0
    if own == 0:
        click.echo(f"error: {line}", err=True)
        return
    try:
        time.sleep(_RANK_0_PRINTS_WITHIN_S)
    except KeyboardInterrupt:
        return
    click.echo(f"error on rank {own}: {line}", err=True)


def _check_process() -> None:
    """Raises ConfigError if this process cannot run any command, before a library under it aborts or raises."""
    RankEnvironment.read()
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError("the working directory does not exist any more: change into another one") from error
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if 0 <= limit < _LEAST_ADDRESS_SPACE:
        raise ConfigError(
            f"the address space of this process must be at least {_LEAST_ADDRESS_SPACE / 1e6:g} MB, not "
            f"{limit / 1e6:.0f} MB: raise its limit (ulimit -v)"
        )


def _memory_limit() -> str:
    """What a message about too little memory says of the limit of this process; nothing if there is none."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return "" if limit == resource.RLIM_INFINITY else f" (ulimit -v allows this process {limit / 1e9:.1f} GB)"


def rank() -> int:
    """Returns this process's rank from torchrun's environment; 0 without torchrun."""
    return RankEnvironment.read().rank


def ranks() -> int:
    """Returns the number of ranks from torchrun's environment; 1 without torchrun."""
    return RankEnvironment.read().world_size


def shares_rank_0_disk() -> bool:
    """Returns whether this process runs on the machine of rank 0."""
    return RankEnvironment.read().group_rank == 0
