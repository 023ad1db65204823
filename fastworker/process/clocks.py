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


def _words(ahead: timedelta) -> str:
    minutes = abs(ahead) / timedelta(minutes=1)
    size = f"{minutes:.0f} minutes" if minutes < 180 else f"{minutes / 60:.0f} hours"
    return f"{size} {'ahead' if ahead > timedelta() else 'behind'}"
