"""Rows that join two records (thread contexts, gate flags, like counts of services, empty aggregates)."""

from __future__ import annotations

from datetime import datetime

from fastworker.store import statements as sql
from fastworker.store.look import Key
from fastworker.store.session import Connection
from fastworker.store.writer import Writer, columns
from fastworker.table.batch import Change
from fastworker.table.rows import GATE
from fastworker.table.schema import FEED_GENERATORS, GATES, LABELER_SERVICES


async def recompute_joined(writer: Writer, db: Connection, upserts: list[Change], seen: set[Key]) -> None:
    """Recompute the joined rows that these upserts may have changed; `seen`: those of hot tables, by `look_back`.

    Last in a flush, after this side has committed: of two flushes that write the two sides, the later one sees both.
    What a removal changes was owed in its own transaction, and is not repeated here.
    """
    keys = set(seen)
    flags, services = "gate_flags" in writer.derive, "like_counts" in writer.derive
    for change in upserts:
        if change.table is GATES and flags and change.row is not None:
            keys.add(("gate", change.row[GATE.post_uri]))
        elif services and change.table in (FEED_GENERATORS, LABELER_SERVICES):
            keys.add(("like_count", change.uri))
    if keys:
        await recompute(writer, db, {}, keys, wait=False)


async def recompute(
    writer: Writer, db: Connection, owed: dict[Key, datetime], fresh: set[Key], *, wait: bool = True
) -> None:
    """Recompute joined rows under the lock of the row that carries them; owed keys are paid with it.

    Without `wait`, a post that another flush has locked is left owed instead: `maintain` comes back to it.
    """
    by_kind: dict[str, list[str]] = {kind: [] for kind in sql.JOINED}
    for kind, key in sorted(owed.keys() | fresh):
        by_kind[kind].append(key)
    paid = columns((*key, since) for key, since in sorted(owed.items())) or [()] * 3
    await writer.retry(lambda: db.execute(sql.RECOMPUTE, *by_kind.values(), *paid, wait))
