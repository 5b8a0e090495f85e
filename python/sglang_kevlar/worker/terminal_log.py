"""Log lines of what a supervisor uses, written in the supervisor's own way, which does not wait for the terminal."""

from __future__ import annotations

import logging
from collections.abc import Callable


class _Handler(logging.Handler):
    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        self._write(self.format(record))


def log_by(write: Callable[[str], None]) -> None:
    """For this process, from now on."""
    logger = logging.getLogger("sglang_kevlar")
    logger.handlers = [_Handler(write)]
    logger.propagate = False
