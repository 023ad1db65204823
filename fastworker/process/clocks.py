"""Whose clock is off. What is forgotten for good depends on the time, so no single clock decides it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Final

OFF: Final = timedelta(minutes=10)
"""By which clocks may differ."""


def which_is_off(clocks: Mapping[str, datetime]) -> str:
    """A sentence that names each clock far from the middle one; empty: they agree. At least three, read together."""
    middle = sorted(clocks.values())[len(clocks) // 2]
    words = [f"{name}'s is {_words(at - middle)}" for name, at in clocks.items() if abs(at - middle) > OFF]
    return f"clocks disagree: {', '.join(words)}" if words else ""


def ids_ahead(newest: datetime, now: datetime) -> str:
    """A sentence where the stream's ids are far ahead of Redis's clock: once, that clock was, and ids never go back."""
    if newest - now <= OFF:
        return ""
    return (
        f"the stream's ids are {_words(newest - now)} of Redis's clock, and dates of events are judged by them: when "
        "all of it is finished, delete the stream, and the reader makes another"
    )


def _words(ahead: timedelta) -> str:
    minutes = abs(ahead) / timedelta(minutes=1)
    size = f"{minutes:.0f} minutes" if minutes < 180 else f"{minutes / 60:.0f} hours"
    return f"{size} {'ahead' if ahead > timedelta() else 'behind'}"
