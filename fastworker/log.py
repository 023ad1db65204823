"""Log lines on standard error: for people by default, JSON on request, never with a secret, never a flood.

The human form is the predecessor's, so that existing greps keep working. Called again in every child
process: a forked handler shares nothing but the file descriptor, and lines are written in one call each.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any, Final, Literal

import orjson

from fastworker.redact import printable, printable_lines, redact

REPEATS_MAX: Final = 5
"""Lines of one template that pass within one window; a guess: enough to see a pattern."""
WINDOW_S: Final = 10.0
TEMPLATES_MAX: Final = 1_000
"""Templates remembered; formats are ours, so this is reached only if a library makes them up."""


class Redacted(logging.Formatter):
    """`[YYYY-MM-DD HH:MM:SS] [LEVEL] message`, secrets of URLs removed from the whole text, traceback included.

    A message is one line, whatever others wrote into it. The lines of a traceback, or of `extra={"lines": [...]}`, are
    indented: a line that begins with [ is the beginning of a record.
    """

    def __init__(self) -> None:
        super().__init__("[%(asctime)s] [%(levelname)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        lines: list[str] = getattr(record, "lines", [])
        return "\n  ".join(printable(redact(line)) for line in (super().formatMessage(record), *lines))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return _indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        return _indented(super().formatStack(stack_info))


class Json(logging.Formatter):
    """One JSON object a line: time (UTC), level, message, logger, pid, and error with its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        seconds, ms = divmod(int(record.created * 1000), 1000)
        line: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{ms:03d}Z",
            "level": record.levelname,
            "message": printable(redact(record.getMessage())),
            "logger": record.name,
            "pid": record.process,
        }
        if record.exc_info:
            line["error"] = printable_lines(redact(self.formatException(record.exc_info)))
        if lines := getattr(record, "lines", None):
            line["lines"] = [printable(redact(one)) for one in lines]
        return orjson.dumps(line).decode()


def _indented(text: str) -> str:
    return printable_lines(redact(text), "  ")


class RepeatLimit(logging.Filter):
    """Lets `REPEATS_MAX` lines of one template pass in a window; the next window's first one says how many were not."""

    def __init__(self) -> None:
        super().__init__()
        self._windows: dict[tuple[str, str], tuple[float, int]] = {}  # template -> start of its window, lines in it

    def filter(self, record: logging.LogRecord) -> bool:
        key = (record.name, str(record.msg))
        start, lines = self._windows.get(key, (record.created, 0))
        if record.created - start >= WINDOW_S:
            held_back = lines - REPEATS_MAX
            if held_back > 0:
                record.msg = f"{record.getMessage()} (and {held_back:,} more like it since)"
                record.args = None
            start, lines = record.created, 0
        if len(self._windows) >= TEMPLATES_MAX:
            self._windows.clear()
        self._windows[key] = (start, lines + 1)
        return lines < REPEATS_MAX


def setup_logging(level: str, form: Literal["human", "json"]) -> None:
    """Send everything at `level` and above to standard error. Replaces what an earlier call set up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Json() if form == "json" else Redacted())
    handler.addFilter(RepeatLimit())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # Libraries report to us through exceptions; their own lines help only when debugging them.
    for library in ("aiohttp.access", "asyncio", "redis"):
        logging.getLogger(library).setLevel(level if level == "DEBUG" else "WARNING")
