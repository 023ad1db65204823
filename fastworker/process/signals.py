"""SIGTERM and SIGINT for a service that is one process: the first asks it to stop, the second ends it now."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

SECOND_TIME: Final = 130
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_on_signals() -> Iterator[asyncio.Event]:
    """The event that the first signal sets."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def told() -> None:
        if stop.is_set():
            os._exit(SECOND_TIME)
        stop.set()

    for number in _SIGNALS:
        loop.add_signal_handler(number, told)
    try:
        yield stop
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
