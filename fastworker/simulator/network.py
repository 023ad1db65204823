"""The simulated network: seeded and deterministic, it makes the bytes that a relay sends and says what they mean.

The same arguments give the same bytes in every process: all chance comes from one seeded generator, and time is a
counter. Nothing here imports the code under test.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Literal, Protocol

from fastworker.simulator.adversary import Adversary
from fastworker.simulator.hostile import hostile_frames
from fastworker.simulator.production import PRODUCTION, SURGE, Production
from fastworker.simulator.repo import (
    START_SEQ,
    START_TIME,
    Block,
    Clock,
    LiveClock,
    Lost,
    Repo,
    SimFrame,
    repo_to_frames,
)
from fastworker.simulator.world import World

__all__ = ["Block", "Clock", "LiveClock", "Lost", "Network", "Repo", "SimFrame", "hostile_frames", "repo_to_frames"]

Mix = Literal["production", "surge", "adversarial"]


class Traffic(Protocol):
    def step(self) -> list[SimFrame]: ...


class Network:
    """The seed, `mix`, `accounts` and `history` fix everything that will ever happen.

    `history` is the number of records that a repository held before, on average, and makes frames as large as real
    ones: 1.2 KB at 0, 4.2 KB at 2,000, 5.5 KB at 14,000 (which takes some seconds to make). `weights` replaces some of
    the mix's: shares of collections in production and surge (`production.PRODUCTION`), of moves in the adversarial mix
    (`adversary.ADVERSARIAL`). `signed`: commits are really signed, and repositories can be exported (hosts.py).
    `clock` replaces the counter; with `LiveClock` the bytes are others each time. `records_max`: at about so many
    records the busiest accounts fall silent and new ones take their places, so that it can go on for ever (production
    and surge; the adversary's few accounts do not grow).
    """

    def __init__(
        self,
        seed: int | str,
        *,
        mix: Mix = "production",
        accounts: int | None = None,
        history: int | None = None,
        weights: Mapping[str, float] | None = None,
        signed: bool = False,
        relay: str = "sim.test",
        start_seq: int = START_SEQ,
        start_time: datetime = START_TIME,
        clock: Clock | None = None,
        records_max: int | None = None,
    ) -> None:
        adversarial = mix == "adversarial"
        self.relay = relay
        self.clock = clock or Clock(start_seq, start_time)
        self.world = World(
            seed,
            self.clock,
            accounts=accounts or (8 if adversarial else 16_000),
            history_size=(32 if adversarial else 0) if history is None else history,
            signed=signed,
        )
        self._traffic: Traffic
        if adversarial:
            self._traffic = Adversary(self.world, weights or {})
        else:
            shares = {**(SURGE if mix == "surge" else PRODUCTION), **(weights or {})}
            self._traffic = Production(self.world, shares, records_max)

    def step(self) -> list[SimFrame]:
        """The next frames, at least one; more than one where one thing that happens is several events."""
        return self._traffic.step()

    def frames(self, count: int) -> Iterator[SimFrame]:
        """The next `count` frames, less what the last step had too many."""
        left = count
        while left > 0:
            for frame in self.step()[:left]:
                left -= 1
                yield frame
