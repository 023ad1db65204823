"""What one consumer was given: what of it is not settled, and what of it is not recorded in Redis yet."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Final

from fastworker.stream.ids import id_order

_MISSING: Final = object()


class Holding:
    def __init__(self) -> None:
        self.ids: dict[str, None] = {}  # that were read and that no ack was sent for
        self._in_order = True  # they are in the order of the stream
        self._lowest_told = ""
        self._must_tell = False
        self._is_doubtful = False  # another server may have given us what is not recorded
        self._reads: list[str] = []  # first and last id of each read that is not recorded yet

    def read(self, ids: Sequence[str]) -> None:
        """A read returned these entries; all between the first and the last are ours, except what somebody removed."""
        self._reads += _runs(ids)
        self._hold(ids)

    def take_over(self, ids: Sequence[str]) -> None:
        """These were delivered before: to another consumer, or to us in a reply that was lost."""
        self._reads += [one for one in ids for _ in ("first", "last")]
        self._hold(ids)

    def let_go(self, ids: Sequence[str]) -> None:
        """They end. What another server gave us is told here, too, however long ago that was."""
        for entry_id in ids:
            # mutant: what was held of another server ends untold
            if self.ids.pop(entry_id, _MISSING) is _MISSING:
                self._reads += [entry_id, entry_id]
                self._is_doubtful = True
        self._in_order = self._in_order or not self.ids

    def forget(self) -> None:
        """Redis may not know what of this was given to us: it is asked again, and what ends is told again."""
        self.ids.clear()
        self._reads.clear()
        self._in_order = self._must_tell = True

    @property
    def lowest(self) -> str:
        """Of the ids that we hold; empty: none."""
        if self._in_order:
            return next(iter(self.ids), "")
        return min(self.ids, key=id_order, default="")

    @property
    def is_told(self) -> bool:
        """Nothing is to be recorded, except that what was recorded is settled."""
        return not (self._reads or self._must_tell) and self.lowest in ("", self._lowest_told)

    @asynccontextmanager
    async def telling(self) -> AsyncIterator[tuple[str, str]]:
        """The lowest id that we hold, and what was read (stream/lua/hold.lua): kept where it could not be told."""
        reads, self._reads = self._reads, []
        lowest, was_doubtful = self.lowest, self._is_doubtful
        try:
            yield lowest, " ".join(["?", *reads] if was_doubtful else reads)
        except BaseException:
            self._reads = reads + self._reads
            raise
        self._lowest_told = lowest
        self._is_doubtful = False
        self._must_tell = False

    def _hold(self, ids: Sequence[str]) -> None:
        newest = next(reversed(self.ids), None)
        if newest is not None and id_order(ids[0]) < id_order(newest):
            self._in_order = False  # adopted, or read back
        self.ids.update(dict.fromkeys(ids))


def _runs(ids: Sequence[str]) -> list[str]:
    """First and last id of each run. A number that is left out (stream/lua/next_id.lua) ends one."""
    numbers = [int(ids[0].partition("-")[2]), int(ids[-1].partition("-")[2])]
    # mutant: what was removed between two entries of a read is taken for read
    if numbers[1] - numbers[0] < len(ids):
        return [ids[0], ids[-1]]
    found = [ids[0]]
    for before, after in pairwise(ids):
        if int(after.partition("-")[2]) > int(before.partition("-")[2]) + 1:
            found += [before, after]
    return [*found, ids[-1]]
