"""Writes safetensors files."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from causalrope_sp.io.output_files import check_replaceable


def save_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file with the permissions of the file that it replaces, or of any new file.

    safetensors 0.8 alone makes files that nobody but their owner can read, whatever the umask.

    Args:
        tensors: contiguous tensors by name.
        path: the file.
        metadata: the texts in its header.

    Raises:
        OutputError: a folder, a device or a pipe has the path.
        OSError, SafetensorError: the file cannot be written.
    """
    check_replaceable(path)
    file = Path(path)
    is_new = not file.exists()
    if is_new:
        file.touch()
    permissions = stat.S_IMODE(file.stat().st_mode)
    try:
        save_file(dict(tensors), file, dict(metadata))
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):
                file.unlink()
        raise
    if stat.S_IMODE(file.stat().st_mode) != permissions:
        file.chmod(permissions)
