"""An outage as its log shows it: one line at its beginning, one each minute, one at its end."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

AGAIN_S: Final = 60.0
_ANSWER: Final = re.compile(r"SQLSTATE (?!57P|08)| refuses ", re.ASCII)
"""A server that says why not is not away, unless it says that it goes (57P01, 08006 and the like)."""


class Outage:
    """Of one server, as one process sees it. Call `look` as often as you like: a second or an attempt."""

    def __init__(self, server: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._server = server
        self._clock = clock
        self._since: float | None = None
        self._told = 0.0
        self._does = ""  # is away, or refuses

    def look(self, why: str | None, so: str = "", *, answered_at: float = math.inf) -> None:
        """`why` it is away, or refuses; None when nothing says so. `so`: what that means by now, for the line of each
        minute.

        `answered_at`, by the same clock: an outage ends with an answer, not because those that waited are gone.
        """
        now = self._clock()
        if why is None and self._since is not None and answered_at <= self._since:
            why = ""
        if why is None:
            if self._since is not None:
                again = "goes on" if self._does == "refuses" else "is back"
                log.info("%s %s after %s", self._server, again, span(now - self._since))
            self._since = None
        elif self._since is None:
            self._since = self._told = now
            self._does = "refuses" if _ANSWER.search(why) else "is away"
            log.warning("%s %s: %s", self._server, self._does, why)
        elif now - self._told >= AGAIN_S:
            self._told = now
            does = self._does.removeprefix("is ")
            log.warning("%s %s for %s%s", self._server, does, span(now - self._since), f", {so}" if so else "")


def span(seconds: float) -> str:
    """For a sentence: 40 s, 3 min, 2.5 h, 4 d."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7_200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3_600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} d"
