"""What the settling of many accounts came to, for people: a bar or lines meanwhile, tables and a line at the end."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table as Grid
from rich.text import Text

from fastworker.errors import ExitCode, Reason
from fastworker.sync.settle import EXAMPLES, Settled


async def unless_stopped(work: Coroutine[Any, Any, None], stop: asyncio.Event) -> bool:
    """Await it, or cancel it at a stop. Whether it came to its end."""
    task = asyncio.create_task(work)
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        task.cancel()
        await asyncio.wait({task, stopping})
    if task.cancelled():
        return False
    task.result()
    return True


class Report:
    """What all accounts of one run came to, for people."""

    def __init__(self, *, dry_run: bool) -> None:
        self.stopped: str | None = None
        self.failures = 0
        self._dry_run = dry_run
        self._accounts = self._records = self._written = self._left = 0
        self._kinds = {kind: Counter[str]() for kind in ("missing", "different", "extra")}
        self._drops: Counter[str] = Counter()
        self._examples: list[str] = []
        self._began = self._told = time.monotonic()
        self._console = Console(highlight=False, soft_wrap=True)
        self._side = Console(stderr=True, highlight=False, soft_wrap=True)
        self._live: Live | None = None

    def add(self, settled: Settled) -> None:
        self._accounts += not settled.refused
        self._records += settled.records
        self._written += settled.written
        for kind, counts in self._kinds.items():
            counts.update(getattr(settled, kind))
        self._drops.update(settled.drops)
        self._examples += settled.examples[: EXAMPLES - len(self._examples)]

    def gone(self, found: Settled) -> None:
        """An account whose host says why it gives no repository."""
        for kind, counts in self._kinds.items():
            counts.update(getattr(found, kind))

    def kept(self) -> None:
        """A repository is on disk, to be loaded."""
        self._accounts += 1

    def failed(self, name: str, why: str) -> None:
        self.failures += 1
        self._side.print(f"{name}: {why}", markup=False)

    def tell(self, left: int, resting: Sequence[str] = ()) -> None:
        """How many are left, and hosts that hold back: a bar on a terminal, else a line from time to time."""
        self._left = left
        now = time.monotonic()
        if now - self._told < (0.5 if self._side.is_terminal else 5.0):
            return
        self._told = now
        words = self._progress(now - self._began, resting)
        if not self._side.is_terminal:
            self._side.print(words, markup=False)
            return
        if self._live is None:
            self._live = Live(console=self._side, auto_refresh=False, transient=True)
            self._live.start()
        bar = ProgressBar(total=max(self.done + left, 1), completed=self.done, width=40)
        self._live.update(Group(bar, Text(words)), refresh=True)

    def _progress(self, seconds: float, resting: Sequence[str]) -> str:
        done, of = self.done, self.done + self._left
        words = (
            f"{done:,} of {of:,} accounts ({done / max(of, 1):.1%}), {self._records:,} records "
            f"({self._records / seconds:,.0f}/s), {self._differences:,} differences"
        )
        if done and self._left:
            words += f", {duration(seconds / done * self._left)} left"
        if resting:
            few = ", ".join(resting[:3]) + (f" and {len(resting) - 3} more" if len(resting) > 3 else "")
            words += f"; holding back: {few}"
        return words

    @property
    def done(self) -> int:
        return self._accounts + self.failures

    def stop(self) -> None:
        self.stopped = f"{self.done} of {self.done + self._left} accounts"

    @property
    def _differences(self) -> int:
        return sum(counts.total() for counts in self._kinds.values())

    def close(self) -> None:
        """Remove the bar."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def end(self) -> ExitCode:
        self.close()
        tables = sorted({table for counts in self._kinds.values() for table in counts})
        if tables:
            grid = Grid(box=None, pad_edge=False, header_style="bold")
            grid.add_column("table", no_wrap=True)
            for kind in self._kinds:
                grid.add_column(kind, justify="right", no_wrap=True)
            for table in tables:
                cells = (counts[table] for counts in self._kinds.values())
                grid.add_row(table, *(f"{cell:,}" if cell else "" for cell in cells))
            self._console.print(grid)
        for line in self._examples if self._dry_run else ():
            self._console.print(f"  {line}"[:300], markup=False)
        words = f"{self._differences:,} differences" if self._differences else "no difference"
        if self._differences:
            words += ", nothing was written" if self._dry_run else f", {self._written:,} rows written"
        if left_out := self._drops.pop(Reason.FILTERED, 0):
            words += f"; left out by FASTWORKER_COLLECTIONS: {left_out:,}"
        if left_out := self._drops.pop(Reason.FILTERED_ACCOUNT, 0):
            words += f"; left out by FASTWORKER_ACCOUNTS: {left_out:,}"
        if self._drops:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(self._drops.items()))
            words += f"; records that cannot be stored: {reasons}"
        seconds = time.monotonic() - self._began
        self._console.print(
            f"{self._accounts:,} accounts, {self._records:,} records in {seconds:.1f} s: {words}", markup=False
        )
        if self.failures:
            self._console.print(f"{self.failures:,} could not be settled: the reasons are above.")
        if self.stopped:
            self._console.print(f"Stopped after {self.stopped}. Run the same command again.")
        sys.stdout.flush()
        is_well = not (self.failures or self.stopped or (self._dry_run and self._differences))
        return ExitCode.DONE if is_well else ExitCode.NO


def duration(seconds: float) -> str:
    """For people: 40 s, 12 min, 5.3 h, 4.1 days."""
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size * (2 if unit == "days" else 1):
            return f"{seconds / size:.{0 if unit == 'min' else 1}f} {unit}"
    return f"{seconds:.0f} s"
