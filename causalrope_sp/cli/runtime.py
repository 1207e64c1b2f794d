"""How the process of a command behaves: its exit status, its signals, its rank's voice, and a way out of a hang."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import click

from causalrope_sp.errors import CausalRopeError, OutputError, RankLostError

T = TypeVar("T")
_RANK_0_SPEAKS_WITHIN_S = 10.0
AHEAD = 3  # items that may be ready and not yet taken, beside the one in the making


class CommandLine(click.Group):
    """Turns what a command raises into one line on stderr and an exit status."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        with _signals_interrupt():
            status = self._status(*args, **{**kwargs, "standalone_mode": False})
        sys.exit(status)

    def _status(self, *args: Any, **kwargs: Any) -> int:
        try:
            return super().main(*args, **kwargs) or 0
        except (KeyboardInterrupt, click.Abort):
            return 130
        except click.ClickException as error:
            hint = ""
            if isinstance(error, click.UsageError) and error.ctx is not None:
                hint = f" See {error.ctx.command_path} --help"
            _say_wrong_input(error.format_message() + hint)
            return 2
        except CausalRopeError as error:
            _say_wrong_input(str(error))
            return 2
        except RankLostError as error:
            click.echo(f"error: {error}", err=True)
            return 1
        except Exception as error:
            traceback.print_exc()
            click.echo(f"error on rank {rank()}: {type(error).__name__}: {error}", err=True)
            return 1

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            return 130


def run(cli: click.Group) -> None:
    """Runs a command line to its end.

    A failed process leaves at once: it waits for no other rank, and for no thread that does.
    """
    try:
        cli()
    except SystemExit as done:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        if done.code:
            os._exit(done.code if isinstance(done.code, int) else 1)


def set_up_logging(verbose: bool = False, log_file: str | None = None, silent: bool = False) -> None:
    """Sends what the packages log to the standard error and to a file.

    Rank 0 says what was inferred, measured and chosen, and with `verbose` all else; with `silent` warnings alone. The
    file takes everything, of every rank.

    Raises:
        OutputError: the file cannot be written.
    """
    names = ("causalrope_sp", "causalrope_kernels")
    level = logging.DEBUG if verbose else logging.WARNING if silent else logging.INFO
    handlers: list[logging.Handler] = []
    if rank() == 0:
        handlers.append(logging.StreamHandler())
        handlers[0].setFormatter(logging.Formatter("%(message)s"))
        handlers[0].setLevel(level)
    if log_file is not None:
        try:
            handlers.append(logging.FileHandler(log_file))
        except OSError as reason:
            raise OutputError(f"cannot write {log_file}: {reason.strerror or reason}") from reason
        handlers[-1].setFormatter(logging.Formatter(f"%(asctime)s rank {rank()} %(name)s %(levelname)s: %(message)s"))
    for name in names:
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG if log_file is not None else level)
        for handler in handlers:
            logger.addHandler(handler)


class Background(Generic[T]):
    """Runs an iterator in a thread of its own, a few items ahead; iterate over it, once.

    Signals reach Python in the main thread, and only between two of its steps. A main thread that waits here,
    instead of inside a collective whose other ranks are gone, can finish the video at once.
    """

    def __init__(self, iterate: Callable[[], Iterator[T]]) -> None:
        self._iterate = iterate
        self._results: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue()
        self._slots_of, self._left = threading.Semaphore(AHEAD), threading.Event()

    def fail(self, error: BaseException) -> None:
        """Raises `error` in the thread that iterates, as soon as it has taken what is ready; from any thread."""
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
                self._slots_of.release()
                yield item
        finally:
            self._left.set()
            self._slots_of.release()

    def _work(self) -> None:
        try:
            for item in self._iterate():
                self._slots_of.acquire()
                if self._left.is_set():
                    return
                self._results.put((item, None))
            self._results.put((None, None))
        except BaseException as error:
            self._results.put((None, error))


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM becomes a KeyboardInterrupt as Ctrl-C is, and only the first of the two counts: torchrun passes on the
    Ctrl-C that the terminal has sent already, and the second must not cut short the finishing of the file."""
    signals = (signal.SIGINT, signal.SIGTERM)

    def interrupt(*_: object) -> None:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say_wrong_input(message: str) -> None:
    """Rank 0 says it. Another rank waits for torchrun to end it, and speaks only if rank 0 had nothing to say."""
    line = " ".join(message.split())
    if rank() == 0:
        click.echo(f"error: {line}", err=True)
        return
    try:
        time.sleep(_RANK_0_SPEAKS_WITHIN_S)
    except KeyboardInterrupt:
        return
    click.echo(f"error on rank {rank()}: {line}", err=True)


def rank() -> int:
    """This process's rank by torchrun's environment; 0 without torchrun."""
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0


def ranks() -> int:
    """How many there are, by torchrun's environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def shares_rank_0_disk() -> bool:
    return int(os.environ.get("GROUP_RANK", "0")) == 0  # torchrun's number of the machine
