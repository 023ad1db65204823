"""`fastworker sample`: how much of the tables is as the network says: a truth ratio for each table, by random accounts.

Each account is compared both ways, what is missing and what should not be there. What differs is looked at again after
a while, since a repository that changes meanwhile, or an event on its way, is no difference. What is left is repaired.
"""

from __future__ import annotations

import asyncio
import math
import random
import sys
from collections import Counter
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.table import Table

from fastworker.config import Config
from fastworker.errors import ExitCode, Unreachable
from fastworker.store.repos import SAMPLE, Wanted
from fastworker.sync.hosts import Hosts
from fastworker.sync.many import Scene, Work, opened, settle_all
from fastworker.sync.settle import Report, Settled

REPOS: Final = 60
AGAIN_S: Final = 10.0
_LETTERS: Final = "234567abcdefghijklmnopqrstuvwxyz"
_Z: Final = 1.959964  # of 95 %
_DRAW: Final = """
SELECT did FROM (
    (SELECT did, 0 AS turn FROM public.users WHERE did >= $1 ORDER BY did LIMIT 1)
    UNION ALL (SELECT did, 1 FROM public.users ORDER BY did LIMIT 1)
) AS a ORDER BY turn LIMIT 1
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


class Sample(msgspec.Struct):
    """`not_judged`: accounts by why they were not compared. `differing`: DID -> some differences."""

    accounts: int
    records: int
    tables: dict[str, Truth]
    not_judged: dict[str, int]
    differing: dict[str, list[str]]
    repaired: int = 0
    remaining: int = 0


class _Looked(Report):
    """Keeps what was found of each account; says nothing."""

    def __init__(self) -> None:
        super().__init__(dry_run=True)
        self.found: dict[str, Settled] = {}
        self.not_judged: Counter[str] = Counter()

    def add(self, settled: Settled) -> None:
        super().add(settled)
        if not settled.refused:
            self.found[settled.did] = settled

    def failed(self, name: str, why: str) -> None:  # noqa: ARG002 - as Report
        self.failures += 1
        self.not_judged[why.partition(":")[0]] += 1

    def end(self) -> ExitCode:
        self.close()
        return ExitCode.DONE


async def sample(
    config: Config, *, repos: int, is_repaired: bool, as_json: bool, stop: asyncio.Event, hosts: Hosts | None = None
) -> ExitCode:
    """DONE when nothing differs, or nothing does any more. NO also when no account could be judged."""
    async with opened(config, "sample", hosts, reads_only=not is_repaired) as scene:
        dids = await _draw(scene, repos)
        if not dids:
            raise Unreachable("There is no account in `users`: nothing can be sampled")
        looked = await _look(scene, dids, stop)
        differing = [did for did, one in looked.found.items() if one.differences]
        if differing and not stop.is_set():
            await _pause(stop)
            again = await _look(scene, differing, stop)
            looked.found |= again.found
            differing = [did for did, one in looked.found.items() if one.differences]
        result = _result(looked, differing)
        if differing and is_repaired and not stop.is_set():
            await scene.queue.put([Wanted(did) for did in differing], "sample", SAMPLE, again=True)
            await settle_all(scene, _Looked(), Work(priority_max=SAMPLE), stop)
            after = await _look(scene, differing, stop)
            result.remaining = sum(did not in after.found or after.found[did].differences > 0 for did in differing)
            result.repaired = len(differing) - result.remaining
    if as_json:
        sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
    else:
        _print(result, stop.is_set())
    is_well = result.accounts and not result.remaining and not stop.is_set()
    return ExitCode.DONE if is_well else ExitCode.NO


async def _draw(scene: Scene, many: int) -> list[str]:
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


async def _look(scene: Scene, dids: list[str], stop: asyncio.Event) -> _Looked:
    looked = _Looked()
    await settle_all(scene, looked, Work(priority_max=SAMPLE), stop, only=dids)
    return looked


async def _pause(stop: asyncio.Event) -> None:
    try:
        await asyncio.wait_for(stop.wait(), AGAIN_S)
    except TimeoutError:
        return


def _result(looked: _Looked, differing: list[str]) -> Sample:
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in ("compared", "missing", "different", "extra")}
    for one in looked.found.values():
        for kind, counter in counts.items():
            counter.update(getattr(one, kind))
    tables = {
        table: truth_of(*(counts[kind][table] for kind in counts))
        for table in sorted({table for counter in counts.values() for table in counter})
    }
    return Sample(
        accounts=len(looked.found),
        records=sum(one.records for one in looked.found.values()),
        tables=tables,
        not_judged=dict(looked.not_judged),
        differing={did: looked.found[did].examples for did in differing},
        remaining=len(differing),
    )


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


def _print(result: Sample, is_stopped: bool) -> None:
    console = Console(highlight=False, soft_wrap=True)
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("table", "truth", "95 %", "compared", "missing", "different", "extra"):
        grid.add_column(name, justify="left" if name == "table" else "right", no_wrap=True)
    for table, one in result.tables.items():
        grid.add_row(table, *_cells(one))
    if result.tables:
        console.print(grid)
    for examples in result.differing.values():
        for line in examples[:3]:
            console.print(f"  {line}"[:300], markup=False)
    words = f"{result.accounts:,} accounts, {result.records:,} records"
    if result.not_judged:
        words += "; not judged: " + ", ".join(f"{why} {count}" for why, count in sorted(result.not_judged.items()))
    words += f". {len(result.differing):,} accounts differ" if result.differing else ". No difference"
    if result.repaired:
        words += f", {result.repaired:,} are repaired"
    console.print(words + ("; stopped before the end." if is_stopped else "."), markup=False)


def _cells(one: Truth) -> list[Any]:
    if one.truth is None or one.low is None or one.high is None:
        return ["", "", "0", "", "", ""]
    counts = (one.missing, one.different, one.extra)
    interval = f"{one.low:.4f} to {one.high:.4f}"
    return [f"{one.truth:.4f}", interval, f"{one.compared:,}", *(f"{count:,}" if count else "" for count in counts)]
