"""`fastworker verify [--repair]`: each derived table against the primary ones, piece by piece of keys.

A difference that one look shows may be in flight: rows that join two records are written a moment after what they
follow from. So what differs is looked at again, and only what stays is drift. It reads through one connection, which
cannot write; `--repair` adds one of the writer's kind.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as Grid

from fastworker.errors import ConfigError, ExitCode, RowRejected, StoreUnavailable, Unreachable
from fastworker.process.backoff import pause
from fastworker.store.audit import CHECKS, Audit, Check, Drift, Key, open_audit
from fastworker.store.migrate import check as check_schema
from fastworker.store.repair import mend
from fastworker.store.rules import Rules
from fastworker.store.store import Store
from fastworker.terminal import Terminal, write_json

PIECE = 10_000  # keys looked at in one statement
LOOK_AGAIN_S = (0.2, 0.5)  # a transaction in flight ends
LOOK_AGAIN_JOINED_S = (0.5, 2.0)  # and so does the recomputation after it
EXAMPLES = 5
LINE_S = 5.0


class VerifyOptions(msgspec.Struct, frozen=True):
    """What the operator asked for. `start` is (check, key) to go on from, as a stopped run printed it."""

    repair: bool = False
    only: tuple[str, ...] = ()
    rows: int = PIECE
    pause_s: float = 0.0
    start: str | None = None
    as_json: bool = False


class Found(msgspec.Struct):
    """One check's result. `drift` counts rows by problem; `left` those that are not mended."""

    check: str
    table: str
    rows: int = 0
    drift: dict[str, int] = {}
    left: int = 0
    examples: list[Drift] = []

    @property
    def drifted(self) -> int:
        return sum(self.drift.values())


def names() -> list[str]:
    """Every check, in the order in which they run."""
    return [check.name for check in CHECKS]


async def verify(
    database_url: str,
    rules: Rules,
    options: VerifyOptions,
    stop: asyncio.Event | None = None,
) -> ExitCode:
    """0: no drift, or all of it was mended; 1: drift is left. Raises Unreachable, ConfigError."""
    stop = stop or asyncio.Event()
    if problems := await check_schema(database_url):
        raise Unreachable(" ".join(problems))
    repair = None
    try:
        if options.repair:
            repair = await Store.connect(
                database_url,
                pool_size=1,
                application_name="fastworker-repair",
                rules=rules,
            )
            with contextlib.suppress(StoreUnavailable):  # of a piece that cannot be recomputed; the rest is
                while not stop.is_set() and await repair.maintain():  # what is owed is no drift
                    pass
        async with open_audit(database_url, rules.derive, rules.trusted_verifiers) as audit:
            run = _Run(audit, repair, options, stop)
            await run.conduct()
    except (StoreUnavailable, RowRejected) as error:
        raise Unreachable(str(error)) from error
    finally:
        if repair is not None:
            await repair.close()
    return run.tell()


class _Run:
    def __init__(self, audit: Audit, repair: Store | None, options: VerifyOptions, stop: asyncio.Event) -> None:
        self._audit = audit
        self._repair = repair
        self._options = options
        self._stop = stop
        self._found: list[Found] = []
        self._began = time.monotonic()
        self._at: str | None = None  # where a run that is stopped goes on
        self._console = Terminal(stderr=True, soft_wrap=True)

    async def conduct(self) -> None:
        checks = await self._audit.checks()
        if unknown := set(self._options.only).difference(names()):
            raise ConfigError(f"--check {', '.join(sorted(unknown))}: there are {', '.join(names())}")
        if self._options.only:
            checks = [check for check in checks if check.name in self._options.only]
        checks, after = _resume(checks, self._options.start)
        sizes = {check.name: max(1, await self._audit.size(check)) for check in checks}
        with Progress(
            TextColumn("{task.description:30}"),
            BarColumn(),
            TextColumn("{task.fields[seen]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        ) as display:
            bar = display.add_task("", total=sum(sizes.values()), seen="")
            line_at, before = time.monotonic() + LINE_S, 0
            for check in checks:
                found = Found(check.name, check.table)
                self._found.append(found)
                async for rows in self._check(check, after, found):
                    drifted = sum(f.drifted for f in self._found)
                    display.update(
                        bar,
                        description=check.name,
                        completed=before + min(rows, sizes[check.name]),
                        seen=f"{sum(f.rows for f in self._found):,} rows, {drifted:,} drift",
                    )
                    if not self._console.is_terminal and time.monotonic() > line_at:
                        line_at = time.monotonic() + LINE_S
                        self._console.print(f"{check.name}: {rows:,} rows, {drifted:,} drift so far")
                if self._stop.is_set():
                    return
                before += sizes[check.name]
                after = ("",) * 2
        self._at = None

    async def _check(self, check: Check, after: Key, found: Found) -> Any:
        """Yields how many rows were gone through after each piece."""
        after = after[: check.width]
        while not self._stop.is_set():
            self._at = f"{check.name}:{' '.join(after)}"
            piece = await self._audit.piece(check, after, self._options.rows)
            if piece is None:
                return
            if drifts := await self._settled(check, await self._audit.look(check, piece)):
                left = drifts
                if self._repair is not None:
                    await mend(self._repair, check, drifts)
                    left = await self._settled(check, await self._again(check, drifts))
                counts = Counter(found.drift)
                counts.update(drift.problem for drift in drifts)
                found.drift = dict(counts)
                found.left += len(left)
                found.examples = [*found.examples, *drifts][:EXAMPLES]
            found.rows += piece.rows
            after = piece.last
            yield found.rows
            await pause(self._options.pause_s, self._stop)

    async def _settled(self, check: Check, drifts: list[Drift]) -> list[Drift]:
        """Those that are still there a moment later."""
        for wait in LOOK_AGAIN_JOINED_S if check.is_joined else LOOK_AGAIN_S:
            if not drifts:
                break
            await asyncio.sleep(wait)
            drifts = await self._again(check, drifts)
        return drifts

    async def _again(self, check: Check, drifts: list[Drift]) -> list[Drift]:
        rows = {drift.row for drift in drifts}
        return [
            drift
            for drift in await self._audit.look_again(check, sorted({drift.key for drift in drifts}))
            if drift.row in rows
        ]

    # What is told --------------------------------------------------------------------------------

    def tell(self) -> ExitCode:
        unowned = sum(found.drift.get("unowned", 0) for found in self._found)
        left = sum(found.left for found in self._found) - unowned
        stopped = self._at if self._stop.is_set() else None
        if self._options.as_json:
            report = {
                "checks": [
                    {
                        "check": found.check,
                        "table": found.table,
                        "rows": found.rows,
                        "drift": found.drift,
                        "left": found.left,
                        "examples": found.examples,
                    }
                    for found in self._found
                ],
                "drift": sum(found.drifted for found in self._found) - unowned,
                "left": left,
                "seconds": round(time.monotonic() - self._began, 3),
                "continue_from": stopped,
            }
            write_json(msgspec.json.encode(report))
        else:
            self._print(left, unowned, stopped)
        return ExitCode.NO if left or stopped else ExitCode.DONE

    def _print(self, left: int, unowned: int, stopped: str | None) -> None:
        console = Terminal(soft_wrap=True)
        drifted = [found for found in self._found if found.drifted]
        if drifted:
            grid = Grid(box=None, pad_edge=False, header_style="bold")
            for column in ("check", "rows", "missing", "wrong", "extra", "other", "left"):
                grid.add_column(column, justify="left" if column == "check" else "right")
            for found in drifted:
                known = [found.drift.get(problem, 0) for problem in ("missing", "wrong", "extra")]
                cells = (found.rows, *known, found.drifted - sum(known), found.left)
                grid.add_row(found.check, *(f"{cell:,}" if cell else "" for cell in cells))
            console.print(grid)
            for found in drifted:
                for line in _examples(found):
                    console.print(line)
        rows = sum(found.rows for found in self._found)
        drift = sum(found.drifted for found in self._found) - unowned
        words = "no drift"
        if drift:
            words = f"{drift:,} rows drifted"
            if self._repair is not None:
                words += ", all mended" if not left else f", {left:,} could not be mended"
            else:
                words += ": `fastworker verify --repair` mends them"
        console.print(
            f"{len(self._found)} checks over {rows:,} rows in {time.monotonic() - self._began:.1f} s: {words}",
            markup=False,
        )
        if unowned:
            console.print(
                f"{unowned:,} gates of an earlier system stay: their records were never seen here "
                "(`worker --reapply` or a backfill of their owners tells)."
            )
        if stopped is not None:
            console.print(f"Stopped. Go on with: fastworker verify --from '{stopped}'")


def _examples(found: Found) -> Iterator[str]:
    for drift in found.examples:
        detail = ""
        if drift.problem == "wrong" and drift.expected and drift.found:
            changed = [name for name, value in drift.expected.items() if drift.found.get(name) != value]
            detail = ": " + ", ".join(
                f"{name} {drift.found.get(name)!r} -> {drift.expected[name]!r}" for name in changed
            )
        yield f"  {found.table} {drift.target} {drift.problem}{detail}"[:400]


def _resume(checks: Sequence[Check], start: str | None) -> tuple[list[Check], Key]:
    """The checks that are left, and the key after which the first of them goes on."""
    if start is None:
        return list(checks), ("", "")
    name, _, key = start.partition(":")
    for position, check in enumerate(checks):
        if check.name == name:
            parts = key.split(" ", check.width - 1)
            return list(checks[position:]), (*parts, *[""] * (2 - len(parts)))
    raise ConfigError(
        f"--from {start!r}: begins with the name of a check, such as {checks[0].name}: ..." if checks else start
    )
