"""Where a pipeline's next entries come from: what its consumer still holds, what the dead left behind, what is new.

In this order, because the first two are older. Adopting is a kind of reading: no task of its own, no hand-over, and
what was adopted is settled by the same pipeline that would settle a new entry.
"""

from __future__ import annotations

import logging
import random
import time
from typing import Protocol

from fastworker.crashpoint import Step, crashpoint
from fastworker.process.board import Slot
from fastworker.stream.consumer import FOREIGN_IDLE_MS, LEASE_MS, Claimed, Consumer, Entry

log = logging.getLogger(__name__)

PIECE = 100  # entries per claim: half a megabyte as a rule, 5 MB of raw frames
SCAN_S = 10.0  # between two looks for dead consumers


class ClaimableStream(Protocol):
    """The part of `stream.consumer.WorkerStream` that entries come from."""

    @property
    def name(self) -> str: ...
    @property
    def backlog(self) -> bool: ...

    lost_reply: bool

    async def read(self, block_ms: int) -> list[Entry]: ...
    async def read_own(self, after: str, count: int = ...) -> tuple[list[Entry], str | None]: ...
    async def consumers(self) -> list[Consumer]: ...
    async def known_names(self) -> set[str]: ...
    async def claim(self, consumer: str, *, idle_ms: int, count: int = ...) -> Claimed: ...


class Intake:
    """The entries of one consumer, one bounded piece at a time."""

    def __init__(
        self,
        stream: ClaimableStream,
        slot: Slot,
        *,
        scan_s: float = SCAN_S,
        own_idle_ms: int = LEASE_MS,
        foreign_idle_ms: int = FOREIGN_IDLE_MS,
    ) -> None:
        self._stream = stream
        self._slot = slot
        self._scan_s = scan_s
        self._own_idle_ms = own_idle_ms
        self._foreign_idle_ms = foreign_idle_ms
        self._own_after: str | None = "0"
        self._suspects: list[tuple[str, int]] = []  # consumer and the idle time that makes its entries free
        self._scan_at = 0.0
        self._has_adopted = False  # the last piece was
        self.left_behind = False  # the last piece is what a consumer, us or another, did not get done

    @property
    def backlog(self) -> bool:
        """Whether there was more than the last piece."""
        return self._own_after is not None or self._stream.lost_reply or bool(self._suspects) or self._stream.backlog

    def look_again(self) -> None:
        """Read our own pending entries from the start: after a reply may have been lost on its way to us."""
        self._own_after = "0"

    async def next(self, block_ms: int) -> list[Entry]:
        """Entries to process; none after `block_ms` without a new one, or when a piece held only ghosts."""
        self.left_behind = True
        # mutant: a lost reply is not read again
        if self._stream.lost_reply:
            self._stream.lost_reply = False
            self.look_again()
        if self._own_after is not None:
            entries, self._own_after = await self._stream.read_own(self._own_after, PIECE)
            if entries or self._own_after is not None:
                return entries
        if not self._suspects and time.monotonic() >= self._scan_at:
            await self._scan()
        if self._has_adopted:  # what comes new does not wait until all is adopted that somebody left
            self._has_adopted = False
            if entries := await self._stream.read(1):
                self.left_behind = False
                return entries
        while self._suspects:
            name, idle_ms = self._suspects[-1]
            claimed = await self._stream.claim(name, idle_ms=idle_ms, count=PIECE)
            if claimed.found < PIECE:
                self._suspects.pop()
            if claimed.found:
                crashpoint(Step.IN_CLAIM)
                self._slot.add(claimed=len(claimed.entries), ghosts=claimed.ghosts)
                log.info("Adopted %d pending entries of %s (%d trimmed)", len(claimed.entries), name, claimed.ghosts)
            if claimed.entries:
                self._has_adopted = True
                return claimed.entries
        self.left_behind = False
        return await self._stream.read(block_ms)

    async def _scan(self) -> None:
        """Consumers that may be dead. The claim decides it: it looks at the lease and takes the entries in one step."""
        self._scan_at = time.monotonic() + self._scan_s * random.uniform(0.8, 1.2)
        ours = await self._stream.known_names()
        consumers = await self._stream.consumers()
        self._suspects = [
            (one.name, self._own_idle_ms if one.name in ours else self._foreign_idle_ms)
            for one in consumers
            if one.name in ours or (one.pending and one.idle_ms >= self._foreign_idle_ms)
        ]
        # Deleted by somebody: what it held and did not finish is found by what it said that it holds.
        deleted = ours - {one.name for one in consumers} - {self._stream.name}
        self._suspects += [(name, self._own_idle_ms) for name in sorted(deleted)]
