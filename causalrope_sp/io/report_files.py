"""The files of reports, which are checked before a long measurement, and their plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from causalrope_sp.errors import ConfigError, OutputError, first_line


def check_files(out: Path | None, drawing: Path | None) -> None:
    """Checks the output files before a model is loaded.

    Args:
        out: a file of text; None for none.
        drawing: the file of a plot; None for none.

    Raises:
        OutputError: a file is a folder or has too long a name, its folder does not exist, or the plot has an unknown
            suffix.
    """
    for path, verb in ((out, "write"), (drawing, "draw")):
        try:
            if path is not None and (path.is_dir() or not path.parent.is_dir()):
                raise OutputError(f"cannot {verb} {path}: {'it is a folder' if path.is_dir() else 'no such folder'}")
        except OSError as reason:
            raise OutputError(f"cannot {verb} {path}: {first_line(reason)}") from reason
    if drawing is not None and drawing.suffix not in (".png", ".svg", ".pdf"):
        raise OutputError(f"cannot draw {drawing}: it must be a .png, .svg or .pdf file")


def import_pyplot() -> Any:
    """Returns `matplotlib.pyplot`, which draws into files alone.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--plot needs matplotlib, which is not installed: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_plot(figure: Any, path: Path) -> None:
    """Saves a figure of matplotlib.

    Args:
        figure: the figure.
        path: the .png, .svg or .pdf file to write.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise OutputError(f"cannot draw {path}: {error.strerror or error}") from error


def write_text(text: str, path: Path) -> None:
    """Writes a text file.

    Args:
        text: what it shall hold.
        path: the file.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        path.write_text(text)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
