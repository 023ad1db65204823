"""What one flush writes: changes coalesced per record, users, accounts, identities, and the entries they came from.

A Batch knows how full it is; the pipeline knows when to flush it and what to ack.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

from fastworker.event import Account, Drop, Identity, Sync
from fastworker.table.schema import Table

Row = tuple[Any, ...]


def newer(a_rev: str | None, a_seq: int | None, b_rev: str | None, b_seq: int | None) -> bool:
    """Whether version a is strictly higher than version b. The same rule as the SQL function fastworker.newer."""
    if a_rev is not None and b_rev is not None and a_rev != b_rev:
        # mutant: rev order turned
        return a_rev > b_rev
    if a_seq is not None and b_seq is not None:
        return a_seq > b_seq
    return (a_rev is not None or a_seq is not None) and b_rev is None and b_seq is None


def is_gone(rev: str | None, seq: int | None, gone_rev: str | None, gone_seq: int | None) -> bool:
    """Whether an account's deletion beats a record: by its moment as a TID, or, within one relay, by its seq."""
    if gone_rev is not None:
        return rev is None or rev < gone_rev
    return gone_seq is not None and (seq is None or seq < gone_seq)


class Change(msgspec.Struct, frozen=True, gc=False):
    """One record's operation, ready to write: `row` in the order of `table.columns`, None for a delete.

    `cid` is the acting record's CID (None for a delete). `op_index` orders ops of one commit.
    """

    table: Table
    uri: str
    repo: str
    rkey: str
    rev: str | None
    seq: int | None
    op_index: int
    cid: str | None
    row: Row | None


class Mapped(msgspec.Struct, frozen=True, gc=False):
    """What one entry becomes. `dids`: users to ensure (the actor; followed, blocked and listed DIDs)."""

    changes: list[Change]
    dids: list[str]
    drops: list[Drop]
    relay: str | None = None


class TimedAccount(msgspec.Struct, frozen=True, gc=False):
    """An #account event with the time it is ordered by when it has no seq (its own, else the entry id's)."""

    event: Account
    at: datetime


class TimedIdentity(msgspec.Struct, frozen=True, gc=False):
    event: Identity
    at: datetime


class Refused(msgspec.Struct, frozen=True, gc=False):
    """A record that is kept by its name only, for a repair of its account. `seq` fits a bigint."""

    uri: str
    did: str
    cid: str | None
    rev: str | None
    seq: int | None
    reason: str
    detail: str


PIECE_MIN = 500  # entries; smaller batches cost PostgreSQL more for each


class Limits(msgspec.Struct, frozen=True):
    """Bounds of one batch. Larger ones are hardly faster (docs/performance.md), and each pipeline holds two."""

    entries_max: int = 2_500
    changes_max: int = 3_500
    bytes_max: int = 8 * 1024 * 1024

    def shared_by(self, pipelines: int) -> Limits:
        """What one of so many pipelines may hold: beyond two, they share what two may hold."""
        share = min(1.0, 2 / pipelines)
        return Limits(
            entries_max=max(PIECE_MIN, int(self.entries_max * share)),
            changes_max=max(PIECE_MIN, int(self.changes_max * share)),
            bytes_max=max(1024 * 1024, int(self.bytes_max * share)),
        )


class Progress(msgspec.Struct, frozen=True, gc=False):
    """How far `consumer` saw the whole group finished: everything up to (seq, entry_id) is settled."""

    stream: str
    consumer: str
    seq: int | None
    entry_id: str
    session: int | None = None  # the process's newest session when this was read; a newer one may be on another server


def beats(a: Change, b: Change) -> bool:
    """Whether a wins over b for one record: version, then op index, then delete over upsert, then cid."""
    if newer(a.rev, a.seq, b.rev, b.seq):
        return True
    if newer(b.rev, b.seq, a.rev, a.seq):
        return False
    # mutant: op index ignored
    return (a.op_index, a.row is None, a.cid or "") > (b.op_index, b.row is None, b.cid or "")


def seq_of(text: str | None) -> int | None:
    """commit_seq is text in the contract; what is not a number, or beyond a bigint, is no version."""
    return int(text) if text is not None and len(text) <= 18 and text.isascii() and text.isdecimal() else None


def stored_version(table: Table, row: Row) -> tuple[str | None, int | None]:
    """(rev, seq) of a stored row; nothing for cold tables, whose gate has ordered the writers already."""
    return (row[-1], seq_of(row[-2])) if table.hot else (None, None)


def replaces(change: Change, rev: str | None, seq: int | None, *, many_relays: bool = False) -> bool:
    """Whether a change beats the stored version; at equal versions a delete beats an upsert.

    `many_relays`: what was stored without a rev is older than what has one.
    """
    # mutant: a stored seq against another relay
    if many_relays and rev is None and change.rev is not None:
        seq = None
    if change.row is None:
        return not newer(rev, seq, change.rev, change.seq)
    # mutant: no version guard
    return newer(change.rev, change.seq, rev, seq)


class Batch:
    """Accumulates; `changes` holds the winner of each record among what was put."""

    __slots__ = (
        "accounts",
        "beaten",
        "changes",
        "count",
        "dids",
        "drops",
        "entries",
        "identities",
        "payload_bytes",
        "progress",
        "relays",
        "syncs",
    )

    def __init__(self) -> None:
        self.changes: dict[str, Change] = {}  # by uri: a uri names its collection, hence its table
        self.dids: set[str] = set()
        self.accounts: dict[str, list[TimedAccount]] = {}
        self.identities: dict[str, list[TimedIdentity]] = {}
        self.syncs: list[Sync] = []
        self.drops: list[Drop] = []
        self.entries: list[str] = []  # ids
        self.relays: set[str] = set()
        self.beaten: frozenset[str] = frozenset()  # uris of upserts that were not stored: found when it was written
        self.progress: Progress | None = None
        self.payload_bytes = 0
        self.count = 0  # changes put, before coalescing

    def put(self, mapped: Mapped) -> None:
        changes = self.changes
        for change in mapped.changes:
            held = changes.setdefault(change.uri, change)
            if held is not change and beats(change, held):
                changes[change.uri] = change
        self.count += len(mapped.changes)
        self.dids.update(mapped.dids)
        if mapped.drops:
            self.drops.extend(mapped.drops)
        if mapped.relay is not None:
            self.relays.add(mapped.relay)

    def put_account(self, event: Account, at: datetime) -> None:
        self.accounts.setdefault(event.did, []).append(TimedAccount(event, at))
        self._put_event(event)

    def put_identity(self, event: Identity, at: datetime) -> None:
        self.identities.setdefault(event.did, []).append(TimedIdentity(event, at))
        self._put_event(event)

    def put_sync(self, event: Sync) -> None:
        self.syncs.append(event)
        if event.relay is not None:
            self.relays.add(event.relay)

    def _put_event(self, event: Account | Identity) -> None:
        self.dids.add(event.did)
        if event.relay is not None:
            self.relays.add(event.relay)

    def settle(self, entry_id: str, *, payload_bytes: int) -> None:
        """Remember an entry; its ack follows the commit of this batch."""
        self.entries.append(entry_id)
        self.payload_bytes += payload_bytes

    def is_full(self, limits: Limits) -> bool:
        return (
            len(self.entries) >= limits.entries_max
            or self.count >= limits.changes_max
            or self.payload_bytes >= limits.bytes_max
        )

    def __bool__(self) -> bool:
        return bool(self.entries)
