"""The simulated network: seeded and deterministic, it makes the bytes that a relay sends and says what they mean.

The same arguments give the same bytes in every process: all chance comes from one seeded generator, and time is a
counter. Nothing here imports the code under test.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Literal, Protocol

from fastworker.testing.production import PRODUCTION, SURGE, Production
from fastworker.testing.repo import START_SEQ, START_TIME, Clock, SimFrame
from fastworker.testing.world import World


class Traffic(Protocol):
    def step(self) -> list[SimFrame]: ...


class Network:
    """`accounts`, `history` (records that a repository held before, on average) and the seed fix the world."""

    def __init__(
        self,
        seed: int | str,
        *,
        mix: Literal["production", "surge"] = "production",
        accounts: int | None = None,
        history: int | None = None,
        start_seq: int = START_SEQ,
        start_time: datetime = START_TIME,
    ) -> None:
        self.clock = Clock(start_seq, start_time)
        self.world = World(seed, self.clock, accounts=accounts or 16_000, history_size=history or 0)
        self._traffic: Traffic = Production(self.world, SURGE if mix == "surge" else PRODUCTION)

    def step(self) -> list[SimFrame]:
        """The next frames, at least one; more than one where one thing that happens is several events."""
        return self._traffic.step()

    def frames(self, count: int) -> Iterator[SimFrame]:
        """The next `count` frames."""
        left = count
        while left > 0:
            for frame in self.step()[:left]:
                left -= 1
                yield frame
