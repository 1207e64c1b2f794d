"""Structured log messages: one JSON object a line."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any


def log_event(logger: logging.Logger, event: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Logs an event as one JSON object with the time (ISO 8601, UTC). No field may hold a secret or a client's text.

    Args:
        logger: the module's logger.
        event: what has happened.
        level: of the message.
        fields: what belongs to it, which JSON can hold.
    """
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    logger.log(level, "%s", json.dumps({"event": event, "time": now, **fields}))
