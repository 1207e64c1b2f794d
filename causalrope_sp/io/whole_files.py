"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from causalrope_sp.errors import OutputError, first_line
from causalrope_sp.io.output_files import check_replaceable
from causalrope_sp.io.partial_files import PartialFile


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a file that takes the place of `path` when the body ends. If that raises, what was written is removed.

    Args:
        path: the file. Where there is one already, it stays as it is until the new one is complete.

    Raises:
        OutputError: the file cannot be written, another process is writing it, or its path is no regular file's.
    """
    target = Path(os.path.abspath(path))
    try:
        check_replaceable(path)
        partial = PartialFile(target, folder=False)
        try:
            with open(partial.path, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial.path, target)
            partial.release()
        except BaseException:
            with contextlib.suppress(OSError):
                partial.remove()
            raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {first_line(error)}") from error
