"""What a process was at when it died, so that one entry cannot kill process after process for ever.

After a death that nobody asked for, what somebody left behind is tried while its process holds nothing else: a piece
at once, and entries of a piece that killed, alone. The entry that kills three processes which held only it, each of
which had settled many others before, is set aside. Where memory is short or the machine is at fault, processes die at
any entry, and do not get so far.

On a quiet stream there are no others. There a process tries what has killed after it has lived for a while, and has
worked on an entry of ours of the same size. Five that die then, each of which had lived four times as long without it
as with it, tell as much.

The memory is made by the parent before it forks. The parent writes down deaths; a child says in its slot what it
tries, and takes back what it has settled.
"""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Final, NamedTuple, Protocol

from fastworker.event import Commit, Op
from fastworker.event.entry import encode_json
from fastworker.process.board import Slot, now_ms
from fastworker.stream.ids import id_order

DEATHS_MAX: Final = 3
QUIET_DEATHS_MAX: Final = 5
"""By chance alone a death is in the last fifth of a life once in five times: five in a row once in 3,000."""
LIVED: Final = 4
ALERT_MS: Final = 600_000
"""After a death: so long is what was left behind tried by itself."""
CONTROL_ENTRIES: Final = 50
"""A process tries what has killed only after it has settled so many others: else its death would tell nothing."""
PATIENCE_MS = (2_000, 120_000)
"""On a stream so quiet that there are not so many: it is tried by a process of this age, four times as old each time.
The watchdog takes ten seconds to kill."""
TICK_S: Final = 0.02
_CELLS: Final = 256
_WORDS: Final = 7  # of a cell: first and last id, two words each; all deaths, those that count, those on a quiet stream
_MAX: Final = (1 << 63) - 1
_PARTITION_BITS: Final = 48  # above the numbers of one millisecond


class Record(NamedTuple):
    """Deaths with one entry in hand; `alone`: of processes that held only it, and had settled others before.

    `quiet`: of processes that held only it, and had lived well without others to settle.
    """

    deaths: int = 0
    alone: int = 0
    quiet: int = 0

    @property
    def is_poison(self) -> bool:
        return self.alone >= DEATHS_MAX or self.quiet >= QUIET_DEATHS_MAX

    @property
    def patience_ms(self) -> int:
        first, last = PATIENCE_MS
        return min(last, first << 2 * min(max(0, self.deaths - 1), 10))


class Suspects:
    """The shared memory: a moment until which to be careful, and a ring of cells."""

    def __init__(self) -> None:
        self._words = memoryview(mmap.mmap(-1, (2 + _CELLS * _WORDS) * 8)).cast("q")

    @property
    def alert(self) -> bool:
        return self._words[0] > now_ms()

    def note_death(self, slot: Slot) -> None:
        """The parent's: a child died, and its slot still says what it tried."""
        self._words[0] = now_ms() + ALERT_MS
        ids = [slot.get(name) for name in ("tried_first_ms", "tried_first_n", "tried_last_ms", "tried_last_n")]
        if not any(ids):
            return
        cells = range(2, len(self._words), _WORDS)
        at = next((at for at in cells if self._words[at : at + 4].tolist() == ids), None)
        if at is None:
            at = 2 + self._words[1] % _CELLS * _WORDS
            self._words[1] += 1
            for n, word in enumerate([*ids, 0, 0, 0]):
                self._words[at + n] = word
        self._words[at + 4] += 1
        if ids[:2] != ids[2:]:
            return
        tried_at = slot.get("tried_at_ms")
        if slot.get("tried_with_control"):
            self._words[at + 5] += 1
        elif tried_at - slot.get("started_ms") >= max(PATIENCE_MS[0], LIVED * (now_ms() - tried_at)):
            self._words[at + 6] += 1

    def records(self, entry_ids: Iterable[str]) -> dict[str, Record]:
        """Of those that were tried when a process died."""
        words = self._words.tolist()
        cells = [words[at : at + _WORDS] for at in range(2, len(words), _WORDS) if words[at] or words[at + 1]]
        found: dict[str, Record] = {}
        for entry_id in entry_ids:
            ms, n = _id_words(entry_id)
            for first_ms, first_n, last_ms, last_n, deaths, alone, quiet in cells:
                if (first_ms, first_n) <= (ms, n) <= (last_ms, last_n):
                    known = found.get(entry_id, Record())
                    found[entry_id] = Record(known.deaths + deaths, max(known.alone, alone), max(known.quiet, quiet))
        return found

    def forget(self, entry_id: str) -> None:
        """The entry was settled: it is no suspect."""
        ids = [*_id_words(entry_id)] * 2
        for at in range(2, len(self._words), _WORDS):
            if self._words[at : at + 4].tolist() == ids:
                for n in range(_WORDS):
                    self._words[at + n] = 0


def like_it(fields: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """A harmless entry of the same size: a process that dies of it would die of any."""
    record = {"$type": "control.invalid", "text": "a" * sum(map(len, fields.values()))}
    op = Op("create", "invalid.control.record", "self", None, None, record)
    return dict(encode_json(Commit(1, "did:plc:" + "a" * 24, None, None, [op], [])) or ())


def name_of(entry_id: str, partition: int) -> str:
    """Of an entry among those of all partitions: ids of two of them may be equal."""
    if not partition:
        return entry_id
    ms, n = id_order(entry_id)
    return f"{ms}-{n + (partition << _PARTITION_BITS)}"


def say_trying(slot: Slot, entry_ids: list[str], *, with_control: bool) -> None:
    """Note which entries this process tries; the parent reads it when the process is dead. Empty: none."""
    first, last = (_id_words(entry_ids[n]) if entry_ids else (0, 0) for n in (0, -1))
    slot.set(tried_first_ms=first[0], tried_first_n=first[1], tried_last_ms=last[0], tried_last_n=last[1])
    slot.set(tried_with_control=int(with_control), tried_at_ms=now_ms())


def _id_words(entry_id: str) -> tuple[int, int]:
    ms, n = id_order(entry_id)
    return min(ms, _MAX), min(n, _MAX)


class Member(Protocol):
    """What the pipelines of one process need of each other."""

    def got_on(self) -> None: ...

    @property
    def is_still(self) -> bool:
        """Whether it holds no entry, and is not reading."""


class Quiet:
    """Lets one pipeline of a process be the only one that holds anything."""

    def __init__(self) -> None:
        self.members: list[Member] = []
        self._holder: Member | None = None

    @property
    def wanted(self) -> bool:
        """Whether pipelines should read nothing now: one of them wants to be alone, or is."""
        return self._holder is not None

    @asynccontextmanager
    async def alone(self, me: Member) -> AsyncIterator[None]:
        while self._holder is not None:
            await self.tick(me)
        self._holder = me
        try:
            while not all(other.is_still for other in self.members if other is not me):
                await self.tick(me)
            yield
        finally:
            self._holder = None

    async def tick(self, member: Member) -> None:
        """Waiting for another pipeline counts as progress: if that one is stuck, its own progress shows it."""
        member.got_on()
        await asyncio.sleep(TICK_S)
