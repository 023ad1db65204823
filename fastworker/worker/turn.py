"""A stretch of work between two turns of the loop."""

from __future__ import annotations

import asyncio
import time

TURN_S = 0.008  # decoding at a stretch, before the loop gets its turn


class Turn:
    """Work at a stretch, by the clock: a hostile entry takes as long as a thousand others. Ask after each entry."""

    __slots__ = ("_ends",)

    def __init__(self) -> None:
        self._ends = time.perf_counter() + TURN_S

    def is_over(self) -> bool:
        return time.perf_counter() >= self._ends

    async def next(self) -> None:
        await asyncio.sleep(0)
        self._ends = time.perf_counter() + TURN_S
