"""One record of a snapshot against what is stored of it: does it agree, and if not, what is wrong. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

import orjson

from fastworker.store.audit import StoredRecord
from fastworker.store.stored import AccountState, Place, Standing
from fastworker.table.batch import Change, Row, is_gone, newer
from fastworker.table.schema import Table
from fastworker.table.snapshot import Snapshot, is_judged_date, moment_of

YOUNG: Final = timedelta(minutes=10)
"""Rows without a version of ours that are not older than this before the snapshot: the API may have written them."""
_VERSION: Final = 3  # columns of a hot row's version, at its end


def is_same(change: Change, row: Sequence[Any]) -> bool:
    """Whether a hot row is as it must be but for its version. `row`: as it was read, when it was made at its end."""
    return change.row is not None and change.row[:-_VERSION] == row[: -_VERSION - 1]


def agrees(
    change: Change, standing: Sequence[Standing], row: Row | None, account: AccountState, snapshot: Snapshot
) -> bool:
    """Whether a record is stored as it must be, and nothing else is known of it. False: it has to be judged."""
    if row is None or len(standing) != 1 or standing[0].place != Place.ROW:
        return False
    if account.deleted_seq is not None or account.deleted_rev is not None:
        return False
    expected, table = change.row or (), change.table
    if table.hot:
        if expected[:-_VERSION] == row[:-_VERSION]:
            return True
    elif expected == row:
        return True
    moment = moment_of(change.uri.split("/", 4)[3], change.rkey, snapshot.taken_at)
    return all(is_judged_date(expected[table.index(column)], moment) for column in differing(table, expected, row))


def is_unknown(change: Change, standing: Sequence[Standing]) -> bool:
    """Whether nothing can be stored of a record: all that could be was read. Rows that others wrote into tables
    without an index on their author were not."""
    table = change.table
    return not standing and (table.author is not None or table.name.startswith("fastworker."))


def differing(table: Table, expected: Row, found: Row) -> list[str]:
    """Columns that are not as they must be, but for those of the version."""
    return [
        column
        for column, kind, a, b in zip(table.columns, table.types, expected, found, strict=True)
        if a != b and not column.startswith("commit_") and not (kind == "jsonb" and _is_same_json(a, b))
    ]


def _is_same_json(a: str | None, b: str | None) -> bool:
    """Written anew: to Python true and 1 are equal, to JSON they are not."""
    if a is None or b is None:
        return False
    option = orjson.OPT_SORT_KEYS
    # mutant: true is one
    return orjson.dumps(orjson.loads(a), option=option) == orjson.dumps(orjson.loads(b), option=option)


def judge(change: Change, held: StoredRecord, standing: Standing | None, snapshot: Snapshot) -> str:
    """`missing`, `different in ...`, or nothing. What is newer than the snapshot is right."""
    # mutant: a newer tombstone is overwritten
    if held.is_gone and not snapshot.beats(held.gone_rev, held.gone_seq):
        return ""
    if not held.is_there:
        return "missing"
    # mutant: a newer record is overwritten
    if not snapshot.beats(held.rev, held.seq):
        return ""
    moment = moment_of(change.uri.split("/", 4)[3], change.rkey, snapshot.taken_at)
    row = change.row or ()
    differs = [
        column
        for column in held.differs
        if not column.startswith("commit_") and not is_judged_date(row[change.table.index(column)], moment)
    ]
    is_ours = held.rev is not None or held.seq is not None
    if differs and (is_ours or standing is None or not _is_young(standing, snapshot)):
        return f"different in {', '.join(differs)}"
    # mutant: an equal row that is older than a deletion
    if is_gone(held.rev, held.seq, held.deleted_rev, held.deleted_seq):
        return "different in its version"  # the account was deleted since: what is older is taken away
    # mutant: an equal row under a tombstone
    if held.is_gone and not newer(held.rev, held.seq, held.gone_rev, held.gone_seq):
        return "different in its tombstone"  # which would take the row away at the next look
    return ""


def is_extra(standing: Standing, snapshot: Snapshot) -> bool:
    """Whether what the snapshot lacks has to go."""
    if standing.place == Place.TOMBSTONE:
        return False
    if standing.rev is None and standing.seq is None:
        # mutant: what an API wrote just now goes
        return not _is_young(standing, snapshot)
    # mutant: a newer record that the snapshot lacks goes
    return snapshot.beats(standing.rev, standing.seq)


def _is_young(standing: Standing, snapshot: Snapshot) -> bool:
    return standing.indexed_at is None or standing.indexed_at > snapshot.taken_at - YOUNG
