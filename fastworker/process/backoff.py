"""Waiting before another attempt: capped exponential backoff with jitter, interruptible by a stop."""

from __future__ import annotations

import asyncio
import random
import time


class Backoff:
    """Delays between attempts in one bad state; `reset` when the state is good again.

    The n-th delay is drawn from the upper half of `first * 2**n`, at most `cap` (seconds): spread enough that
    many processes do not return at once, never so small that a dead server is hammered.
    """

    def __init__(self, first: float = 0.1, cap: float = 10.0) -> None:
        self._first = first
        self._cap = cap
        self.attempts = 0
        self._since: float | None = None

    def next(self) -> float:
        """The next delay in seconds."""
        if self._since is None:
            self._since = time.monotonic()
        ceiling = min(self._cap, self._first * 2.0 ** min(self.attempts, 60))
        self.attempts += 1
        return ceiling * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        self.attempts = 0
        self._since = None

    @property
    def elapsed(self) -> float:
        """Seconds since the first delay of this bad state; 0 in a good one. Callers hold it against a budget."""
        return 0.0 if self._since is None else time.monotonic() - self._since

    async def wait(self, stop: asyncio.Event, at_least: float = 0.0) -> bool:
        """Sleep for the next delay (or `at_least`, what a server asked for); True when stopped meanwhile."""
        return await pause(max(at_least, self.next()), stop)


async def pause(seconds: float, stop: asyncio.Event) -> bool:
    """Sleep, but not past a stop; True when stopped."""
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return False
    return True
