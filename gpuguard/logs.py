"""How the daemon speaks: to stderr, in lines for people on a terminal, in JSON lines for journald and files."""

from __future__ import annotations

import sys

import structlog


def configure() -> None:
    """Set structlog up for this process. The library never calls this: an importer's logging is the importer's."""
    terminal = sys.stderr.isatty()
    renderer = structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
