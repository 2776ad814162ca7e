"""How the daemon speaks: to stderr, in lines for people on a terminal, in JSON lines for journald and files.

Whether anybody listens changes nothing: a reader that went away or reads no further, a terminal that hung up and a full
disk cost lines, which are counted, and never the watch. What must not be lost is in the events and in the audit log.
"""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from structlog.typing import EventDict, Processor

_STDERR = 2


def configure() -> None:
    """Set structlog up for this process. The library never calls this: an importer's logging is the importer's."""
    lines = _Lines()
    told: list[Processor] = [structlog.processors.add_log_level, structlog.processors.TimeStamper(fmt="iso", utc=True)]
    if os.isatty(_STDERR):
        plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
        # A prettier traceback would show what is in variables.
        traceback = structlog.dev.plain_traceback
        form: list[Processor] = [
            _inert, structlog.dev.ConsoleRenderer(colors=not plain, exception_formatter=traceback)]
    else:
        form = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=[*told, lines.tell_lost, *form],
        logger_factory=structlog.WriteLoggerFactory(lines),  # type: ignore[arg-type]
        cache_logger_on_first_use=True,
    )


class _Lines:
    """Standard error, one system call a line; it raises nothing and waits for nobody."""

    def __init__(self) -> None:
        self._lost = 0

    def tell_lost(self, _logger: object, _method: str, event: EventDict) -> EventDict:
        if self._lost:
            event["lines_lost"] = self._lost
        return event

    def write(self, line: str) -> None:
        try:
            _, free, _ = select.select([], [_STDERR], [], 0)
            if not free:
                raise BlockingIOError
            os.write(_STDERR, line.encode(errors="backslashreplace"))
            self._lost = 0
        except OSError:
            self._lost += 1

    def flush(self) -> None:
        """Nothing is held back."""


def _inert(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Names in an event are others' to choose: none of them moves a cursor."""
    from gpuguard.ui.markup import visible

    return {key: visible(value) if isinstance(value, str) else value for key, value in event.items()}
