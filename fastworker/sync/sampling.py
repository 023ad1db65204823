"""Truth: random accounts compared with their repositories, and what share of the rows of each table agrees.

Each account is compared both ways, what is missing and what should not be there. What differs is looked at again after
a while, since a repository that changes meanwhile, or an event on its way, is no difference.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import TYPE_CHECKING, Final

import msgspec

from fastworker.errors import ExitCode
from fastworker.process.backoff import pause
from fastworker.store.repos import SAMPLE, Listed
from fastworker.sync.report import Report
from fastworker.sync.settle import Settled

if TYPE_CHECKING:
    import asyncio

    from fastworker.sync.many import Scene

AGAIN_S: Final = 10.0
RECENT: Final = 500
_LETTERS: Final = "234567abcdefghijklmnopqrstuvwxyz"
_Z: Final = 1.959964  # of 95 %
_DRAW: Final = """
SELECT did FROM (
    (SELECT did, 0 AS turn FROM public.users WHERE did >= $1 ORDER BY did LIMIT 1)
    UNION ALL (SELECT did, 1 FROM public.users ORDER BY did LIMIT 1)
) AS a ORDER BY turn LIMIT 1
"""
_ACTIVE: Final = f"""
SELECT author_did FROM (SELECT author_did FROM public.posts ORDER BY indexed_at DESC LIMIT {RECENT}) AS newest
ORDER BY random() LIMIT 1
"""


class Truth(msgspec.Struct):
    """Of one table. `low` and `high`: between these it lies with 95 %, as if each row had been drawn by itself."""

    compared: int
    missing: int
    different: int
    extra: int
    truth: float | None
    low: float | None
    high: float | None


class Looked(Report):
    """Keeps what was found of each account; says nothing."""

    def __init__(self) -> None:
        super().__init__(dry_run=True)
        self.found: dict[str, Settled] = {}
        self.hosts: dict[str, str] = {}
        self.not_judged: Counter[str] = Counter()

    def add(self, settled: Settled) -> None:
        super().add(settled)
        if not settled.refused:
            self.found[settled.did] = settled

    def gone(self, found: Settled) -> None:
        self.found[found.did] = found

    def failed(self, name: str, why: str) -> None:
        self.failures += 1
        if name not in self.found:
            self.not_judged[why.partition(":")[0]] += 1

    def end(self) -> ExitCode:
        self.close()
        return ExitCode.DONE

    @property
    def differing(self) -> list[str]:
        return [did for did, one in self.found.items() if one.differences]


async def draw(scene: Scene, many: int) -> list[str]:
    """A did:plc is random text, so the next one after a random place is a fair draw."""
    found: dict[str, None] = {}
    for _ in range(3 * many):
        place = "did:plc:" + "".join(random.choices(_LETTERS, k=24))
        did = await scene.queue.value(_DRAW, place)
        if did is not None:
            found[did] = None
        if did is None or len(found) >= many:
            break
    return list(found)


async def draw_active(scene: Scene) -> list[str]:
    """One of those who have posted lately."""
    did = await scene.queue.value(_ACTIVE)
    return [] if did is None else [did]


async def look(scene: Scene, dids: list[str], stop: asyncio.Event) -> Looked:
    from fastworker.sync.many import Work, settle_all  # noqa: PLC0415 - it needs the extra `verify`

    looked, listed = Looked(), Listed(dids)
    await settle_all(scene, looked, Work(priority_max=SAMPLE), stop, only=listed)
    looked.hosts = listed.hosts
    return looked


async def look_twice(scene: Scene, dids: list[str], stop: asyncio.Event) -> Looked:
    """What differs is looked at again after a while; what agrees then never differed."""
    looked = await look(scene, dids, stop)
    if looked.differing and not await pause(AGAIN_S, stop):
        again = await look(scene, looked.differing, stop)
        looked.found |= again.found
    return looked


def tables_of(found: list[Settled]) -> dict[str, Truth]:
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in ("compared", "missing", "different", "extra")}
    for one in found:
        for kind, counter in counts.items():
            counter.update(getattr(one, kind))
    return {
        table: truth_of(*(counts[kind][table] for kind in counts))
        for table in sorted({table for counter in counts.values() for table in counter})
    }


def truth_of(compared: int, missing: int, different: int, extra: int) -> Truth:
    """`compared`: records of the repositories; of these some are missing or different. `extra`: only stored."""
    many = compared + extra
    if not many:
        return Truth(0, 0, 0, 0, None, None, None)
    share = (compared - missing - different) / many
    low, high = wilson(share, many)
    return Truth(compared, missing, different, extra, share, low, high)


def wilson(share: float, many: int) -> tuple[float, float]:
    """Between which the share of all lies with 95 %, when this is the share of so many."""
    middle = (share + _Z * _Z / (2 * many)) / (1 + _Z * _Z / many)
    half = _Z * math.sqrt(share * (1 - share) / many + _Z * _Z / (4 * many * many)) / (1 + _Z * _Z / many)
    return max(0.0, middle - half), min(1.0, middle + half)
