"""`fastworker compare`: who handles the stream's entries, and whether the tables say what the newest of them say.

For the days on which fastworker runs beside other workers on one group. The ledger tells exactly what fastworker
finished, the group's counters what everybody did, and the difference is the others'. A row tells who wrote it by its
version: only fastworker gives one. Reads only. What differs is looked at twice, because a row may be on its way.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from rich.table import Table as Grid

from fastworker.config import Config
from fastworker.errors import ExitCode, InvalidEvent, StoreUnavailable, Unreachable
from fastworker.event import Account, Commit, Identity
from fastworker.event.entry import decode_entry, received_ms
from fastworker.metrics import OUTCOMES
from fastworker.store.audit import Audit, Check, Drift, StoredRecord, open_audit
from fastworker.store.migrate import check as check_schema
from fastworker.stream.admin import GroupCount, Placed, RedisAdmin, open_redis
from fastworker.stream.ids import id_ms
from fastworker.stream.parts import ConsumerState
from fastworker.table.batch import Batch, Change, is_gone, newer
from fastworker.table.dates import entry_moment
from fastworker.table.mapper import map_commit
from fastworker.terminal import Terminal, write_json

LOOK_S: Final = 0.1
PENDING_SEEN: Final = 1_000
PENDING_MOST: Final = 20_000
PIECE: Final = 1_000
LOOK_AGAIN_S: Final = 2.0
EXAMPLES: Final = 5


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """Entries over the time that was looked at, and since the group began. None: this server does not count."""

    seconds: float
    appended: int | None
    by_fastworker: int
    by_others: int | None
    fastworker_ever: int
    others_ever: int | None
    pending: int
    lag: int


class Hand(msgspec.Struct, frozen=True, kw_only=True):
    """One consumer. `seen`: different entries that were pending for it; it was given at least so many."""

    name: str
    who: str  # fastworker or other
    pending: int
    idle_s: float
    seen: int


class Records(msgspec.Struct, kw_only=True):
    """The records of one table. Who wrote them, and what is not as the law says."""

    table: str
    records: int = 0
    fastworker: int = 0
    others: int = 0
    missing: int = 0
    differ: int = 0
    left_over: int = 0

    @property
    def wrong(self) -> int:
        return self.missing + self.differ + self.left_over


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `compare --json`; members are added, never renamed."""

    share: Share
    consumers: list[Hand]
    entries: int
    first_id: str | None
    last_id: str | None
    tables: list[Records]
    events: dict[str, int]
    """`identities` and `accounts` that were looked at, and `identities_missing`, `accounts_missing`."""
    drift: dict[str, int]
    """Derived rows of those records that are not what the primary tables say, by check."""
    examples: list[str]

    @property
    def wrong(self) -> int:
        missing = sum(count for name, count in self.events.items() if name.endswith("_missing"))
        return sum(one.wrong for one in self.tables) + missing + sum(self.drift.values())


async def compare(config: Config, *, entries: int, seconds: float, as_json: bool) -> ExitCode:
    """NO when something is not as the law says. Raises Unreachable."""
    url = config.require_database_url("compare")
    if problems := await check_schema(url):
        raise Unreachable(" ".join(problems))
    async with open_redis(config.redis_url, config.stream_key, client_name="fastworker-compare") as admin:
        stream = await admin.stream()
        if stream is None or stream.group(config.group) is None:
            raise Unreachable(f"{config.stream_key} has no group {config.group}: no worker ever began")
        share, consumers = await _watch(admin, config, seconds)
        try:
            async with open_audit(url, config.derive, config.trusted_verifiers) as audit:
                found = await _Look(admin, audit, config).look(entries)
        except StoreUnavailable as error:
            raise Unreachable(str(error)) from error
    result = Comparison(share=share, consumers=consumers, **found)
    if as_json:
        write_json(msgspec.json.encode(result))
    else:
        _print(result)
    return ExitCode.NO if result.wrong else ExitCode.DONE


# Who ------------------------------------------------------------------------------------------


async def _watch(admin: RedisAdmin, config: Config, seconds: float) -> tuple[Share, list[Hand]]:
    seen: dict[str, set[str]] = {}
    before, began = await admin.count(config.group), time.monotonic()
    while time.monotonic() < began + seconds:
        for one in await admin.pending(config.group, PENDING_SEEN):
            seen.setdefault(one.consumer, set()).add(one.entry_id)
        await asyncio.sleep(LOOK_S)
    after, ended = await admin.count(config.group), time.monotonic()
    stream = await admin.stream()
    group = stream.group(config.group) if stream is not None else None
    ours, others = _by_fastworker(after), _by_others(after)
    others_before = _by_others(before)
    share = Share(
        seconds=ended - began,
        appended=None if after.appended is None or before.appended is None else after.appended - before.appended,
        by_fastworker=ours - _by_fastworker(before),
        by_others=None if others is None or others_before is None else others - others_before,
        fastworker_ever=ours,
        others_ever=others,
        pending=after.pending,
        lag=group.lag if group is not None else 0,
    )
    return share, [_hand(one, seen.get(one.name, set())) for one in await admin.consumers(config.group)]


def _by_fastworker(count: GroupCount) -> int:
    return sum(count.ledger.get(outcome, 0) for outcome in OUTCOMES)


def _by_others(count: GroupCount) -> int | None:
    """Given to the group, not pending any more, and not in fastworker's ledger."""
    return None if count.given is None else max(0, count.given - count.pending - _by_fastworker(count))


def _hand(one: ConsumerState, seen: set[str]) -> Hand:
    return Hand(
        name=one.name,
        who="fastworker" if one.ours or one.leased else "other",
        pending=one.pending,
        idle_s=one.idle_ms / 1000,
        seen=len(seen),
    )


# What -----------------------------------------------------------------------------------------


class _Look:
    """The newest finished entries against the tables."""

    def __init__(self, admin: RedisAdmin, audit: Audit, config: Config) -> None:
        self._admin = admin
        self._audit = audit
        self._group = config.group

    async def look(self, count: int) -> dict[str, Any]:
        ends = await self._admin.ends(self._group)
        pending = {(one.partition, one.entry_id) for one in await self._admin.pending(self._group, PENDING_MOST)}
        found = await self._admin.newest(ends, count)
        sample = _batch(one for one in found if one[:2] not in pending)
        sampled = list(sample.changes.values())
        tables, examples = await self._records(sampled)
        events = await self._events(sample)
        if examples or any(name.endswith("_missing") for name in events):
            await asyncio.sleep(LOOK_AGAIN_S)
        # A record may be newer than the sample says: through entries that were pending, or came since.
        more = _batch([*(one for one in found if one[:2] in pending), *await self._since(ends)])
        again = [change for change in sampled if change.uri not in more.changes]
        if examples:
            tables, examples = await self._records(again)
        if any(name.endswith("_missing") for name in events):
            events = await self._events(sample)
        drift, drifted = await self._derived([change.uri for change in again if change.row is not None])
        return {
            "entries": len(found),
            "first_id": found[0][1] if found else None,
            "last_id": found[-1][1] if found else None,
            "tables": tables,
            "events": events,
            "drift": drift,
            "examples": [*examples, *drifted],
        }

    async def _since(self, ends: Mapping[int, str]) -> list[Placed]:
        entries: list[Placed] = []
        for partition, end in ends.items():
            after = end
            while piece := await self._admin.entries(after, "+", PIECE, partition=partition):
                entries += [(partition, *one) for one in piece]
                if len(entries) > PENDING_MOST:
                    return entries
                after = piece[-1][0]
        return entries

    async def _records(self, changes: list[Change]) -> tuple[list[Records], list[str]]:
        by_table: dict[str, list[Change]] = {}
        for change in changes:
            by_table.setdefault(change.table.name, []).append(change)
        told, examples = [], []
        for name, some in sorted(by_table.items()):
            records = Records(table=name)
            told.append(records)
            for start in range(0, len(some), PIECE):
                held = {one.uri: one for one in await self._audit.held(some[0].table, some[start : start + PIECE])}
                examples += [
                    f"{name} {change.uri} {problem}"
                    for change in some[start : start + PIECE]
                    if (problem := _judge(change, held[change.uri], records))
                ]
        return told, examples

    async def _events(self, batch: Batch) -> dict[str, int]:
        """Identity and account events whose newest is in no table of ours: another worker took them.

        An identity event that names no handle only marks the row (`Store.write`): its seq is not kept.
        """
        counts: dict[str, int] = {}
        named = {did: [e for e in some if e.event.handle is not None] for did, some in batch.identities.items()}
        for table, events in (("identities", named), ("accounts", batch.accounts)):
            wanted: dict[tuple[str, str], int] = {}
            for did, some in events.items():
                wanted.setdefault((did, ""), 0)
                for one in some:
                    key = (did, one.event.relay or "")
                    wanted[key] = max(wanted.get(key, 0), one.event.seq or 0)
            there = await self._audit.newest(table, list(events)) if events else {}
            counts[table] = len(events)
            missing = {key[0] for key, seq in wanted.items() if key not in there or (there[key] or seq) < seq}
            if missing:
                counts[f"{table}_missing"] = len(missing)
        return counts

    async def _derived(self, uris: list[str]) -> tuple[dict[str, int], list[str]]:
        drift: dict[str, int] = {}
        examples: list[str] = []
        if not uris:
            return drift, examples
        suspects: dict[Check, list[Drift]] = {}
        for check in await self._audit.checks():
            keys = await self._audit.keys_of(check, uris)
            for start in range(0, len(keys), PIECE):
                if found := await self._audit.look_again(check, keys[start : start + PIECE]):
                    suspects.setdefault(check, []).extend(found)
        if suspects:
            await asyncio.sleep(LOOK_AGAIN_S)
        for check, found in suspects.items():
            rows = {one.row for one in found}
            again = await self._audit.look_again(check, sorted({one.key for one in found}))
            for one in again:
                if one.row in rows and one.problem != "unowned":
                    drift[check.name] = drift.get(check.name, 0) + 1
                    examples.append(f"{check.table} {one.target} {one.problem}")
        return drift, examples


def _batch(entries: Iterable[Placed]) -> Batch:
    batch = Batch()
    for _, entry_id, fields in entries:
        try:
            event = decode_entry(fields)
        except InvalidEvent:
            continue  # set aside, or lost by whoever read it: there is nothing to compare with
        if isinstance(event, Commit):
            batch.put(map_commit(event, received_ms(entry_id, fields)))
        elif isinstance(event, Identity):
            batch.put_identity(event, entry_moment(received_ms(entry_id, fields)))
        elif isinstance(event, Account):
            batch.put_account(event, entry_moment(received_ms(entry_id, fields)))
    return batch


def _judge(change: Change, held: StoredRecord, records: Records) -> str:
    """Count the record; the problem in words, or nothing."""
    records.records += 1
    is_ours = held.rev is not None or held.seq is not None
    gone_later = held.is_gone and not newer(change.rev, change.seq, held.gone_rev, held.gone_seq)
    if change.row is None:
        if not held.is_there:
            records.fastworker += held.is_gone
            records.others += not held.is_gone
            return ""
        if is_ours and newer(held.rev, held.seq, change.rev, change.seq):
            records.fastworker += 1
            return ""
        records.left_over += 1
        return "was deleted and is still there"
    if not held.is_there:
        account_gone = is_gone(change.rev, change.seq, held.deleted_rev, held.deleted_seq)
        if gone_later or held.is_twin or account_gone or held.is_forbidden:
            records.fastworker += 1
            return ""
        records.missing += 1
        return "is missing"
    if is_ours:
        records.fastworker += 1
        if newer(held.rev, held.seq, change.rev, change.seq) or not held.differs:
            return ""
    else:
        records.others += 1
    differs = [column for column in held.differs if is_ours or not column.startswith("commit_")]
    if not differs:
        return ""
    records.differ += 1
    return f"differs in {', '.join(differs)}" + ("" if is_ours else " (another worker's row)")


# For people -----------------------------------------------------------------------------------


def _print(found: Comparison) -> None:
    console = Terminal(soft_wrap=True)
    for line in _who(found.share):
        console.print(line)
    grid = Grid(box=None, pad_edge=False, header_style="bold")
    for name in ("consumer", "who"):
        grid.add_column(name, no_wrap=True)
    for name in ("pending", "idle", "entries seen"):
        grid.add_column(name, justify="right", no_wrap=True)
    for one in found.consumers:
        grid.add_row(one.name, one.who, f"{one.pending:,}", f"{one.idle_s:,.1f} s", f"{one.seen:,}")
    console.print(grid)
    console.print()
    if not found.entries:
        console.print("No finished entry is on the stream any more: set FASTWORKER_KEEP_SECONDS to keep some.")
        return
    first, last = (datetime.fromtimestamp(id_ms(one or "0-0") / 1000, UTC) for one in (found.first_id, found.last_id))
    console.print(f"The newest {found.entries:,} finished entries, {first:%H:%M:%S} to {last:%H:%M:%S} UTC:")
    grid = Grid(box=None, pad_edge=False, header_style="bold")
    grid.add_column("table", no_wrap=True)
    for name in ("records", "fastworker", "others", "missing", "differ", "left over"):
        grid.add_column(name, justify="right", no_wrap=True)
    for table in found.tables:
        cells = (table.records, table.fastworker, table.others, table.missing, table.differ, table.left_over)
        grid.add_row(table.table, *(f"{cell:,}" if cell else "" for cell in cells))
    console.print(grid)
    for name in ("identities", "accounts"):
        if found.events.get(f"{name}_missing"):
            console.print(f"{found.events[f'{name}_missing']:,} of {found.events[name]:,} {name} are missing.")
    if found.drift:
        kinds = ", ".join(f"{name} {count:,}" for name, count in sorted(found.drift.items()))
        console.print(f"Derived rows of these records that are not what the primary tables say: {kinds}.")
    else:
        console.print("The derived rows of these records are what the primary tables say.")
    for line in _some(found.examples):
        console.print(f"  {line}"[:300])
    if found.wrong:
        console.print(
            f"{found.wrong:,} differences. While other workers write this is to be expected; once they have stopped, "
            "`fastworker worker --reapply` and then `fastworker verify --repair` mend it."
        )
    else:
        console.print("No difference.")


def _who(share: Share) -> Iterator[str]:
    def rate(count: int | None) -> str:
        return "unknown" if count is None else f"{count / share.seconds:,.0f}/s"

    yield (
        f"Over {share.seconds:.1f} s: {rate(share.appended)} appended, {rate(share.by_fastworker)} finished by "
        f"fastworker, {rate(share.by_others)} by others; {share.lag:,} wait, {share.pending:,} are pending."
    )
    if share.others_ever is None:
        yield "Redis before 7.0 does not count what a group has read, so the others' part is not known."
    else:
        yield f"Since the group began: {share.fastworker_ever:,} by fastworker, {share.others_ever:,} by others."


def _some(examples: list[str]) -> Iterator[str]:
    """A few of each table."""
    shown: Counter[str] = Counter()
    for example in examples:
        table = example.partition(" ")[0]
        shown[table] += 1
        if shown[table] <= EXAMPLES:
            yield example
