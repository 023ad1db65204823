"""`fastworker sample`: how much of the tables is as the network says: a truth ratio for each table, by random accounts.

Each account is compared both ways, what is missing and what should not be there. What differs is looked at again after
a while, since a repository that changes meanwhile, or an event on its way, is no difference. What is left is repaired.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.table import Table

from fastworker.config import Config
from fastworker.errors import ExitCode, Unreachable
from fastworker.store.repos import SAMPLE, Wanted
from fastworker.sync.hosts import Hosts
from fastworker.sync.many import Work, opened, settle_all
from fastworker.sync.sampling import Looked, Truth, draw, look, look_twice, tables_of

REPOS: Final = 60


class Sample(msgspec.Struct):
    """`not_judged`: accounts by why they were not compared. `differing`: DID -> some differences."""

    accounts: int
    records: int
    tables: dict[str, Truth]
    not_judged: dict[str, int]
    differing: dict[str, list[str]]
    repaired: int = 0
    remaining: int = 0


async def sample(
    config: Config, *, repos: int, is_repaired: bool, as_json: bool, stop: asyncio.Event, hosts: Hosts | None = None
) -> ExitCode:
    """DONE when nothing differs, or nothing does any more. NO also when no account could be judged."""
    async with opened(config, "sample", hosts, reads_only=not is_repaired) as scene:
        dids = await draw(scene, repos)
        if not dids:
            raise Unreachable("There is no account in `users`: nothing can be sampled")
        looked = await look_twice(scene, dids, stop)
        differing = looked.differing
        result = _result(looked, differing)
        if differing and is_repaired and not stop.is_set():
            await scene.queue.put([Wanted(did) for did in differing], "sample", SAMPLE, again=True)
            await settle_all(scene, Looked(), Work(priority_max=SAMPLE), stop)
            after = await look(scene, differing, stop)
            result.remaining = sum(did not in after.found or after.found[did].differences > 0 for did in differing)
            result.repaired = len(differing) - result.remaining
    if as_json:
        sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
    else:
        _print(result, stop.is_set())
    is_well = result.accounts and not result.remaining and not stop.is_set()
    return ExitCode.DONE if is_well else ExitCode.NO


def _result(looked: Looked, differing: list[str]) -> Sample:
    return Sample(
        accounts=len(looked.found),
        records=sum(one.records for one in looked.found.values()),
        tables=tables_of(list(looked.found.values())),
        not_judged=dict(looked.not_judged),
        differing={did: looked.found[did].examples for did in differing},
        remaining=len(differing),
    )


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
