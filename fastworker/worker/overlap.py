"""What the pipelines of one worker hold just now, so that their flushes need not wait for each other in PostgreSQL.

Two flushes about one record, or one unique pair, are right whatever their order (docs/invariants.md), but the later
one waits for the earlier one's commit: hundreds of milliseconds in which a core is idle. So whoever takes an entry
marks its records and pairs, and leaves an entry alone for a moment whose records another pipeline has marked.

Marks are hints, not locks: one byte per hash in memory that the processes share. A race, a collision of hashes or the
marks of a killed process cost a postponement, a missing mark costs a wait; neither changes a row. Other hosts are not
seen.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable

from fastworker.table.batch import Mapped
from fastworker.table.schema import TABLES

BITS = 22  # of a hash: 4 MB, in which a look meets one of 20,000 strange marks by chance in one of 200 cases
_MASK = (1 << BITS) - 1
_PAIRS = {table.name: tuple(map(table.index, table.pair)) for table in TABLES if table.hot and table.pair}
NAMES = 255


class Marks:
    """The shared memory; made before the fork, so that children hash texts alike."""

    def __init__(self) -> None:
        self.memory = memoryview(mmap.mmap(-1, 1 << BITS))


class Overlap:
    """One pipeline's view of the marks."""

    def __init__(self, marks: Marks, number: int) -> None:
        self._marks = marks.memory
        self._me = 1 + number % NAMES
        left, mine = bytes(self._marks), bytes((self._me,))
        if mine in left:  # of a process that had this number and was killed
            self._marks[:] = left.replace(mine, b"\0")

    def take(self, keys: Iterable[int]) -> bool:
        """Mark them all, or none if another pipeline has marked one."""
        marks, me = self._marks, self._me
        for key in keys:
            if marks[key] and marks[key] != me:
                return False
        for key in keys:
            marks[key] = me
        return True

    def give_back(self, keys: Iterable[int]) -> None:
        marks, me = self._marks, self._me
        for key in keys:
            if marks[key] == me:
                marks[key] = 0


def keys_of(mapped: Mapped) -> list[int]:
    """A hash of each record, and of each unique pair of the hot tables."""
    keys = []
    for change in mapped.changes:
        keys.append(hash(change.uri) & _MASK)
        row = change.row
        if row is not None and (pair := _PAIRS.get(change.table.name)) is not None:
            keys.append(hash((change.table.name, row[pair[0]], row[pair[1]])) & _MASK)
    return keys
