"""What an output file may take the place of."""

from __future__ import annotations

import os
import stat

from causalrope_sp.errors import OutputError, first_line


def check_replaceable(path: str | os.PathLike[str]) -> None:
    """Checks that a path is free, or is that of a regular file.

    safetensors, and `os.replace`, put a new file in the place of whatever has the name: run by root, of /dev/null.

    Args:
        path: the path.

    Raises:
        OutputError: a folder, a device or a pipe has the path, or no file can have it.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    except (OSError, ValueError) as reason:
        raise OutputError(f"cannot write {path}: {first_line(reason)}") from reason
    if not stat.S_ISREG(mode):
        raise OutputError(f"cannot write {path}: it is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}")
