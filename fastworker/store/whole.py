"""A flush of few new rows as one call: all steps of store/flush.py inside PostgreSQL, one round trip instead of ten.

The routine writes nothing, and says so, unless there is nothing to do but to insert new rows.
"""

from __future__ import annotations

from asyncpg.exceptions import PostgresError

from fastworker.crashpoint import Step
from fastworker.store import statements as sql
from fastworker.store.effects import item_arguments, last_arguments
from fastworker.store.flush import FEW_USERS, FloorCame, Plan, Written, finish
from fastworker.store.look import joins, lowest, nothing
from fastworker.store.rows import by_table
from fastworker.store.session import Connection
from fastworker.store.writer import Writer
from fastworker.table import derive
from fastworker.table.batch import Batch
from fastworker.table.derive import Effects


async def write_whole(writer: Writer, db: Connection, batch: Batch) -> Written | None:
    """None: there is more to do than to insert new rows: go step by step."""
    if not _may_be_whole(writer, batch) or len(users := writer.unknown(batch.dids)) > FEW_USERS:
        return None
    effects = Effects(writer.derive)
    upserts = sorted(batch.changes.values(), key=lambda c: c.uri)
    new = {}
    for table, mine in by_table(upserts):
        derive.add(effects, table, mine)
        new["new_" + table.name] = [c.row for c in mine]
    lowest_rev, lowest_seq = lowest(upserts)
    arguments = {
        "new_users": users or None,
        **new,
        **item_arguments(writer, effects),
        **last_arguments(writer, effects, batch.progress),
        "uris": [c.uri for c in upserts],
        "repos": list({c.repo for c in upserts}),
        "lowest_rev": lowest_rev,
        "lowest_seq": lowest_seq,
        "dids": list(batch.dids),
        "crowd": writer.crowd,
        **joins(writer.derive),
        **dict(zip(sql.COUNTED, writer.counted, strict=True)),
    }
    values = [arguments.get(name) for name in sql.WHOLE_ARGUMENTS]
    await writer.reach(Step.BEFORE_MAIN_COMMIT)
    try:
        is_late = await writer.retry(lambda: db.fetchval(sql.PUT_WHOLE, *values))
    except PostgresError as error:
        if error.sqlstate != sql.NOT_NEW:
            raise
        return None
    await writer.reach(Step.AFTER_MAIN_COMMIT)
    writer.remember(users)
    if is_late:
        try:
            return await finish(writer, db, Plan(upserts, upserts, nothing()), len(upserts))
        except FloorCame:
            return None
    await writer.reach(Step.AFTER_LOOK_BACK)
    return Written(len(upserts), 0, 0)


def _may_be_whole(writer: Writer, batch: Batch) -> bool:
    """Whether, as far as this process knows, there are only new rows of hot tables. The routine knows better."""
    changes = batch.changes
    return (
        0 < len(changes) <= writer.whole_rows_max
        and len(changes) < writer.copying.rows_min
        and not (batch.accounts or batch.identities or batch.syncs)
        and all(c.row is not None and c.table.hot for c in changes.values())
    )
