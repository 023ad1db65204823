"""SIGTERM and SIGINT for a service that is one process: the first asks it to stop, the second ends it now.

So does the first one, after a time: whatever the service waits for then, nobody has to kill it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from fastworker.log import flush_waiting
from fastworker.process.child import LEFT_S, log_tasks

SECOND_TIME: Final = 130
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)

log = logging.getLogger(__name__)


def nothing_to_replace_yet() -> None:
    """What an operator asks of a supervisor, before there is one, does not end the process: it may wait for servers."""
    for number in (signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR1):
        signal.signal(number, lambda _number, _frame: None)


@contextmanager
def stop_on_signals(*, left_s: float = LEFT_S) -> Iterator[asyncio.Event]:
    """The event that the first signal sets. `left_s`: how long the process may live then, its closing included."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def told() -> None:
        if stop.is_set():
            os._exit(SECOND_TIME)
        stop.set()
        loop.call_later(left_s, give_up)

    def give_up() -> None:
        log.error("Not ended %g s after the signal: giving up", left_s)
        log_tasks()
        flush_waiting()
        os._exit(SECOND_TIME)

    for number in _SIGNALS:
        loop.add_signal_handler(number, told)
    try:
        yield stop
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
