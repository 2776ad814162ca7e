"""How the daemon speaks: to stderr, in lines for people on a terminal, in JSON lines for journald and files.

Whether anybody listens changes nothing: a pipe whose reader went away or reads no further, a terminal that hung up or
stands still (flow control, a pseudo-terminal that nobody reads) and a full disk cost lines, which are counted, and
never the watch. What must not be lost is in the events and in the audit log.
"""

from __future__ import annotations

import io
import os
import select
from typing import TYPE_CHECKING

import structlog

from gpuguard.ui.markup import visible

if TYPE_CHECKING:
    from typing import TextIO

    from structlog.typing import EventDict, ExcInfo, Processor

_STDERR = 2


def configure() -> None:
    """Set structlog up for this process. The library never calls this: an importer's logging is the importer's."""
    lines = _Lines()
    told: list[Processor] = [structlog.processors.add_log_level, structlog.processors.TimeStamper(fmt="iso", utc=True)]
    if os.isatty(_STDERR):
        plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
        form: list[Processor] = [
            _inert, structlog.dev.ConsoleRenderer(colors=not plain, exception_formatter=_traceback)]
    else:
        form = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=[*told, lines.tell_lost, *form],
        logger_factory=structlog.WriteLoggerFactory(lines),  # type: ignore[arg-type]
        cache_logger_on_first_use=True,
    )


class _Lines:
    """Standard error, one system call a line unless it is long; it raises nothing and waits for no reader.

    A pipe that says that it has room has it for so many bytes, and beyond them would be waited for.
    """

    def __init__(self) -> None:
        self._lost = 0
        self._begin = b""
        self._out = _terminal() if os.isatty(_STDERR) else _STDERR

    def tell_lost(self, _logger: object, _method: str, event: EventDict) -> EventDict:
        if self._lost:
            event["lines_lost"] = self._lost
        return event

    def write(self, line: str) -> None:
        data, wrote = self._begin + line.encode(errors="backslashreplace"), 0
        try:
            while wrote < len(data):
                _, free, _ = select.select([], [self._out], [], 0)
                if not free:
                    raise BlockingIOError
                wrote += os.write(self._out, data[wrote:wrote + select.PIPE_BUF])
            self._lost, self._begin = 0, b""
        except OSError:
            self._lost += 1
            # One that was cut is ended, so that the next is a line again.
            self._begin = b"\n" if wrote else self._begin

    def flush(self) -> None:
        """Nothing is held back."""


def _terminal() -> int:
    """Return standard error's terminal, opened anew: it has room for less than it says, and must not be waited for.

    As that goes with an open file, it must not be the one that a shell has as well. A terminal that we may not open (of
    another user, after su) stays as it is.
    """
    try:
        return os.open(f"/proc/self/fd/{_STDERR}", os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return _STDERR


def _traceback(out: TextIO, exception: ExcInfo) -> None:
    """Write a traceback; a prettier one would show what is in variables, and a message is others' to choose as well."""
    text = io.StringIO()
    structlog.dev.plain_traceback(text, exception)
    out.write("\n".join(map(visible, text.getvalue().split("\n"))))


def _inert(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Names in an event are others' to choose: none of them moves a cursor."""
    return {key: visible(value) if isinstance(value, str) else value for key, value in event.items()}
