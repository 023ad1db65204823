"""The slots of a stream together: the whole stream, or on a Cluster one for each partition.

No script reaches two of them. So each has its own lease and cursor, and gets its part of a chunk by itself; the first
one, whose cursor others know, comes last. Who begins, begins at the lowest of all cursors, and passes over, slot by
slot, what is there already (docs/decisions/0005-partitions.md).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Iterator, Sequence
from typing import TypeVar, cast

import msgspec
from redis.asyncio import Redis

from fastworker.errors import ConfigError, Unreachable
from fastworker.stream.chunk import Chunk, by_partition
from fastworker.stream.client import translating
from fastworker.stream.keys import has_slots, in_slot
from fastworker.stream.partitions import layout
from fastworker.stream.slot import Cursors, Partition, ReaderLeaseLost, Slot, StreamBroken

log = logging.getLogger(__name__)

T = TypeVar("T")


class PartitionsMayChange(Exception):
    """All cursors are equal: a term that begins now has as many partitions as it is told to have."""


class Position(msgspec.Struct, frozen=True):
    """Where to go on at one relay. `seq` None: at its tip. `switched_from`: the other relay that was read before.
    `is_partial`: a partition has lost its cursor, and what it had before `seq` may be lost with it."""

    seq: int | None
    switched_from: str | None
    is_partial: bool = False


def seq_of(key: str, text: str | None) -> int | None:
    if text is not None and not (text.isdigit() and int(text) < 2**53):
        raise ConfigError(f"{key} holds {text[:40]!r}, which is not a cursor: delete it or correct it")
    return int(text) if text is not None else None


class Slots:
    """As one reader knows them. All methods raise `StreamUnavailable` while Redis cannot serve."""

    def __init__(self, redis: Redis, stream_key: str, cursor_key: str, group: str, token: str) -> None:
        self.parts = [Partition(redis, stream_key, group, 0)]
        self.all = [Slot(self.parts[0], cursor_key, token)]
        self.first = self.all[0]
        self._redis = redis
        self._stream = stream_key
        self._cursor_key = cursor_key
        self._group = group
        self._token = token
        self._has_slots = has_slots(stream_key)
        self._reopen_at: int | None = None
        self._is_sure = True  # that what a slot's cursor says is there is so

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.all)

    def know(self, count: int) -> None:
        """There are so many partitions. Of those that were known before we remember how far they were finished."""
        if not self._has_slots:
            del self.parts[count:], self.first.parts[count:]
        for number in range(len(self.parts), count):
            part = Partition(self._redis, self._stream, self._group, number)
            self.parts.append(part)
            if self._has_slots:
                self.all.append(Slot(part, in_slot(self._cursor_key, number), self._token))
            else:
                self.first.parts.append(part)

    async def open(self, count: int) -> int:
        """For a new term: how many partitions there can be now.

        A cursor says what its partition has of the accounts that belong there. With another number they belong to
        others, so the number changes where all cursors are equal: until then it stays, and the append after that
        raises PartitionsMayChange. Each slot says for which number its cursor is: where one is older than the others,
        as after a failover, all begin again at the lowest.
        """
        self._reopen_at = None
        if not self._has_slots:
            return count
        found = await layout(self._redis, self._stream)
        self.know(max(count, found.known))
        every = await self.cursors("")
        first, known = every[0], every[: found.known]
        if len(known) > 1 and not any(one.layout for one in known[1:]) and await self._is_on_one_node():
            if found.written > 1:
                raise Unreachable(
                    f"The partitions of {self._stream} are those of a release that has all of them on one node. Start "
                    "its reader with FASTWORKER_STREAM_PARTITIONS=1, wait until nothing waits in the others, then this "
                    "one"
                )
            known = known[:1]
        relay = first.relay or ""
        with_cursor = [one for one in known if one.cursor and one.relay == first.relay]
        seqs = [seq for one in with_cursor if (seq := seq_of(self._cursor_key, one.cursor)) is not None]
        # mutant: cursors of an older number of partitions are believed
        is_one_number = all(one.written == found.written for one in with_cursor)
        # mutant: the number of partitions changes while their cursors differ
        is_level = len(with_cursor) == len(known) and len(set(seqs)) == 1
        # What was unread in one that came back empty, and gets nothing any more, is in another when it comes again.
        self._is_sure = all(one.cursor for one in known[found.written :])
        if not first.cursor or not self._is_sure:  # with the first went what was said of the partitions
            await self._level(None, relay, count)
        elif relay and (await self.first.cursors(relay)).kept not in (None, first.cursor):  # moved by hand
            await self._level(int(first.cursor), relay, count)
        elif not is_one_number or (is_level and count != found.written):
            await self._level(min(seqs), relay, count)
        elif count != found.written:
            self._reopen_at = max(seqs)
            log.info("%d partitions instead of %d as soon as all have come as far", count, found.written)
            return found.written
        return count

    async def _level(self, seq: int | None, relay: str, count: int) -> None:
        text = f"{count} {len(self.all)}"
        for slot in self.all[1:]:
            await slot.level(seq, relay, text)
        if seq is not None:  # what is said of all is the first one's, and said later
            await self.first.level(seq, relay, "")

    async def _is_on_one_node(self) -> bool:
        async with translating(self._redis):
            return bool(await self._redis.exists(f"{self._stream}:1"))

    async def acquire(self) -> bool:
        """Take the lease, or keep it; False while another reader has it."""
        if self._has_slots:
            self.know((await layout(self._redis, self._stream)).known)
        for slot in self.all:
            if not await slot.acquire():
                return False
        return True

    async def cursors(self, host: str) -> list[Cursors]:
        return await of_every([slot.cursors(host) for slot in self.all])

    def place(self, host: str, found: list[Cursors], first: int | None) -> Position:
        """Where to go on at this relay: at the slot that is least far. `first`: where the first one is."""
        switched_from = found[0].owner if found[0].owner != host else None
        if len(self.all) == 1:
            return Position(first, switched_from)
        others = zip(self.all[1:], found[1:], strict=True)
        seqs = [first, *(seq_of(slot.cursor_key, one.of(host)) for slot, one in others)]
        known = [seq for seq in seqs if seq is not None]
        if switched_from is not None:  # since then the partitions may have changed
            return Position(min(known) if first is not None else None, switched_from)
        if found[0].relay == host and found[0].kept not in (None, found[0].cursor):  # moved by hand
            return Position(first, None)
        for slot, one, seq in zip(self.all, found, seqs, strict=True):
            # mutant: what a slot has already is appended again
            slot.there = seq if one.owner in (None, host) and self._is_sure else None
        return Position(min(known, default=None), None, is_partial=0 < len(known) < len(seqs))

    @property
    def places(self) -> list[int]:
        """Seqs up to which some slots have everything and others have not: no chunk goes beyond one."""
        return sorted({slot.there for slot in self.all if slot.there is not None}) if len(self.all) > 1 else []

    async def append(self, chunk: Chunk, host: str, *, max_len: int, dead_letter_maxlen: int) -> bool:
        """As Feed.append. Raises PartitionsMayChange before anything is done."""
        first, *others = self.all
        if (at := self._reopen_at) is not None and all(int(slot.cursor or 0) >= at for slot in self.all):
            raise PartitionsMayChange
        limits = {"max_len": max_len, "dead_letter_maxlen": dead_letter_maxlen}
        body, entries = chunk.body, chunk.entries
        if others:
            if entries and entries + sum(slot.length for slot in self.all) > max_len:
                return False
            pieces = by_partition(body)
            parts = [(slot, *pieces.get(number, (b"", 0))) for number, slot in enumerate(others, 1)]
            of_each = [
                slot.append(body, entries, chunk.seq, host, **limits)
                for slot, body, entries in parts
                if entries or chunk.seq is not None
            ]
            # mutant: the cursor that others know is ahead of a partition
            if not all(await of_every(of_each)):
                return False
            body, entries = pieces.get(0, (b"", 0))
        return await first.append(body, entries, chunk.seq, host, **limits)

    async def go_back(self, seq: int | None, host: str, gap: bytes, request: bytes) -> bool:
        """As Feed.go_back. A slot that has everything stays where it is."""
        concerned = [slot for slot in self.all if slot.is_broken or slot.request] or list(self.all)
        if gap and self.first not in concerned:
            concerned.append(self.first)  # it has the list of gaps
        for slot in concerned:
            if not await slot.go_back(seq, host, gap, slot.request or request):
                return False
        for slot in concerned:
            slot.forget()
        return True


async def of_every(awaitables: Sequence[Awaitable[T]]) -> list[T]:
    """All results. One slot that fails stops no other; what ends the reader's turn is raised before what passes."""
    found = await asyncio.gather(*awaitables, return_exceptions=True)
    errors = [one for one in found if isinstance(one, BaseException)]
    for error in sorted(errors, key=lambda one: not isinstance(one, ReaderLeaseLost | StreamBroken)):
        raise error
    return cast("list[T]", found)
