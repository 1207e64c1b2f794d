"""Live sessions on disk, from which this server after a restart, or another one of the same folder, goes on."""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from causalrope_sp.distributed.comm_stats import CommStats
from causalrope_sp.errors import OutputError, first_line
from causalrope_sp.pipeline.output import VideoChunk
from causalrope_sp.pipeline.timings import Timings
from causalrope_sp.serving.job_store import replace_file
from causalrope_sp.serving.live_state import Delivery, LiveState

KEPT_S = 24 * 3600  # a session that nobody has taken up for so long is removed


class Checkpoints:
    """The live sessions of a folder. Several servers may share it: a session belongs to the one that wrote or took it
    last, and the others leave it alone.

    A session has a JSON file, which is replaced at once and names the two others: the pipeline's session, and the
    frames that its viewer has not played. File names are made of a hash of the session's key, which is a secret.

    Args:
        folder: the folder, which is made if it does not exist.
        cache: whether keys and values are kept too.

    Raises:
        OutputError: the folder cannot be made or read.
    """

    def __init__(self, folder: Path, cache: bool) -> None:
        self._folder, self._cache, self._server = folder, cache, secrets.token_hex(8)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            oldest = time.time() - KEPT_S
            for path in folder.iterdir():
                with suppress(FileNotFoundError):  # another server removes it too
                    if path.stat().st_mtime < oldest:
                        path.unlink()
        except OSError as error:
            raise OutputError(f"cannot keep live sessions in {folder}: {first_line(error)}") from error

    def write(self, key: str, state: LiveState, made: bool, save: Callable[[str, bool], object]) -> bool:
        """Writes a session in place of what there was of it.

        Args:
            key: of the session.
            state: what it is beside the pipeline's session.
            made: whether a chunk of it was made; before, it can be opened anew and is not saved.
            save: writes the pipeline's session to a file, with keys and values or without.

        Returns:
            Whether the session is this server's. Nothing is written of one that another server has taken.

        Raises:
            OutputError: it cannot be written. What there was of it stays.
        """
        before = self._read(key)
        if before is not None and before["server"] != self._server:
            return False
        number = 0 if before is None else before["number"] + 1
        file, frames = self._files(key, number)
        try:
            if made:
                save(str(file), self._cache)
            frames.write_bytes(_packed(state))
            self._point(key, {"number": number, "made": made, **_described(state)})
        except OSError as error:
            raise OutputError(f"cannot keep a live session in {self._folder}: {first_line(error)}") from error
        if before is not None:
            self._remove_files(key, before["number"])
        return True

    def write_control(self, key: str, values: list[float]) -> None:
        """Writes the control of a session beside what there is of it, which takes far less than `write`. Nothing is
        written of a session that another server has taken."""
        before = self._read(key)
        if before is not None and before["server"] == self._server:
            self._point(key, {**before, "control": values})

    def take(self, key: str) -> tuple[dict[str, Any], LiveState] | None:
        """Makes a session this server's.

        Args:
            key: of the session, as a client gives it.

        Returns:
            The arguments by which the pipeline opens it, and its state; None if there is no such session.
        """
        try:
            if (fields := self._read(key)) is None:
                return None
            file, frames = self._files(key, fields["number"])
            state = _unpacked(fields, frames.read_bytes())
            self._point(key, fields)
        except (OSError, ValueError, KeyError, TypeError):  # another server has just gone on with it, or removed it
            return None
        arguments = {"path": str(file)} if fields["made"] else state.opening
        return (arguments if state.control is None else {**arguments, "control": state.control}), state

    def is_taken(self, key: str) -> bool:
        """Whether a session is another server's by now."""
        fields = self._read(key)
        return fields is not None and fields["server"] != self._server

    def remove(self, key: str) -> None:
        """Removes a session, unless it is another server's."""
        fields = self._read(key)
        if fields is not None and fields["server"] == self._server:
            self._pointer(key).unlink(missing_ok=True)
            self._remove_files(key, fields["number"])

    def _read(self, key: str) -> dict[str, Any] | None:
        try:
            fields = json.loads(self._pointer(key).read_text())
            return fields if {"number", "server", "made"} <= fields.keys() else None
        except (OSError, ValueError, AttributeError):
            return None

    def _point(self, key: str, fields: dict[str, Any]) -> None:
        replace_file(self._pointer(key), json.dumps({**fields, "server": self._server}).encode())

    def _pointer(self, key: str) -> Path:
        return self._folder / f"{_hashed(key)}.json"

    def _files(self, key: str, number: int) -> tuple[Path, Path]:
        name = f"{_hashed(key)}-{number}"
        return self._folder / f"{name}.safetensors", self._folder / f"{name}.npz"

    def _remove_files(self, key: str, number: int) -> None:
        for path in self._files(key, number):
            with suppress(OSError):
                os.unlink(path)


def _hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def _described(state: LiveState) -> dict[str, Any]:
    """What the JSON file says of a state. The frames are in another file."""
    deliveries = [
        {
            "sequence": delivery.sequence,
            "index": delivery.chunk.index,
            "first_frame_index": delivery.chunk.first_frame_index,
            "prompt_id": delivery.chunk.prompt_id,
            "timings": asdict(delivery.chunk.timings),
        }
        for delivery in state.unplayed
    ]
    return {
        "opening": state.opening,
        "sequence": state.sequence,
        "paused": state.paused,
        "control": state.control,
        "deliveries": deliveries,
    }


def _packed(state: LiveState) -> bytes:
    """The frames that are not played, in numpy's format."""
    target = io.BytesIO()
    np.savez(target, *(delivery.chunk.frames for delivery in state.unplayed if delivery.chunk.frames is not None))
    return target.getvalue()


def _unpacked(fields: dict[str, Any], data: bytes) -> LiveState:
    deliveries = deque[Delivery]()
    with np.load(io.BytesIO(data), allow_pickle=False) as frames:
        for number, told in enumerate(fields["deliveries"]):
            chunk = VideoChunk(
                told["index"],
                told["first_frame_index"],
                frames[f"arr_{number}"],
                told["prompt_id"],
                Timings(**told["timings"]),
                CommStats(),
            )
            deliveries.append(Delivery(told["sequence"], chunk))
    return LiveState(fields["opening"], fields["sequence"], fields["paused"], deliveries, fields.get("control"))
