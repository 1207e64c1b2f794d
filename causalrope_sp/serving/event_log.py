"""Structured log messages: one JSON object a line."""

from __future__ import annotations

import json
import logging
from typing import Any


def log_event(logger: logging.Logger, event: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Logs an event as one JSON object. No field may hold a secret or a client's text.

    Args:
        logger: the module's logger.
        event: what has happened.
        level: of the message.
        fields: what belongs to it, which JSON can hold.
    """
    logger.log(level, "%s", json.dumps({"event": event, **fields}))
