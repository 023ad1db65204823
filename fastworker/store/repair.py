"""Mending what `fastworker verify` finds, by key: the writing half, with the writer's own rows, locks and statements.

Whoever writes a derived row first holds what it follows from. So a missing or wrong row is written again under the
lock of its cause, and a row without a cause is locked first and removed by the next statement, whose snapshot sees
every cause that was committed before the lock; one that commits later writes its row after us.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial

from fastworker.store import statements as sql
from fastworker.store.audit import Check, Drift
from fastworker.store.effects import Owed, write_effects, write_gates
from fastworker.store.flush import pay_owed, write_rows
from fastworker.store.joined import NEVER, recompute
from fastworker.store.session import Connection
from fastworker.store.settle import cids_of, settle, thaw
from fastworker.store.store import Store
from fastworker.store.writer import Writer
from fastworker.table import derive
from fastworker.table.batch import Change, seq_of
from fastworker.table.derive import Effects
from fastworker.table.rows import GATE, POST, own_cid
from fastworker.table.schema import (
    BOOKMARKS,
    FEED_ITEMS,
    FOLLOWS,
    GATES,
    LABELS,
    LIKES,
    NOTIFICATIONS,
    POSTS,
    PROFILES,
    QUOTES,
    REPOSTS,
    TABLES,
    Table,
    collection_table,
)

PIECE = 1_000  # keys of one transaction: how long the writers may have to wait for it


async def mend(store: Store, check: Check, drifts: Sequence[Drift]) -> None:
    """Make these rows right, whatever they are by now. Raises StoreUnavailable, RowRejected."""
    for start in range(0, len(drifts), PIECE):
        async with store.connection() as db:
            await _MENDERS[check.mend](store.writer, db, drifts[start : start + PIECE])


# Records ------------------------------------------------------------------------------------


async def _mend_remove(writer: Writer, db: Connection, drifts: Sequence[Drift]) -> None:
    """As if their owners had deleted them now: deletes with the versions that the records have."""
    uris = sorted({drift.target for drift in drifts})
    versions = {r[0]: (r[1], r[2]) for r in await db.fetch(_VERSIONS, uris)}
    twins = {r[0]: (r[1], r[2]) for r in await db.fetch(_TWIN_VERSIONS, uris)}
    by_table: dict[str, tuple[Table, list[str]]] = {}
    for uri in uris:
        table = collection_table(uri)
        by_table.setdefault(table.name, (table, []))[1].append(uri)
    for table, mine in by_table.values():
        if table.hot:
            for uri, rev, seq in await db.fetch(sql.versions_of(table), mine):
                versions[uri] = (rev, seq_of(seq))
    removals = []
    for uri in uris:
        rev, seq = versions.get(uri) or twins.get(uri) or (None, None)
        removals.append(
            Change(collection_table(uri), uri, derive.did_of(uri), uri.rpartition("/")[2], rev, seq, 0, None, None)
        )
    await write_rows(writer, db, removals, set(twins))


async def _mend_twins(writer: Writer, db: Connection, drifts: Sequence[Drift]) -> None:
    """Settle the pairs of these twins once more: whoever has the lowest rkey takes the row."""
    uris = sorted({drift.target for drift in drifts})

    async def transaction() -> Owed:
        effects = Effects(writer.derive)
        async with db.transaction():
            await db.fetch(_VERSIONS_LOCK, uris)  # the gate of the cold tables
            changes = await _twins(db, uris)
            for table in TABLES:
                if mine := [change for change in changes if change.table is table]:
                    await settle(writer, db, table, {change.uri: change for change in mine}, effects)
            return await write_effects(writer, db, effects)

    await pay_owed(writer, db, await writer.retry(transaction))


async def _twins(db: Connection, uris: list[str]) -> list[Change]:
    tables = {table.name: table for table in TABLES}
    return [
        Change(
            tables[r["table_name"]],
            r["uri"],
            derive.did_of(r["uri"]),
            r["rkey"],
            r["rev"],
            r["seq"],
            0,
            r["cid"],
            thaw(tables[r["table_name"]], r["row_values"]),
        )
        for r in await db.fetch(_TWINS, uris)
    ]


# Users --------------------------------------------------------------------------------------


async def _mend_users(writer: Writer, db: Connection, drifts: Sequence[Drift]) -> None:
    dids = sorted({drift.target for drift in drifts})

    async def transaction() -> None:
        await db.execute(sql.USERS, dids)

    await writer.retry(transaction)


async def _mend_profiles(writer: Writer, db: Connection, drifts: Sequence[Drift]) -> None:
    keys = _keys(drifts)

    async def transaction() -> None:
        async with db.transaction():
            rows = await db.fetch(sql.lock(PROFILES), keys)
            if profiles := sorted((tuple(row) for row in rows), key=lambda row: row[PROFILES.index("did")]):
                await db.execute(sql.PROFILES, profiles)

    await writer.retry(transaction)


async def _mend_handles(writer: Writer, db: Connection, drifts: Sequence[Drift]) -> None:
    keys = _keys(drifts)

    async def transaction() -> None:
        async with db.transaction():
            await db.fetch(_HANDLES_LOCK, keys)
            await db.execute(sql.SHOW_HANDLES, keys, [], writer.verified_only)

    await writer.retry(transaction)


async def _mend_label_events(writer: Writer, db: Connection, drifts: Sequence[Drift]) -> None:
    """One `created` for each live label: the first one stays."""
    keys = _keys(drifts)

    async def transaction() -> None:
        async with db.transaction():
            live = [row[0] for row in await db.fetch(sql.lock(LABELS), keys)]
            await db.execute(_LABEL_EVENTS_AGAIN, live)
            await db.execute(_LABEL_EVENTS_MISSING, live)

    await writer.retry(transaction)


# Gates --------------------------------------------------------------------------------------


async def _mend_gates(writer: Writer, db: Connection, drifts: Sequence[Drift], kind: str) -> None:
    """What is `unowned` belongs to a gate of the predecessor's, whose record we never saw: it stays."""
    keys = sorted({drift.target for drift in drifts if drift.problem != "unowned"})

    async def transaction() -> None:
        effects = Effects(frozenset())
        async with db.transaction():
            uris = [r[0] for r in await db.fetch(_GATES_OF, keys, kind)]
            for row in await db.fetch(sql.lock(GATES), uris):
                derive.added(effects, GATES, tuple(row), None)
            causes = {row[GATE.post_uri] for row in effects.gates_set.values()}
            if extra := [key for key in keys if key not in causes]:
                await db.fetch(_GATE_ROWS_LOCK.format(kind=kind), extra)
                await db.execute(_GATE_ROWS_EXTRA.format(kind=kind), extra)
            if effects.gates_set:
                await write_gates(db, effects)

    await writer.retry(transaction)


# What follows from one row --------------------------------------------------------------------


async def _mend_feed_items(writer: Writer, db: Connection, drifts: Sequence[Drift]) -> None:
    keys = _keys(drifts)

    async def transaction() -> None:
        effects = Effects(frozenset({"feed_items"}))
        async with db.transaction():
            await _add(db, effects, (POSTS, REPOSTS), keys)
            if extra := [key for key in keys if key not in effects.feed_added]:
                await db.fetch(_FEED_ITEMS_LOCK, extra)
                await db.execute(_FEED_ITEMS_EXTRA, extra)
            await db.execute(sql.upsert(FEED_ITEMS), [row for _, row in sorted(effects.feed_added.items())])

    await writer.retry(transaction)


async def _mend_quotes(writer: Writer, db: Connection, drifts: Sequence[Drift]) -> None:
    """Extra rows go first: the pair of posts is unique, whatever the row's key."""
    keys = _keys(drifts)

    async def transaction() -> None:
        effects = Effects(frozenset({"quotes"}))
        async with db.transaction():
            await _add(db, effects, (POSTS,), keys)
            held = [r[0] for r in await db.fetch(_QUOTES_LOCK, keys)]
            posts = {row[0]: tuple(row) for row in await db.fetch(sql.select(POSTS), keys)}
            again = Effects(frozenset({"quotes"}))
            for row in posts.values():
                derive.added(again, POSTS, row, row[POST.cid])
            if extra := sorted(set(held).difference(again.quotes_added)):
                await db.execute(sql.delete(QUOTES), extra)
            if effects.quotes_added:
                await db.execute(sql.upsert(QUOTES), [r for _, r in sorted(effects.quotes_added.items())])

    await writer.retry(transaction)


async def _mend_notifications(writer: Writer, db: Connection, drifts: Sequence[Drift]) -> None:
    extra = sorted({drift.target for drift in drifts if drift.problem == "extra"})
    keys = _keys(drift for drift in drifts if drift.problem != "extra")

    async def transaction() -> None:
        effects = Effects(frozenset({"notifications"}))
        async with db.transaction():
            await _add(db, effects, (POSTS, LIKES, REPOSTS, FOLLOWS), keys)
            if effects.notes_added:
                rows = [row for _, row in sorted(effects.notes_added.items())]
                await db.execute(sql.upsert(NOTIFICATIONS), rows)
        async with db.transaction():
            if extra:
                await db.fetch(_NOTIFICATIONS_LOCK, extra)
                causes = sorted({uri.partition("#notification")[0] for uri in extra})
                caused = Effects(frozenset({"notifications"}))
                for table in (POSTS, LIKES, REPOSTS, FOLLOWS):
                    for row in await db.fetch(sql.select(table), causes):
                        derive.added(caused, table, tuple(row), None)
                gone = [uri for uri in extra if uri not in caused.notes_added]
                await db.execute(sql.delete(NOTIFICATIONS), gone)

    await writer.retry(transaction)


async def _add(db: Connection, effects: Effects, tables: Iterable[Table], uris: list[str]) -> None:
    """What follows from the rows of these uris, under their locks; the CIDs as the derived rows have them."""
    if not uris:
        return
    for table in tables:
        rows = [tuple(row) for row in await db.fetch(sql.lock(table), uris)]
        cids = await cids_of(db, table, [row[0] for row in rows], effects)
        for row in rows:
            derive.added(effects, table, row, cids.get(row[0]) or own_cid(table, row))


# What follows from several rows ----------------------------------------------------------------


async def _mend_viewer_states(writer: Writer, db: Connection, drifts: Sequence[Drift]) -> None:
    """Under the locks of the rows that cause it and of the state itself, made where there is none."""
    pairs = sorted({drift.key for drift in drifts})  # (viewer, post)
    columns = list(zip(*pairs, strict=True))

    async def transaction() -> None:
        async with db.transaction():
            for table in (LIKES, REPOSTS, BOOKMARKS):
                uris = [r[0] for r in await db.fetch(sql.winners(table), *columns)]
                await db.fetch(sql.lock(table), sorted(uris))
            states = sorted((post, viewer, None, None, False) for viewer, post in pairs)
            await db.execute(sql.VIEWERS, states)
            keys = list(zip(*((state[0], state[1]) for state in states), strict=True))
            await db.execute(_VIEWERS_AGAIN, *keys)
            await db.execute(sql.VIEWERS_DROP, *keys)

    await writer.retry(transaction)


async def _mend_aggregates(writer: Writer, db: Connection, drifts: Sequence[Drift]) -> None:
    keys = _keys(drifts)

    async def transaction() -> None:
        async with db.transaction():
            await db.execute(sql.AGGREGATES, [(key, 0, 0, 0, 0, 0) for key in keys])
            await db.execute(sql.RECOUNT, keys, *writer.counted)
            await db.execute(sql.AGGREGATES_DROP, keys)

    await writer.retry(transaction)


# Rows that join two records ---------------------------------------------------------------------


async def _joined(writer: Writer, db: Connection, drifts: Sequence[Drift], kind: str) -> None:
    await recompute(writer, db, {(kind, key): NEVER for key in _keys(drifts)}, set())


def _keys(drifts: Iterable[Drift]) -> list[str]:
    return sorted({drift.key[0] for drift in drifts})


_VERSIONS = "SELECT uri, rev, seq FROM fastworker.versions WHERE uri = ANY($1::text[])"
_TWIN_VERSIONS = "SELECT uri, rev, seq FROM fastworker.twins WHERE uri = ANY($1::text[])"
_TWINS = "SELECT uri, table_name, rkey, rev, seq, cid, row_values FROM fastworker.twins WHERE uri = ANY($1::text[])"
_VERSIONS_LOCK = 'SELECT uri FROM fastworker.versions WHERE uri = ANY($1::text[]) ORDER BY uri COLLATE "C" FOR UPDATE'
_HANDLES_LOCK = (
    'SELECT did FROM fastworker.identities WHERE did = ANY($1::varchar[]) ORDER BY did COLLATE "C" FOR UPDATE'
)
_LABEL_EVENTS_AGAIN = (
    "DELETE FROM public.label_events AS e WHERE e.label_uri = ANY($1::varchar[]) AND e.action = 'created' "
    "AND EXISTS (SELECT 1 FROM public.label_events AS f WHERE f.label_uri = e.label_uri AND f.action = 'created' "
    "AND f.id < e.id)"
)
_LABEL_EVENTS_MISSING = (
    "INSERT INTO public.label_events (label_uri, action) SELECT u.uri, 'created' FROM unnest($1::varchar[]) AS u (uri) "
    "WHERE NOT EXISTS (SELECT 1 FROM public.label_events AS e WHERE e.label_uri = u.uri AND e.action = 'created')"
)
_GATES_OF = "SELECT uri FROM fastworker.gates WHERE post_uri = ANY($1::varchar[]) AND kind = $2 ORDER BY uri"
_GATE_ROWS_LOCK = (
    "SELECT post_uri FROM public.{kind}_gates WHERE post_uri = ANY($1::varchar[]) "
    'ORDER BY post_uri COLLATE "C" FOR UPDATE'
)
_GATE_ROWS_EXTRA = (
    "DELETE FROM public.{kind}_gates AS t WHERE t.post_uri = ANY($1::varchar[]) AND NOT EXISTS ("
    "SELECT 1 FROM fastworker.gates AS g WHERE g.post_uri = t.post_uri AND g.kind = '{kind}')"
)
_FEED_ITEMS_LOCK = (
    'SELECT uri FROM public.feed_items WHERE uri = ANY($1::varchar[]) ORDER BY uri COLLATE "C" FOR UPDATE'
)
_FEED_ITEMS_EXTRA = (
    "DELETE FROM public.feed_items AS f WHERE f.uri = ANY($1::varchar[]) "
    "AND NOT EXISTS (SELECT 1 FROM public.posts AS p WHERE p.uri = f.uri) "
    "AND NOT EXISTS (SELECT 1 FROM public.reposts AS r WHERE r.uri = f.uri)"
)
_QUOTES_LOCK = 'SELECT uri FROM public.quotes WHERE post_uri = ANY($1::varchar[]) ORDER BY uri COLLATE "C" FOR UPDATE'
_NOTIFICATIONS_LOCK = (
    'SELECT uri FROM public.notifications WHERE uri = ANY($1::varchar[]) ORDER BY uri COLLATE "C" FOR UPDATE'
)
_VIEWERS_AGAIN = (
    "UPDATE public.post_viewer_states AS t SET "
    "like_uri = (SELECT r.uri FROM public.likes AS r WHERE r.user_did = t.viewer_did AND r.post_uri = t.post_uri), "
    "repost_uri = (SELECT r.uri FROM public.reposts AS r WHERE r.user_did = t.viewer_did AND r.post_uri = t.post_uri), "
    "bookmarked = EXISTS (SELECT 1 FROM public.bookmarks AS r WHERE r.user_did = t.viewer_did "
    "AND r.post_uri = t.post_uri), updated_at = now() "
    "FROM unnest($1::varchar[], $2::varchar[]) AS u (post, viewer) "
    "WHERE t.post_uri = u.post AND t.viewer_did = u.viewer"
)

_MENDERS: dict[str, Callable[[Writer, Connection, Sequence[Drift]], Awaitable[None]]] = {
    "remove": _mend_remove,
    "twins": _mend_twins,
    "users": _mend_users,
    "profiles": _mend_profiles,
    "handles": _mend_handles,
    "label_events": _mend_label_events,
    "feed_items": _mend_feed_items,
    "quotes": _mend_quotes,
    "notifications": _mend_notifications,
    "viewer_states": _mend_viewer_states,
    "aggregates": _mend_aggregates,
    "thread_gates": partial(_mend_gates, kind="thread"),
    "post_gates": partial(_mend_gates, kind="post"),
    "context": partial(_joined, kind="context"),
    "gate": partial(_joined, kind="gate"),
    "like_count": partial(_joined, kind="like_count"),
}
