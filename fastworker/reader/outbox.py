"""Between receiving and appending."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from fastworker.stream.chunk import Chunk

OUTBOX_ITEMS: Final = 8_000
OUTBOX_BYTES: Final = 16_000_000


class Outbox:
    """Chunks between the receiver and the appender, bounded; the last one is still being filled."""

    def __init__(self, chunk_items: int, chunk_bytes: int) -> None:
        self._chunk_items = chunk_items
        self._chunk_bytes = chunk_bytes
        self._sealed: deque[Chunk] = deque()
        self._sealed_items = 0
        self._sealed_bytes = 0
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.filling = Chunk()
        self.blocked = False
        self.on_full: Callable[[Chunk], None] | None = None
        """Told of each chunk that is full, before it is taken."""

    @property
    def items(self) -> int:
        return self._sealed_items + self.filling.items

    async def put(self) -> None:
        """Call after adding to `filling`; waits while the outbox is full."""
        chunk = self.filling
        if not self._wake.is_set():
            self._wake.set()
            self._idle.clear()
        if chunk.items >= self._chunk_items or chunk.bytes >= self._chunk_bytes:
            await self.seal()

    async def seal(self) -> None:
        """What comes next goes into another chunk."""
        chunk = self.filling
        if self.on_full is not None:
            self.on_full(chunk)
        self._sealed.append(chunk)
        self._sealed_items += chunk.items
        self._sealed_bytes += chunk.bytes
        self.filling = Chunk()
        if self._sealed_items >= OUTBOX_ITEMS or self._sealed_bytes >= OUTBOX_BYTES:
            self._room.clear()
            self.blocked = True
            await self._room.wait()
            self.blocked = False

    async def take(self) -> Chunk:
        """The oldest chunk, as full as it is by now; waits for the first item."""
        if not self._sealed and self.filling.seq is None and not self.filling.items:
            self._wake.clear()
            self._idle.set()
            await self._wake.wait()
        if not self._sealed:
            chunk, self.filling = self.filling, Chunk()
            return chunk
        chunk = self._sealed.popleft()
        self._sealed_items -= chunk.items
        self._sealed_bytes -= chunk.bytes
        self._room.set()
        return chunk

    @property
    def waiting(self) -> bool:
        """Whether a full chunk is ready."""
        return bool(self._sealed)

    async def drained(self) -> None:
        """Wait until everything that was put has been taken and `take` was called again."""
        await self._idle.wait()
