"""Logging of the long-running processes: one line an event, a file of bounded size, no secret ever (callers see to
that: what is logged are paths, store ids and errors, all without credentials)."""

from __future__ import annotations

import logging
import logging.handlers
from pathlib import Path

_FORMAT = "%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s"
_LOG_SIZE_BYTES_MAX = 10 * 1024 * 1024


def log_to_file(path: Path, level: int = logging.INFO) -> None:
    """Send this process's log to `path`, keeping one older file."""
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=_LOG_SIZE_BYTES_MAX, backupCount=1, encoding="utf-8")
    handler.setFormatter(logging.Formatter(_FORMAT))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(level)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Send this process's log to standard error."""
    logging.basicConfig(format=_FORMAT, level=level)
