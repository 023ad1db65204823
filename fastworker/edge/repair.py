"""Mending what `fastworker verify` finds, by key: the writing half, with the writer's own rows, locks and statements.

Whoever writes a derived row first holds what it follows from. So a missing or wrong row is written again under the
lock of its cause, and a row without a cause is locked first and removed by the next statement, whose snapshot sees
every cause that was committed before the lock; one that commits later writes its row after us.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from fastworker.edge.audit import Check, Drift
from fastworker.edge.store import Connection, Store, thaw
from fastworker.table import derive as derived
from fastworker.table import merge
from fastworker.table.batch import Change
from fastworker.table.derive import Effects
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
_NEVER = datetime(1970, 1, 1, tzinfo=UTC)  # when nothing was owed: nothing is paid for it


class Repair(Store):
    """A writer that takes keys instead of events."""

    async def mend(self, check: Check, drifts: Sequence[Drift]) -> None:
        """Make these rows right, whatever they are by now. Raises StoreUnavailable, RowRejected."""
        for start in range(0, len(drifts), PIECE):
            piece = drifts[start : start + PIECE]
            async with self._connection() as connection:
                await getattr(self, f"_mend_{check.mend}")(connection, piece)

    # Records ------------------------------------------------------------------------------------

    async def _mend_remove(self, connection: Connection, drifts: Sequence[Drift]) -> None:
        """As if their owners had deleted them now: deletes with the versions that the records have."""
        uris = sorted({drift.target for drift in drifts})
        versions = {r[0]: (r[1], r[2]) for r in await connection.fetch(_VERSIONS, uris)}
        twins = {r[0]: (r[1], r[2]) for r in await connection.fetch(_TWIN_VERSIONS, uris)}
        by_table: dict[str, tuple[Table, list[str]]] = {}
        for uri in uris:
            table = collection_table(uri)
            by_table.setdefault(table.name, (table, []))[1].append(uri)
        for table, mine in by_table.values():
            if table.hot:
                for uri, rev, seq in await connection.fetch(merge.versions_of(table), mine):
                    versions[uri] = (rev, int(seq) if seq is not None and seq.isdecimal() else None)
        kills = []
        for uri in uris:
            rev, seq = versions.get(uri) or twins.get(uri) or (None, None)
            kills.append(
                Change(collection_table(uri), uri, derived.did_of(uri), uri.rpartition("/")[2], rev, seq, 0, None, None)
            )
        await self._main(connection, kills, set(twins), None)

    async def _mend_twins(self, connection: Connection, drifts: Sequence[Drift]) -> None:
        """Settle the pairs of these twins once more: whoever has the lowest rkey takes the row."""
        uris = sorted({drift.target for drift in drifts})

        async def settle(fx: Effects) -> int:
            await connection.fetch(_VERSIONS_LOCK, uris)  # the gate of the cold tables
            changes = await self._twins(connection, uris)
            rows = 0
            for table in TABLES:
                if mine := [change for change in changes if change.table is table]:
                    rows += await self._settle(connection, table, {change.uri: change for change in mine}, fx)
            return rows

        await self._commit(connection, settle)

    async def _twins(self, connection: Connection, uris: list[str]) -> list[Change]:
        tables = {table.name: table for table in TABLES}
        return [
            Change(
                tables[r["table_name"]],
                r["uri"],
                derived.did_of(r["uri"]),
                r["rkey"],
                r["rev"],
                r["seq"],
                0,
                r["cid"],
                thaw(tables[r["table_name"]], r["row_values"]),
            )
            for r in await connection.fetch(_TWINS, uris)
        ]

    # Users --------------------------------------------------------------------------------------

    async def _mend_users(self, connection: Connection, drifts: Sequence[Drift]) -> None:
        dids = sorted({drift.target for drift in drifts})

        async def transaction() -> None:
            await connection.execute(merge.USERS, dids)

        await self._retry(transaction)

    async def _mend_profiles(self, connection: Connection, drifts: Sequence[Drift]) -> None:
        keys = _keys(drifts)

        async def transaction() -> None:
            async with connection.transaction():
                rows = await connection.fetch(merge.lock(PROFILES), keys)
                profiles = sorted(tuple(row)[1:] for row in rows)
                if profiles:
                    await connection.execute(merge.PROFILES, *zip(*profiles, strict=True))

        await self._retry(transaction)

    async def _mend_handles(self, connection: Connection, drifts: Sequence[Drift]) -> None:
        keys = _keys(drifts)

        async def transaction() -> None:
            async with connection.transaction():
                await connection.fetch(_HANDLES_LOCK, keys)
                await connection.execute(merge.SHOW_HANDLES, keys, [], self._verified_only)

        await self._retry(transaction)

    async def _mend_label_events(self, connection: Connection, drifts: Sequence[Drift]) -> None:
        """One `created` for each live label: the first one stays."""
        keys = _keys(drifts)

        async def transaction() -> None:
            async with connection.transaction():
                live = [row[0] for row in await connection.fetch(merge.lock(LABELS), keys)]
                await connection.execute(_LABEL_EVENTS_AGAIN, live)
                await connection.execute(_LABEL_EVENTS_MISSING, live)

        await self._retry(transaction)

    # Gates --------------------------------------------------------------------------------------

    async def _mend_thread_gates(self, connection: Connection, drifts: Sequence[Drift]) -> None:
        await self._mend_gates(connection, drifts, "thread")

    async def _mend_post_gates(self, connection: Connection, drifts: Sequence[Drift]) -> None:
        await self._mend_gates(connection, drifts, "post")

    async def _mend_gates(self, connection: Connection, drifts: Sequence[Drift], kind: str) -> None:
        """What is `unowned` belongs to a gate of the predecessor's, whose record we never saw: it stays."""
        keys = sorted({drift.target for drift in drifts if drift.problem != "unowned"})

        async def transaction() -> None:
            fx = Effects(frozenset())
            async with connection.transaction():
                uris = [r[0] for r in await connection.fetch(_GATES_OF, keys, kind)]
                for row in await connection.fetch(merge.lock(GATES), uris):
                    derived.added(fx, GATES, tuple(row), None)
                causes = {row[2] for row in fx.gates_set.values()}
                if extra := [key for key in keys if key not in causes]:
                    await connection.fetch(_GATE_ROWS_LOCK.format(kind=kind), extra)
                    await connection.execute(_GATE_ROWS_EXTRA.format(kind=kind), extra)
                if fx.gates_set:
                    await self._gates(connection, fx)

        await self._retry(transaction)

    # What follows from one row --------------------------------------------------------------------

    async def _mend_feed_items(self, connection: Connection, drifts: Sequence[Drift]) -> None:
        keys = _keys(drifts)

        async def transaction() -> None:
            fx = Effects(frozenset({"feed_items"}))
            async with connection.transaction():
                await self._add(connection, fx, (POSTS, REPOSTS), keys)
                if extra := [key for key in keys if key not in fx.feed_added]:
                    await connection.fetch(_FEED_ITEMS_LOCK, extra)
                    await connection.execute(_FEED_ITEMS_EXTRA, extra)
                await connection.execute(merge.upsert(FEED_ITEMS), [row for _, row in sorted(fx.feed_added.items())])

        await self._retry(transaction)

    async def _mend_quotes(self, connection: Connection, drifts: Sequence[Drift]) -> None:
        """Extra rows go first: the pair of posts is unique, whatever the row's key."""
        keys = _keys(drifts)

        async def transaction() -> None:
            fx = Effects(frozenset({"quotes"}))
            async with connection.transaction():
                await self._add(connection, fx, (POSTS,), keys)
                held = [r[0] for r in await connection.fetch(_QUOTES_LOCK, keys)]
                posts = {row[0]: tuple(row) for row in await connection.fetch(merge.select(POSTS), keys)}
                again = Effects(frozenset({"quotes"}))
                for row in posts.values():
                    derived.added(again, POSTS, row, row[1])
                if extra := sorted(set(held).difference(again.quotes_added)):
                    await connection.execute(merge.delete(QUOTES), extra)
                if fx.quotes_added:
                    await connection.execute(merge.upsert(QUOTES), [r for _, r in sorted(fx.quotes_added.items())])

        await self._retry(transaction)

    async def _mend_notifications(self, connection: Connection, drifts: Sequence[Drift]) -> None:
        extra = sorted({drift.target for drift in drifts if drift.problem == "extra"})
        keys = _keys(drift for drift in drifts if drift.problem != "extra")

        async def transaction() -> None:
            fx = Effects(frozenset({"notifications"}))
            async with connection.transaction():
                await self._add(connection, fx, (POSTS, LIKES, REPOSTS, FOLLOWS), keys)
                if fx.notes_added:
                    rows = [row for _, row in sorted(fx.notes_added.items())]
                    await connection.execute(merge.upsert(NOTIFICATIONS), rows)
            async with connection.transaction():
                if extra:
                    await connection.fetch(_NOTIFICATIONS_LOCK, extra)
                    causes = sorted({uri.partition("#notification")[0] for uri in extra})
                    caused = Effects(frozenset({"notifications"}))
                    for table in (POSTS, LIKES, REPOSTS, FOLLOWS):
                        for row in await connection.fetch(merge.select(table), causes):
                            derived.added(caused, table, tuple(row), None)
                    gone = [uri for uri in extra if uri not in caused.notes_added]
                    await connection.execute(merge.delete(NOTIFICATIONS), gone)

        await self._retry(transaction)

    async def _add(self, connection: Connection, fx: Effects, tables: Iterable[Table], uris: list[str]) -> None:
        """What follows from the rows of these uris, under their locks; the CIDs as the derived rows have them."""
        if not uris:
            return
        for table in tables:
            rows = [tuple(row) for row in await connection.fetch(merge.lock(table), uris)]
            cids = await self._cids(connection, table, [row[0] for row in rows], fx)
            for row in rows:
                derived.added(fx, table, row, cids.get(row[0]) or (row[1] if "cid" in table.columns else None))

    # What follows from several rows ----------------------------------------------------------------

    async def _mend_viewer_states(self, connection: Connection, drifts: Sequence[Drift]) -> None:
        """Under the locks of the rows that cause it and of the state itself, made where there is none."""
        pairs = sorted({drift.key for drift in drifts})  # (viewer, post)
        columns = list(zip(*pairs, strict=True))

        async def transaction() -> None:
            async with connection.transaction():
                for table in (LIKES, REPOSTS, BOOKMARKS):
                    uris = [r[0] for r in await connection.fetch(merge.winners(table), *columns)]
                    await connection.fetch(merge.lock(table), sorted(uris))
                states = sorted((post, viewer, None, None, False) for viewer, post in pairs)
                await connection.execute(merge.VIEWERS, states)
                keys = list(zip(*((state[0], state[1]) for state in states), strict=True))
                await connection.execute(_VIEWERS_AGAIN, *keys)
                await connection.execute(merge.VIEWERS_DROP, *keys)

        await self._retry(transaction)

    async def _mend_aggregates(self, connection: Connection, drifts: Sequence[Drift]) -> None:
        keys = _keys(drifts)

        async def transaction() -> None:
            async with connection.transaction():
                await connection.execute(merge.AGGREGATES, [(key, 0, 0, 0, 0, 0) for key in keys])
                await connection.execute(merge.recount(self._derive), keys)
                await connection.execute(merge.AGGREGATES_DROP, keys)

        await self._retry(transaction)

    # Rows that join two records ---------------------------------------------------------------------

    async def _mend_context(self, connection: Connection, drifts: Sequence[Drift]) -> None:
        await self._joined(connection, "context", drifts)

    async def _mend_gate(self, connection: Connection, drifts: Sequence[Drift]) -> None:
        await self._joined(connection, "gate", drifts)

    async def _mend_like_count(self, connection: Connection, drifts: Sequence[Drift]) -> None:
        await self._joined(connection, "like_count", drifts)

    async def _joined(self, connection: Connection, kind: str, drifts: Sequence[Drift]) -> None:
        await self._recompute(connection, {(kind, key): _NEVER for key in _keys(drifts)}, set())


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
