"""Log lines on standard error: for people by default, JSON on request, never with a secret, never a flood.

The human form is the predecessor's, so that existing greps keep working. Called again in every child
process: a forked handler shares nothing but the file descriptor, and lines are written in one call each.

Nobody waits for whoever reads them: what a full pipe or terminal does not take is kept, up to a limit, then dropped;
how many lines are lost is told when it takes lines again.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import select
import socket
import stat
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

WAITING_MAX: Final = 64 * 1024
"""Bytes kept for a reader that does not read."""
CLOSE_S: Final = 0.2
"""How long the last lines of a process may wait for room."""


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


class NeverWaits(logging.Handler):
    """Lines to a descriptor that others may share, without setting a flag that they would see."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor = descriptor
        self._socket: socket.socket | None = None
        self._polls = False
        self._waiting = bytearray()
        self._lost = 0
        self._pid = os.getpid()
        kind = os.fstat(descriptor).st_mode
        try:
            if stat.S_ISSOCK(kind):  # of systemd's journal
                self._socket = socket.socket(fileno=os.dup(descriptor))
            elif stat.S_ISFIFO(kind) or stat.S_ISCHR(kind):
                # Opened once more it has flags of its own.
                flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                self.descriptor = os.open(f"/proc/self/fd/{descriptor}", flags)
        except OSError:
            self._polls = True  # another process may still take the room that we saw: rare, and the best there is

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001 - whatever a formatter meets, the path goes on
            line = f"[ERROR] A log line of {record.name} could not be made: {record.msg!r}"
        self.flush()
        if self._lost and not self._waiting:
            words = "%d log lines are lost: nobody read standard error, or it took nothing"
            told = logging.LogRecord(__name__, logging.WARNING, __file__, 0, words, (self._lost,), None)
            self._lost = 0
            self.write(self.format(told) + "\n")
        self.write(line + "\n")

    def write(self, text: str) -> None:
        """At once, or as soon as there is room; dropped where too much waits already."""
        self._forget_the_parents()
        data = text.encode(errors="backslashreplace")
        if self._waiting and len(self._waiting) + len(data) > WAITING_MAX:
            self._lost += 1
            return
        self._waiting += data
        self.flush()

    def flush(self) -> None:
        """As much of what waits as there is room for."""
        self._forget_the_parents()
        try:
            while self._waiting:
                if not (count := self._send()):
                    return
                del self._waiting[:count]
        except BlockingIOError:
            pass
        except OSError:  # the reader is gone, the disk is full
            self._lost += self._waiting.count(b"\n")
            self._waiting.clear()

    def close(self) -> None:
        ends = time.monotonic() + CLOSE_S
        self.flush()
        while self._waiting and time.monotonic() < ends:
            time.sleep(0.01)
            self.flush()
        super().close()

    def _send(self) -> int:
        if self._socket is not None:
            return self._socket.send(self._waiting, socket.MSG_DONTWAIT)
        if not self._polls:
            return os.write(self.descriptor, self._waiting)
        poll = select.poll()
        poll.register(self.descriptor, select.POLLOUT)
        # A pipe that is ready takes this much in one piece.
        return os.write(self.descriptor, self._waiting[: select.PIPE_BUF]) if poll.poll(0) else 0

    def _forget_the_parents(self) -> None:
        """After a fork: what waits is the parent's to write."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._waiting.clear()
            self._lost = 0


def _ours() -> NeverWaits | None:
    return next((one for one in logging.getLogger().handlers if isinstance(one, NeverWaits)), None)


def flush_waiting() -> None:
    """For a process that may not log for long: write what waited for room."""
    for handler in logging.getLogger().handlers:
        with contextlib.suppress(ValueError):
            handler.acquire()
            try:
                handler.flush()
            finally:
                handler.release()


def tell(text: str) -> None:
    """Text for standard error that is no log line, such as the last sentence of a command."""
    handler = _ours()
    if handler is not None:
        handler.write(text)
    else:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
            sys.stderr.flush()


def descriptor() -> int:
    """A descriptor for code that cannot use a handler; it does not block, where that is possible."""
    handler = _ours()
    return handler.descriptor if handler is not None else 2


def open_standard_descriptors() -> None:
    """Open the null device for each that is closed: else the next file that is opened would get its number."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
            setattr(sys, f"__{name}__", getattr(sys, name))


def setup_logging(level: str, form: Literal["human", "json"]) -> None:
    """Send everything at `level` and above to standard error. Replaces what an earlier call set up."""
    handler: logging.Handler
    try:
        handler = NeverWaits(sys.stderr.fileno())
    except (io.UnsupportedOperation, OSError):  # a test's
        handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Json() if form == "json" else Redacted())
    handler.addFilter(RepeatLimit())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # Libraries report to us through exceptions; their own lines help only when debugging them.
    for library in ("aiohttp.access", "asyncio", "redis"):
        logging.getLogger(library).setLevel(level if level == "DEBUG" else "WARNING")
