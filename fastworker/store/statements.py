"""SQL text: functions of a table, and the statements of the derived tables. Pure.

Every statement takes arrays and touches many rows. The caller passes keys sorted, and `unnest` keeps
their order, so that every writer locks in the same order. A statement whose result depends on waiting
for a lock never shares a WITH with what depends on that result: READ COMMITTED gives one snapshot
per statement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastworker.table import schema
from fastworker.table.schema import (
    AGGREGATIONS,
    COLLECTIONS,
    FEED_ITEMS,
    NOTIFICATIONS,
    QUOTES,
    TABLES,
    VIEWER_STATES,
    Table,
)


def _rows(table: Table) -> str:
    """$1 as rows: one array of composites costs the client and the server half of what an array per column does."""
    return f"unnest($1::{table.row_type}[])"


def upsert(table: Table, *replaced: str) -> str:
    """Rows of a derived table, whole: a later word replaces an earlier one."""
    columns = ", ".join(table.columns)
    key = table.key.split(", ")
    sets = ", ".join(replaced) or ", ".join(f"{c} = excluded.{c}" for c in table.columns if c not in key)
    return (
        f"INSERT INTO {table.qualified} AS t ({columns}) SELECT * FROM {_rows(table)} "
        f"ON CONFLICT ({table.key}) DO UPDATE SET {sets}"
    )


def insert(table: Table, *, or_nothing: bool = True) -> str:
    """Refused rows (any unique conflict) are not among the returned uris; or they are an error."""
    columns = ", ".join(table.columns)
    conflict = "ON CONFLICT DO NOTHING " if or_nothing else ""
    return f"INSERT INTO {table.qualified} ({columns}) SELECT * FROM {_rows(table)} {conflict}RETURNING {table.key}"


def taken(table: Table) -> str:
    """Those of $1 uris that the table would refuse: the pair ($2, $3) is there, or, without pairs, the uri.

    A record that changed its pair is not found by it: the insert will tell.
    """
    if not table.pair:
        return f"SELECT {table.key} FROM {table.qualified} WHERE {table.key} = ANY($1::varchar[])"
    a, b = table.pair
    return (
        "SELECT u.uri FROM unnest($1::varchar[], $2::varchar[], $3::varchar[]) AS u (uri, a, b) "
        f"JOIN {table.qualified} AS t ON t.{a} = u.a AND t.{b} = u.b"
    )


def update(table: Table) -> str:
    """The whole record is replaced; columns that are not ours keep their values."""
    sets = ", ".join(f"{c} = u.{c}" for c in table.columns if c != table.key)
    return f"UPDATE {table.qualified} AS t SET {sets} FROM {_rows(table)} AS u WHERE t.{table.key} = u.{table.key}"


def readable(table: Table) -> str:
    """The columns as Python can hold them: dates of other writers that it cannot (year 20000, before Christ, infinity)
    become the nearest it can."""
    return ", ".join(
        f"greatest(least({c}, '9999-12-31 23:59:59.999999'), '0001-01-01')" if type_ == "timestamp" else c
        for c, type_ in zip(table.columns, table.types, strict=True)
    )


def pair_in(table: Table) -> str:
    """A row's pair as `table.pairs.pair_of` has it."""
    return " || E'\\n' || ".join(table.pair)


def select(table: Table) -> str:
    """The rows of $1 uris as they are; those that do not exist are left out."""
    return f"SELECT {readable(table)} FROM {table.qualified} WHERE {table.key} = ANY($1::varchar[])"


def lock(table: Table, *, free: bool = False) -> str:
    """The same, locked in the order in which Python sorts keys, whatever the database's collation.

    `free`: those that nobody else has locked.
    """
    skip = " SKIP LOCKED" if free else ""
    # mutant: pair refused without lock
    return f'{select(table)} ORDER BY {table.key} COLLATE "C" FOR UPDATE{skip}'


def present(table: Table) -> str:
    return f"SELECT {table.key} FROM {table.qualified} WHERE {table.key} = ANY($1::varchar[])"


def delete(table: Table) -> str:
    return f"DELETE FROM {table.qualified} WHERE {table.key} = ANY($1::varchar[])"


def versions_of(table: Table) -> str:
    """(uri, rev, seq text) of the stored rows of $1 uris, without locking. Hot tables only."""
    return f"SELECT uri, commit_rev, commit_seq FROM {table.qualified} WHERE uri = ANY($1::varchar[])"


def locate(table: Table) -> str:
    """Where each of $1 uris is, table or twins, with its pair: one statement, so one snapshot."""
    version = "commit_rev, commit_seq" if table.hot else "NULL::text, NULL::text"
    return (
        f"SELECT uri, {pair_in(table)} AS pair, true AS in_table, {version} FROM {table.qualified} WHERE uri = ANY($1::varchar[]) "
        "UNION ALL SELECT uri, pair, false, rev, seq::text FROM fastworker.twins "
        f"WHERE uri = ANY($1::text[]) AND table_name = '{table.name}'"
    )


def winners(table: Table) -> str:
    """uris of the rows that hold the given pairs (one array per pair column)."""
    arrays = ", ".join(f"${i}::varchar[]" for i in range(1, len(table.pair) + 1))
    names = ", ".join(f"p{i}" for i in range(len(table.pair)))
    on = " AND ".join(f"t.{column} = p.p{i}" for i, column in enumerate(table.pair))
    return f"SELECT t.uri FROM unnest({arrays}) AS p ({names}) JOIN {table.qualified} AS t ON {on}"


# mutant: a deletion by the seq of another relay
_MANY_RELAYS = "(SELECT count(*) > 1 FROM fastworker.relays)"


def _seq(stored: str, new: str, *, seq: str = "") -> str:
    """The stored seq, but nothing where only the other side has a rev and there are two relays: then it is older."""
    seq = seq or f"{stored}.seq"
    return f"CASE WHEN {stored}.rev IS NULL AND {new}.rev IS NOT NULL AND {_MANY_RELAYS} THEN NULL ELSE {seq} END"


TWINS = (
    "SELECT uri, pair, rkey, rev, seq, cid, row_values FROM fastworker.twins "
    "WHERE table_name = $1 AND pair = ANY($2::text[])"
)
TWINS_PUT = (
    "INSERT INTO fastworker.twins (uri, table_name, pair, rkey, rev, seq, cid, row_values) "
    "SELECT * FROM unnest($1::fastworker.twins[]) "
    "ON CONFLICT (uri) DO UPDATE SET pair = excluded.pair, rev = excluded.rev, seq = excluded.seq, "
    "cid = excluded.cid, row_values = excluded.row_values "
    f"WHERE NOT fastworker.newer(twins.rev, {_seq('twins', 'excluded')}, excluded.rev, excluded.seq)"
)
TWINS_DELETE = "DELETE FROM fastworker.twins WHERE uri = ANY($1::text[])"
CIDS = {
    # where the CID of a record without a cid column is kept, exactly when something derived needs it
    "likes": "SELECT left(uri, -13), cid FROM public.notifications WHERE uri = ANY($1::varchar[])",
    "follows": "SELECT left(uri, -13), cid FROM public.notifications WHERE uri = ANY($1::varchar[])",
    "reposts": "SELECT uri, cid FROM public.feed_items WHERE uri = ANY($1::varchar[])",
}

# Versions ---------------------------------------------------------------------------------------
# What a deleted account beats: within one relay all below its seq, with two of them all whose rev is before its moment.
_GONE_REV = f"CASE WHEN {_MANY_RELAYS} THEN fastworker.tid(coalesce(deleted_at, event_at)) END"
GONE = f"{_GONE_REV}, CASE WHEN NOT {_MANY_RELAYS} THEN deleted_seq END"
# $1 uris of hot tables, $2 DIDs: tombstones and deleted accounts
BEATS = (
    "SELECT 'tombstone' AS kind, uri, rev, "
    # mutant: tombstone not read
    f"CASE WHEN rev IS NOT NULL OR NOT {_MANY_RELAYS} THEN seq END AS seq FROM fastworker.versions WHERE uri = ANY($1::text[]) AND deleted "
    f"UNION ALL SELECT 'account', did, {GONE} FROM fastworker.accounts "
    "WHERE did = ANY($2::varchar[]) AND deleted_seq IS NOT NULL"
)
WAITING = "SELECT 'twin', w.uri, NULL, NULL FROM fastworker.twins AS w WHERE w.uri = ANY($1::text[])"
# Those that are in the table as well: two writers moved them, to two pairs. OFFSET 0: else PostgreSQL may read all of a table
# into a hash, to look for one record.
IN_TWO_PLACES = (
    WAITING
    + " AND CASE w.table_name "
    + " ".join(
        f"WHEN '{table.name}' THEN EXISTS ("
        f'SELECT FROM {table.qualified} AS t WHERE t.uri = w.uri COLLATE "default" OFFSET 0)'
        for table in TABLES
        if table.hot
    )
    + " END"
)
# Whether anything may beat them; whether it does depends on versions. As a number, so that the index of all tombstones,
# which has no URIs, is not taken.
IS_BEATEN = (
    "EXISTS (SELECT FROM fastworker.versions AS v WHERE v.uri = ANY($1) AND v.deleted::int = 1) "
    "OR EXISTS (SELECT FROM fastworker.accounts AS a WHERE a.did = ANY($2) AND a.deleted_seq IS NOT NULL)"
)
# Floors: what is older than one is superseded by a snapshot of its repository ---------------------------
# A deletion that is older than the account's floor, and comes late, takes away what the snapshot left as it was.
SETTLE_AGAIN = (
    "INSERT INTO fastworker.repos AS r (did, reason, priority) SELECT f.did, 'deletion', 1 "
    "FROM unnest($1::varchar[], $2::bigint[], $3::timestamptz[]) AS u (did, seq, at) "
    "JOIN fastworker.floors AS f ON f.did = u.did "
    f"WHERE CASE WHEN {_MANY_RELAYS} THEN fastworker.tid(u.at) <= f.rev ELSE u.seq <= f.seq END "
    "ON CONFLICT (did) DO UPDATE SET state = 'waiting', reason = excluded.reason, "
    "priority = least(r.priority, excluded.priority), attempts = 0, next_at = '-infinity', error = NULL, "
    "owner = NULL, queued_at = now()"
)
FLOOR_PUT = (
    "INSERT INTO fastworker.floors AS f (did, rev, seq) VALUES ($1, $2, $3) "
    "ON CONFLICT (did) DO UPDATE SET rev = excluded.rev, seq = excluded.seq, written_at = now() "
    # mutant: a floor goes down
    "WHERE $4::boolean OR excluded.rev > f.rev OR (excluded.rev = f.rev AND excluded.seq >= f.seq) RETURNING true"
)
# Transactions that have read floors and may not have seen the newest.
FLOOR_READERS = (
    "SELECT l.virtualtransaction FROM pg_locks AS l WHERE l.locktype = 'relation' AND l.granted "
    "AND l.relation = 'fastworker.floors'::regclass AND l.pid <> pg_backend_pid() "
    "AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)
# Workers of a release that knows no floors: their sessions do not say that they do.
WITHOUT_FLOORS = (
    "SELECT count(*) FROM pg_stat_activity AS a WHERE a.datname = current_database() "
    "AND a.application_name IN ('fastworker', 'fastworker-reapply') AND a.backend_start < now() - interval '2 seconds' "
    "AND NOT EXISTS (SELECT FROM pg_locks AS l WHERE l.pid = a.pid AND l.locktype = 'advisory' AND l.classid = $1)"
)
FLOORS_PRUNE = (
    "DELETE FROM fastworker.floors AS f USING fastworker.horizon AS h WHERE f.written_at <= h.pruned_until "
    "AND h.announced_at < now() - $1::interval"
)

# The next piece of tombstones for a second look, (after, until): those written more than $1 ago, about $2 of them
LOOK_AGAIN_PIECE = (
    "SELECT h.looked_until, p.until FROM fastworker.horizon AS h, LATERAL (SELECT max(t.written_at) AS until FROM ("
    "SELECT v.written_at FROM fastworker.versions AS v WHERE v.deleted AND v.written_at > h.looked_until "
    "AND v.written_at <= now() - $1::interval ORDER BY v.written_at FETCH FIRST ($2) ROWS WITH TIES) AS t) AS p "
    "WHERE p.until IS NOT NULL"
)
# OFFSET 0: from the tombstones to the rows, never the other way, whichever table was empty when it was planned
_BEATEN = (
    "SELECT v.uri, v.rev, v.seq FROM fastworker.versions AS v, LATERAL (SELECT FROM {table} AS t "
    "WHERE t.uri = {uri} AND NOT fastworker.newer({version}, v.rev, v.seq) OFFSET 0) AS found "
    "WHERE v.deleted AND v.written_at > $1 AND v.written_at <= $2"
)
_HOT_BEATEN = _BEATEN + " AND split_part(v.uri, '/', 4) = '{collection}'"
_HOT_SEQ = "CASE WHEN t.commit_seq ~ '^[0-9]{1,18}$' THEN t.commit_seq::bigint END"
_HOT_VERSION = f"t.commit_rev, {_HOT_SEQ}"
# Those of the piece that beat a record of the hot tables which is there all the same
LOOK_AGAIN = " UNION ALL ".join(
    [
        _HOT_BEATEN.format(
            table=table.qualified, uri='v.uri::varchar COLLATE "default"', version=_HOT_VERSION, collection=collection
        )
        for collection, table in COLLECTIONS.items()
        if table.hot
    ]
    + [_BEATEN.format(table="fastworker.twins", uri="v.uri", version="t.rev, t.seq")]
)
LOOK_LATER = "UPDATE fastworker.versions SET written_at = now() WHERE uri = ANY($1::text[]) AND deleted"
LOOKED_AGAIN = "UPDATE fastworker.horizon SET looked_until = $2 WHERE looked_until = $1"
AMONG_TWINS = "SELECT uri FROM fastworker.twins WHERE uri = ANY($1::text[])"
TOMBSTONES = (
    "INSERT INTO fastworker.versions AS v (uri, rev, seq, deleted) "
    "SELECT u.uri, u.rev, u.seq, true FROM unnest($1::text[], $2::text[], $3::bigint[]) AS u (uri, rev, seq) "
    # mutant: a tombstone below a floor
    "WHERE NOT EXISTS (SELECT FROM fastworker.floors AS f WHERE f.did = split_part(u.uri, '/', 3) "
    'AND CASE WHEN u.rev IS NULL THEN u.seq <= f.seq ELSE u.rev COLLATE "C" < f.rev END) '
    "ON CONFLICT (uri) DO UPDATE SET rev = excluded.rev, seq = excluded.seq, deleted = true, written_at = now() "
    f"WHERE fastworker.newer(excluded.rev, excluded.seq, v.rev, {_seq('v', 'excluded')})"
)
# The gate of the cold tables: returns the uris whose operation is the newest. The row lock it takes orders
# the writers of a record until they commit.
GATE = (
    "INSERT INTO fastworker.versions AS v (uri, rev, seq, cid, deleted) "
    "SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::text[], $5::boolean[]) "
    "ON CONFLICT (uri) DO UPDATE SET rev = excluded.rev, seq = excluded.seq, cid = excluded.cid, "
    "deleted = excluded.deleted, written_at = now() "
    f"WHERE fastworker.newer(excluded.rev, excluded.seq, v.rev, {_seq('v', 'excluded')}) "
    f"OR (NOT fastworker.newer(v.rev, {_seq('v', 'excluded')}, excluded.rev, excluded.seq) "
    "AND (excluded.deleted, coalesce(excluded.cid, '')) > (v.deleted, coalesce(v.cid, ''))) "
    "RETURNING uri"
)

# What an entry may assume: how far tombstones are pruned, and whether more than one sequence space was seen.
ENTRY_RULES = f"SELECT (SELECT pruned_until FROM fastworker.horizon), {_MANY_RELAYS} AS many_relays"
# Tombstones are pruned in two steps, so that every worker knows the horizon before they are gone: $1 keep, $2 notice.
PRUNE = (
    "DELETE FROM fastworker.versions AS v USING (SELECT v.uri FROM fastworker.horizon AS h JOIN fastworker.versions AS v "
    "ON v.deleted AND v.written_at <= h.pruned_until WHERE h.announced_at < now() - $1::interval "
    "ORDER BY v.written_at LIMIT $2 FOR UPDATE OF v SKIP LOCKED) AS old WHERE v.uri = old.uri"
)
# The next piece, never past what any stream's group has finished: an unread entry may still be beaten by them. $3: now
# by other clocks than this server's; the earlier one counts.
ANNOUNCE = (
    "UPDATE fastworker.horizon AS h SET pruned_until = n.until, announced_at = now() FROM ("
    "SELECT max(t.written_at) AS until FROM (SELECT written_at FROM fastworker.versions WHERE deleted "
    "AND written_at < least(now() - $1::interval, $3::timestamptz - $1, (SELECT min(f.at) FROM (SELECT to_timestamp("
    "max(split_part(entry_id, '-', 1)::numeric) / 1000.0) AS at FROM fastworker.progress GROUP BY stream) AS f)) "
    "ORDER BY written_at LIMIT $2) AS t) AS n WHERE n.until > h.pruned_until "
    "AND EXISTS (SELECT 1 FROM fastworker.progress) AND NOT EXISTS (SELECT 1 FROM fastworker.versions AS v "
    "WHERE v.deleted AND v.written_at <= h.pruned_until)"
)


def absent(table: Table) -> str:
    """Those of $1 uris of which nothing is known: no row, no twin, no version."""
    return (
        "SELECT u.uri FROM unnest($1::text[]) AS u (uri) WHERE NOT EXISTS ("
        f"SELECT 1 FROM {table.qualified} AS t WHERE t.{table.key} = u.uri) "
        "AND NOT EXISTS (SELECT 1 FROM fastworker.twins AS w WHERE w.uri = u.uri) "
        "AND NOT EXISTS (SELECT 1 FROM fastworker.versions AS v WHERE v.uri = u.uri)"
    )


# Users, accounts, identities ----------------------------------------------------------------------
# A role that may not read statistics sees of others' sessions who they are and what they have locked.
_WHO = (
    "SELECT 'PID ' || a.pid || coalesce(' (' || nullif(a.application_name, '') || ')', '') || ' as ' || a.usename "
    "|| coalesce(', ' || a.state, '') "
    "|| coalesce(', in a transaction for ' || extract(epoch FROM now() - a.xact_start)::int || ' s', '') "
    "|| ': let it end, or SELECT pg_terminate_backend(' || a.pid || ')' FROM pg_stat_activity AS a "
    "WHERE coalesce(a.application_name, '') NOT LIKE 'fastworker%' AND a.usename IS NOT NULL AND EXISTS ("
)
WHO_LOCKS = (
    f"{_WHO}SELECT FROM pg_locks AS l JOIN pg_class AS c ON c.oid = l.relation "
    "JOIN pg_namespace AS n ON n.oid = c.relnamespace "
    "WHERE l.pid = a.pid AND l.granted AND l.mode <> 'AccessShareLock' AND n.nspname IN ('public', 'fastworker')) "
    "UNION ALL SELECT 'the prepared transaction ' || gid || ': COMMIT PREPARED or ROLLBACK PREPARED it' "
    "FROM pg_prepared_xacts WHERE database = current_database() "
    # an advisory lock, which a trigger of the API's may ask for
    f"UNION ALL {_WHO}SELECT FROM pg_locks AS l JOIN pg_database AS d ON d.oid = l.database "
    "WHERE l.pid = a.pid AND l.granted AND l.locktype = 'advisory' AND d.datname = current_database()) LIMIT 1"
)
# The first column of the primary key of a table of ours, by its name alone.
FIRST_OF_KEY = (
    "SELECT i.indrelid::regclass::text, quote_ident(a.attname) FROM pg_index AS i JOIN pg_attribute AS a "
    "ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0] WHERE i.indisprimary AND i.indrelid IN ("
    "to_regclass('public.' || quote_ident($1)), to_regclass('fastworker.' || quote_ident($1))) LIMIT 1"
)
KEY_AT = "SELECT {column}::text FROM {table} WHERE ctid = '{place}'"
USERS = (
    "INSERT INTO public.users (did, handle) SELECT did, 'handle.invalid' FROM unnest($1::varchar[]) AS u (did) "
    "ON CONFLICT (did) DO NOTHING"
)
# In a transaction of its own that waits for no disk: whoever makes the same users waits for this one statement only.
# What is committed later in the same session, and waits for its disk, makes it durable: WAL is written in order.
USERS_FIRST = (
    "WITH early AS (SELECT set_config('synchronous_commit', 'off', true)) "
    "INSERT INTO public.users (did, handle) SELECT did, 'handle.invalid' FROM early, unnest($1::varchar[]) AS u (did) "
    "ON CONFLICT (did) DO NOTHING"
)
# A commit that waits for its disk although no row is written.
DURABLE = "SELECT pg_logical_emit_message(true, 'fastworker', '')"
_AFTER = "now() + least(interval '1 day', interval '30 seconds' * 2.0 ^ least(attempts, 12))"
# $1 dids, $2 relays, $3 seqs, $4 moments, then what the events say
_OF_EVENTS = "unnest($1::varchar[], $2::text[], $3::bigint[], $4::timestamptz[], $5::boolean[], $6::text[])"
_AS_EVENTS = "(did, relay, seq, event_at, active, status)"
# Within one relay the seq decides; without one the later moment, of two deliveries of one event the earlier.
_RANK = (
    # mutant: older account event wins
    "(coalesce({t}.seq, -1), CASE WHEN {t}.seq IS NULL THEN 1 ELSE -1 END * extract(epoch FROM {t}.event_at), "
    "NOT {t}.active, coalesce({t}.status, ''))"
)
# Its row's lock orders the writers of one account.
ACCOUNTS_LOCK = (
    "INSERT INTO fastworker.accounts AS t (did, relay, seq, event_at, active, status) "
    f"SELECT DISTINCT ON (did COLLATE \"C\") did, nullif(relay, ''), seq, event_at, active, status FROM {_OF_EVENTS} "
    f'AS u {_AS_EVENTS} ORDER BY did COLLATE "C" ON CONFLICT (did) DO UPDATE SET did = t.did WHERE false'
)
# What is in fastworker.accounts too: the release before ours knows no other place.
ACCOUNT_EVENTS = (
    "INSERT INTO fastworker.account_events AS t (did, relay, seq, event_at, active, status) "
    f"SELECT DISTINCT ON (did, relay) e.* FROM (SELECT * FROM {_OF_EVENTS} AS u {_AS_EVENTS} UNION ALL "
    "SELECT did, coalesce(relay, ''), seq, event_at, active, status FROM fastworker.accounts WHERE did = ANY($1)) AS e "
    f"ORDER BY did, relay, {_RANK.format(t='e')} DESC ON CONFLICT (did, relay) DO UPDATE SET seq = excluded.seq, "
    "event_at = excluded.event_at, active = excluded.active, status = excluded.status "
    f"WHERE {_RANK.format(t='excluded')} > {_RANK.format(t='t')}"
)
# Of the relays' newest ones the latest: a seq says nothing to another relay.
ACCOUNTS = (
    "UPDATE fastworker.accounts AS a SET relay = nullif(n.relay, ''), seq = n.seq, event_at = n.event_at, "
    "active = n.active, status = n.status FROM (SELECT DISTINCT ON (did) * FROM fastworker.account_events "
    # mutant: account events of relays by seq
    "WHERE did = ANY($1::varchar[]) ORDER BY did, event_at DESC, relay DESC) AS n WHERE a.did = n.did "
    "AND (a.active, a.status, coalesce(a.relay, ''), a.seq, a.event_at) "
    "IS DISTINCT FROM (n.active, n.status, n.relay, n.seq, n.event_at)"
)
ACCOUNTS_DELETED = (
    "UPDATE fastworker.accounts AS a SET deleted_seq = greatest(a.deleted_seq, u.seq), "
    # mutant: purge never begins
    "deleted_at = greatest(a.deleted_at, u.at), purge_pending = true, purged_at = NULL "
    "FROM unnest($1::varchar[], $2::bigint[], $3::timestamptz[]) AS u (did, seq, at) "
    "WHERE a.did = u.did AND (coalesce(a.deleted_seq, -1) < u.seq OR coalesce(a.deleted_at, '-infinity') < u.at)"
)
# The last argument: whether only verified handles are shown
IDENTITIES = "SELECT fastworker.claim_handles_1($1::varchar[], $2::text[], $3::text[], $4::bigint[], $5::timestamptz[], $6::boolean)"
SHOW_HANDLES = "SELECT fastworker.show_handles_1($1, $2, $3)"
IDENTITIES_UNRESOLVED = (
    "INSERT INTO fastworker.identities AS t (did, event_at, marked_at, resolve_pending) "
    "SELECT u.did, u.at, u.at, true FROM unnest($1::varchar[], $2::timestamptz[]) AS u (did, at) "
    "ON CONFLICT (did) DO UPDATE SET resolve_pending = true, marked_at = excluded.marked_at, "
    "resolve_after = '-infinity', attempts = 0 WHERE greatest(t.event_at, t.marked_at, t.verified_at) < excluded.marked_at"
)
# Handle resolution, beside the stream. Another event meanwhile moves the mark: what was being resolved is then not taken.
UNRESOLVED = (
    "SELECT i.did, i.marked_at FROM fastworker.identities AS i WHERE i.resolve_pending AND i.resolve_after <= now() "
    "AND NOT EXISTS (SELECT 1 FROM public.user_settings AS s WHERE s.user_did = i.did AND s.data_collection_forbidden) "
    "ORDER BY i.resolve_after LIMIT $1"
)
# What was claimed while nobody verified handles, and was never asked for: a piece in key order.
CLAIMED_BEFORE = (
    "WITH piece AS (SELECT did FROM fastworker.identities WHERE did > $1 ORDER BY did LIMIT $2), queued AS ("
    "UPDATE fastworker.identities AS i SET resolve_pending = true, attempts = 0 FROM piece AS p WHERE i.did = p.did "
    # mutant: earlier claims are never verified
    "AND NOT i.resolve_pending AND i.handle IS DISTINCT FROM i.verified_handle AND i.handle IS NOT NULL "
    "AND i.resolve_after = '-infinity' RETURNING 1) "
    "SELECT (SELECT max(did) FROM piece), (SELECT count(*) FROM queued)"
)
# A claim that the other side does not confirm yet is asked for again a few times.
RESOLVED = (
    "UPDATE fastworker.identities AS t SET resolve_pending = u.again, attempts = CASE WHEN u.again THEN t.attempts + 1 "
    f"ELSE 0 END, resolve_after = {_AFTER.replace('attempts', 't.attempts')}, verified_handle = coalesce(u.handle, t.verified_handle), "
    "verified_at = CASE WHEN u.handle IS NULL THEN t.verified_at ELSE u.at END FROM ("
    "SELECT v.*, v.handle IS NULL AND i.marked_at = i.event_at AND i.handle IS DISTINCT FROM i.verified_handle "
    "AND i.attempts < 6 AS again, i.verified_handle AS before "
    "FROM unnest($1::varchar[], $2::text[], $3::timestamptz[], $4::timestamptz[]) AS v (did, handle, at, marked_at) "
    "JOIN fastworker.identities AS i ON i.did = v.did) AS u "
    "WHERE t.did = u.did AND t.resolve_pending AND t.marked_at = u.marked_at RETURNING t.did, u.handle, u.before"
)
UNRESOLVABLE = (
    "UPDATE fastworker.identities SET attempts = attempts + 1, "
    f"resolve_after = {_AFTER} "
    "WHERE did = ANY($1::varchar[]) AND resolve_pending"
)
PROFILES = (
    "UPDATE public.users AS t SET display_name = u.display_name, description = u.description, avatar_url = u.avatar_url, "
    "banner_url = u.banner_url, profile_record = u.profile_record, pinned_post = u.pinned_post "
    f"FROM {_rows(schema.PROFILES)} AS u WHERE t.did = u.did"
)
REPAIRS = (
    "INSERT INTO fastworker.repairs AS r (did, rev, seq) SELECT * FROM unnest($1::varchar[], $2::text[], $3::bigint[]) "
    "ON CONFLICT (did) DO UPDATE SET rev = excluded.rev, seq = excluded.seq, seen_at = now() "
    "WHERE fastworker.newer(excluded.rev, excluded.seq, r.rev, r.seq)"
)
# Who is back after a deletion that took rows away: its host may still have them, and no event brings them again.
REACTIVATED = (
    "INSERT INTO fastworker.repairs AS r (did, seq) SELECT u.did, max(u.seq) "
    "FROM unnest($1::varchar[], $2::bigint[]) AS u (did, seq) JOIN fastworker.accounts AS a ON a.did = u.did "
    "LEFT JOIN fastworker.floors AS f ON f.did = u.did "
    "WHERE a.active AND a.deleted_seq IS NOT NULL AND NOT coalesce("
    f"CASE WHEN {_MANY_RELAYS} THEN fastworker.tid(a.deleted_at) <= f.rev ELSE a.deleted_seq <= f.seq END, false) "
    "GROUP BY u.did ON CONFLICT (did) DO UPDATE SET seq = greatest(r.seq, excluded.seq), seen_at = now()"
)
REPAIRED = "DELETE FROM fastworker.repairs WHERE did = $1 AND coalesce(seq, 0) <= $2"
RELAYS = "INSERT INTO fastworker.relays (host) SELECT unnest($1::text[]) ON CONFLICT DO NOTHING"
REFUSED = (
    "INSERT INTO fastworker.refused AS r (uri, did, cid, rev, seq, reason, detail) SELECT * FROM "
    "unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::text[], $7::text[]) "
    "ON CONFLICT (uri) DO UPDATE SET cid = excluded.cid, rev = excluded.rev, seq = excluded.seq, "
    "reason = excluded.reason, detail = excluded.detail, refused_at = now() "
    "WHERE NOT fastworker.newer(r.rev, r.seq, excluded.rev, excluded.seq)"
)
FOLLOWED = "SELECT DISTINCT following_did FROM public.follows WHERE follower_did = ANY($1::varchar[])"
FINISHED = "SELECT stream, seq, entry_id, stored_at FROM fastworker.progress WHERE stream = ANY ($1::text[])"
NOTE_PROGRESS = (
    "INSERT INTO fastworker.progress (stream, consumer, seq, entry_id) VALUES ($1, $2, $3, $4) "
    "ON CONFLICT (stream, consumer) DO UPDATE SET seq = excluded.seq, entry_id = excluded.entry_id, stored_at = now()"
)

# Derived tables -----------------------------------------------------------------------------------
VIEWERS = upsert(
    VIEWER_STATES,
    "like_uri = coalesce(excluded.like_uri, t.like_uri)",
    "repost_uri = coalesce(excluded.repost_uri, t.repost_uri)",
    "bookmarked = t.bookmarked OR excluded.bookmarked",
    "updated_at = now()",
)
VIEWERS_DROP = (
    "DELETE FROM public.post_viewer_states AS t USING unnest($1::varchar[], $2::varchar[]) AS u (post, viewer) "
    "WHERE t.post_uri = u.post AND t.viewer_did = u.viewer AND t.like_uri IS NULL AND t.repost_uri IS NULL "
    "AND NOT (t.bookmarked OR t.thread_muted OR t.reply_disabled OR t.embedding_disabled OR t.pinned)"
)
THREAD_GATES = (
    "INSERT INTO public.thread_gates (post_uri, owner_did, allow_mentions, allow_following, allow_list_members, "
    "allow_list_uris, created_at) SELECT * FROM "
    "unnest($1::varchar[], $2::varchar[], $3::boolean[], $4::boolean[], $5::boolean[], $6::jsonb[], $7::timestamp[]) "
    "ON CONFLICT (post_uri) DO UPDATE SET owner_did = excluded.owner_did, allow_mentions = excluded.allow_mentions, "
    "allow_following = excluded.allow_following, allow_list_members = excluded.allow_list_members, "
    "allow_list_uris = excluded.allow_list_uris, created_at = excluded.created_at, updated_at = now()"
)
THREAD_GATES_DELETE = "DELETE FROM public.thread_gates WHERE post_uri = ANY($1::varchar[])"
POST_GATES = (
    "INSERT INTO public.post_gates (post_uri, embedding_rules, created_at) "
    "SELECT * FROM unnest($1::varchar[], $2::jsonb[], $3::timestamp[]) "
    "ON CONFLICT (post_uri) DO UPDATE SET embedding_rules = excluded.embedding_rules, created_at = excluded.created_at"
)
POST_GATES_DELETE = "DELETE FROM public.post_gates WHERE post_uri = ANY($1::varchar[])"
THREAD_GATE = (
    "thread_posts",
    "thread_owners",
    "thread_mentions",
    "thread_following",
    "thread_members",
    "thread_lists",
    "thread_moments",
)
POST_GATE = ("postgate_posts", "postgate_rules", "postgate_moments")
# What gates become, in this order, with the names of the statements' arguments
OF_GATES = (
    (THREAD_GATES_DELETE, ("no_thread_gates",)),
    (THREAD_GATES, THREAD_GATE),
    (POST_GATES_DELETE, ("no_post_gates",)),
    (POST_GATES, POST_GATE),
)
LABEL_EVENTS = "INSERT INTO public.label_events (label_uri, action) SELECT unnest($1::varchar[]), 'created'"
# DO UPDATE locks the row even where its WHERE is false: a touched aggregate cannot be removed under us.
_COUNTS = AGGREGATIONS.columns[1:]
AGGREGATES = (
    upsert(AGGREGATIONS, *(f"{c} = greatest(0, t.{c} + excluded.{c})" for c in _COUNTS), "updated_at = now()")
    + " WHERE "
    + " OR ".join(f"excluded.{c} <> 0" for c in _COUNTS)
)


COUNTERS = 0x66776374  # "fwct": class of the advisory locks that say who pays the counters of a bucket

JOINED_PARTS = 0x66776A74  # "fwjt": of those that say who recomputes a part of the joined rows that are owed
# What the database refuses for the row's sake, as conditions of PL/pgSQL (store/refusal.py has the same classes).
# Whether a joined row is owed that `pay` recomputes; crowds are `maintain`'s.
STALE_JOINED = "EXISTS (SELECT FROM fastworker.recheck AS k WHERE k.not_before <= now() AND k.kind <> 'root')"
REFUSED_ROW = (
    "data_exception OR integrity_constraint_violation OR with_check_option_violation OR external_routine_exception "
    "OR external_routine_invocation_exception OR program_limit_exceeded OR plpgsql_error"
)

# The routines of the flush (store/sql), called by the names of their arguments -------------------------
_HOT = tuple(table for table in TABLES if table.hot)
_USERS_AND_ROWS = ("new_users", *(f"new_{table.name}" for table in _HOT))
_PROGRESS = ("of_stream", "of_consumer", "until_seq", "until_entry")
_ITEMS = (QUOTES, FEED_ITEMS, NOTIFICATIONS)
_DERIVED = ("with_contexts", "with_gates", "with_services")
COUNTED = ("with_replies", "with_quotes")
UNSEEN = ("unseen_posts", "unseen_viewers", "unseen_likes", "unseen_reposts", "unseen_bookmarks")
# What is committed before the rows, in this order: statements with the names of their arguments. One runs where its first
# argument is there.
TOMBSTONE = ("tombstone_uris", "tombstone_revs", "tombstone_seqs")
ACCOUNT = (
    "account_dids",
    "account_relays",
    "account_seqs",
    "account_moments",
    "account_actives",
    "account_statuses",
)
DELETION = ("deletion_dids", "deletion_seqs", "deletion_moments")
TOLD = ("told_dids", "told_seqs")
CLAIM = ("claim_dids", "claim_handles", "claim_relays", "claim_seqs", "claim_moments", "only_verified")
UNNAMED = ("unnamed_dids", "unnamed_moments")
REPAIR = ("repair_dids", "repair_revs", "repair_seqs")
COMMITTED_FIRST = (
    (USERS, ("new_users",)),
    (TOMBSTONES, TOMBSTONE),
    (ACCOUNTS_LOCK, ACCOUNT),
    (ACCOUNT_EVENTS, ACCOUNT),
    (ACCOUNTS, ACCOUNT[:1]),
    (ACCOUNTS_DELETED, DELETION),
    # mutant: a late deletion against a floor
    (SETTLE_AGAIN, DELETION),
    (REACTIVATED, TOLD),
    (IDENTITIES, CLAIM),
    (IDENTITIES_UNRESOLVED, UNNAMED),
    (REPAIRS, REPAIR),
)
GATED = ("gated_uris", "gated_revs", "gated_seqs", "gated_cids", "gated_deletes")


def _short(table: Table) -> str:
    return table.name.rpartition(".")[2]


def may_be_taken(table: Table) -> bool:
    """Whether a small flush takes upserts of it to be new if their pairs are free: new rows of these are refused if not."""
    return table.hot and bool(table.pair)


def row_arguments(prefix: str, *, hot: bool) -> tuple[tuple[str, str], ...]:
    """An argument for the rows of each such table, and its type."""
    return tuple((f"{prefix}_{_short(table)}", f"{table.row_type}[]") for table in TABLES if table.hot is hot)


# Keys of all tables in one argument, one table's after the other's (a routine has 100 arguments at most), and beside it
# how many there are before each table, and in all. `slice_of` is one table's.
KEYS_READ = ("read_uris", "fresh_uris", "read_pairs")
KEYS_CHANGED = ("read_uris", "gone_uris", "read_pairs")
_ENDS = "_ends"


def key_arguments(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple((name + ends, type_) for name in names for ends, type_ in (("", "varchar[]"), (_ENDS, "int[]")))


def slice_of(name: str, table: Table) -> str:
    number = TABLES.index(table) + 1
    return f"{name}[{name}{_ENDS}[{number}] + 1:{name}{_ENDS}[{number + 1}]]"


def has_any(name: str, table: Table, last: Table | None = None) -> str:
    """Whether there are keys of the table, or of one from it to the last."""
    return f"{name}{_ENDS}[{TABLES.index(table) + 1}] < {name}{_ENDS}[{TABLES.index(last or table) + 2}]"


def keys_of_tables(name: str, keys: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Two arguments: `keys` by table, one after the other; none where there are none."""
    ends, values = [0], list[str]()
    for table in TABLES:
        if table.name in keys:
            values += keys[table.name]
        ends.append(len(values))
    return {name: values, name + _ENDS: ends} if values else {}


def _named(*names: str) -> str:
    """Arguments in named notation: no order to keep by hand."""
    return ", ".join(f"{name} => ${n}" for n, name in enumerate(names, 1))


_LOWEST = ("repos", "lowest_rev", "lowest_seq")
LOOK = f"SELECT * FROM fastworker.look_3({_named('uris', *_LOWEST, 'dids')}, tell => true)"
LOOK_BACK_ARGUMENTS = ("uris", "repos", "posts", "like_posts", "like_users", "crowd", *_DERIVED)
LOOK_BACK = f"SELECT * FROM fastworker.look_back_3({_named(*LOOK_BACK_ARGUMENTS)})"
PUT_ARGUMENTS = (
    *_USERS_AND_ROWS,
    "fresh",
    *(f"{which}_{table.name}" for table in _ITEMS for which in ("no", "new")),
    *UNSEEN,
    *("new_viewers", "deltas", "recounts", *COUNTED, "owed_kinds", "owed_keys"),
    *_PROGRESS,
    *("floors", *_LOWEST, "known_floors"),
)
PUT = f"SELECT * FROM fastworker.put_8({_named(*PUT_ARGUMENTS)})"
FIRST_ARGUMENTS = (
    *dict.fromkeys(n for _, names in COMMITTED_FIRST for n in names),
    "dids",
    *(name for name, _ in key_arguments(KEYS_READ)),
)
FIRST = f"SELECT * FROM fastworker.first_2({_named(*FIRST_ARGUMENTS)})"
CHANGE_ARGUMENTS = (
    *(name for name, _ in key_arguments(KEYS_CHANGED)),
    *("seen", "no_twins", "new_twins"),
    *(name for name, _ in row_arguments("set", hot=True)),
    *GATED,
    *(name for name, _ in row_arguments("new", hot=False)),
    "user_profiles",
    *(name for _, names in OF_GATES for name in names),
    "label_events",
)
WHOLE_ARGUMENTS = (
    *_USERS_AND_ROWS,
    "fresh",
    *CHANGE_ARGUMENTS,
    *(f"{which}_{table.name}" for table in _ITEMS for which in ("no", "new")),
    *UNSEEN,
    *("new_viewers", "deltas", "recounts", "owed_kinds", "owed_keys"),
    *_PROGRESS,
    *("uris", "new_uris", *_LOWEST, "dids", "crowd"),
    *("posts", "like_posts", "like_users", "gates_of", "services_of"),
    *("with_contexts", "with_gates"),
    *COUNTED,
)
PUT_WHOLE = f"CALL fastworker.put_whole_9({_named(*WHOLE_ARGUMENTS)}, is_late => NULL, note => NULL)"
# SQLSTATE of a call that wrote nothing: the rows are not as it was told, or one of them is not new (unique_violation)
NOT_AS_READ = ("FW001", "23505")
LOOK_FIRST = "FW003"  # of one that wrote nothing, because something beats a record or must not be stored
FLOOR_CAME = "FW002"  # SQLSTATE of a transaction that must begin again with its look
JOINED = {  # kind of a joined row -> the argument that takes its keys
    "context": "contexts",
    "gate": "gates",
    "root": "roots",
    "like_count": "services",
    "aggregate": "aggregates",
}
RECOMPUTE_ARGUMENTS = (*JOINED.values(), "owed_kinds", "owed_keys", "owed_times", "note", "patient", *COUNTED)
RECOMPUTE = f"SELECT fastworker.recompute_5({_named(*RECOMPUTE_ARGUMENTS)})"
RECOUNT = f"SELECT fastworker.recount_1({_named('keys', *COUNTED)})"
PAY = f"CALL fastworker.pay_2({_named(*COUNTED)}, paid => NULL)"

# Rows that join two records: recomputed after both sides have committed ------------------------------
# What `pay` has left for so long ($1, seconds), because something is in its way, and what is not for it.
OWED = (
    "SELECT kind, key, owed_at FROM fastworker.recheck WHERE not_before <= now() "
    "AND (kind = 'root' OR owed_since <= now() - make_interval(secs => $1)) ORDER BY owed_since LIMIT $2"
)
OWE = (
    "INSERT INTO fastworker.recheck (kind, key) SELECT * FROM unnest($1::text[], $2::text[]) "
    "ON CONFLICT (kind, key) DO UPDATE SET owed_at = now()"
)
NOTE_DONE = "DELETE FROM fastworker.notes WHERE id = $1"
# (how many, seconds since the oldest was owed, how many of them are put back, the reason of one of these)
DEBTS = (
    "WITH owed AS (SELECT owed_at AS since, attempts, 'counters of ' || (deltas[1]).post_uri || ': ' || error AS error FROM fastworker.debts "
    "UNION ALL SELECT owed_at, 0, NULL FROM fastworker.notes "
    "UNION ALL SELECT owed_since, attempts, kind || ' of ' || key || ': ' || error FROM fastworker.recheck) "
    "SELECT count(*)::int, coalesce(extract(epoch FROM clock_timestamp() - min(since) FILTER (WHERE attempts = 0)), 0)"
    "::float8, count(*) FILTER (WHERE attempts > 0)::int, coalesce(max(error) FILTER (WHERE attempts > 0), '') FROM owed"
)
# What flushes that were killed after their commit left for so long ($1, seconds).
NOTES_LEFT = (
    "WITH gone AS (DELETE FROM fastworker.notes WHERE owed_at <= now() - make_interval(secs => $1) "
    "RETURNING owed_at, kinds, keys) INSERT INTO fastworker.recheck (kind, key, owed_at, owed_since) "
    "SELECT u.kind, u.key, max(owed_at), min(owed_at) FROM gone, unnest(kinds, keys) AS u (kind, key) GROUP BY u.kind, u.key "
    'ORDER BY u.kind COLLATE "C", u.key COLLATE "C" ON CONFLICT (kind, key) DO UPDATE SET owed_at = now()'
)
OWE_ROOTS = (
    "INSERT INTO fastworker.recheck (kind, key) SELECT 'root', unnest($1::text[]) "
    "ON CONFLICT (kind, key) DO UPDATE SET owed_at = now()"
)
# One that cannot be recomputed: ever more rarely, from half a minute to a day
OWED_LATER = (
    "UPDATE fastworker.recheck SET attempts = attempts + 1, error = $3, "
    "not_before = now() + least(interval '1 day', interval '30 seconds' * 2.0 ^ least(attempts, 12)) "
    "WHERE kind = $1 AND key = $2"
)
# Those of $1 roots that have more than $2 replies; and the replies of one, listed once and fetched in pieces: no index
# of the contract has them in an order to go on from.
CROWDED = (
    "SELECT u.uri FROM unnest($1::varchar[]) AS u (uri) WHERE "
    "(SELECT count(*) FROM (SELECT FROM public.posts AS p WHERE p.root_uri = u.uri LIMIT $2 + 1) AS few) > $2"
)
_CROWD_LOCK = 0x66776377  # "fwcw": the advisory lock of who recomputes a large thread
CROWD_LOCK = f"SELECT pg_try_advisory_lock({_CROWD_LOCK}, 1)"
CROWD_UNLOCK = f"SELECT pg_advisory_unlock({_CROWD_LOCK}, 1)"
# The one that is owed longest, of more than $1 replies, while nobody has the lock
NEXT_CROWD = (
    "SELECT r.key, r.owed_at FROM fastworker.recheck AS r WHERE r.kind = 'root' AND r.not_before <= now() AND "
    "(SELECT count(*) FROM (SELECT FROM public.posts AS p WHERE p.root_uri = r.key LIMIT $1 + 1) AS few) > $1 "
    f"AND NOT EXISTS (SELECT FROM pg_locks AS l WHERE l.locktype = 'advisory' AND l.classid = {_CROWD_LOCK} "
    "AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND l.granted) "
    "ORDER BY r.owed_since LIMIT 1"
)
CROWD = "DECLARE crowd CURSOR WITH HOLD FOR SELECT uri FROM public.posts WHERE root_uri = '{root}' AND uri <> root_uri"
CROWD_PIECE = "FETCH {count} FROM crowd"
AGGREGATES_DROP = (
    "DELETE FROM public.post_aggregations AS a WHERE a.post_uri = ANY($1::varchar[]) "
    "AND greatest(a.like_count, a.repost_count, a.reply_count, a.bookmark_count, a.quote_count) <= 0 "
    "AND NOT EXISTS (SELECT 1 FROM public.posts AS p WHERE p.uri = a.post_uri)"
)

MARK_READ = "UPDATE public.notifications SET is_read = true WHERE uri = ANY($1::varchar[]) AND NOT is_read"


# Deleted accounts ---------------------------------------------------------------------------------
def _older(rev: str, seq: str) -> str:
    """Whether the deletion beats a stored version. The same rule as `table.batch.is_gone`."""
    return f'CASE WHEN $2::text IS NULL THEN {seq} IS NULL OR {seq} < $3::bigint ELSE {rev} IS NULL OR {rev} COLLATE "C" < $2 END'


# $1: how long after a purge that found nothing it is done once more
PURGE_NEXT = (
    f"SELECT did, deleted_seq, deleted_at, {GONE} FROM fastworker.accounts WHERE purge_pending "
    "AND (purged_at IS NULL OR purged_at <= now() - $1::interval) AND purge_after <= now() ORDER BY did LIMIT 1"
)
PURGE_LATER = (
    "UPDATE fastworker.accounts SET purge_after = now() + interval '10 minutes', purge_error = $2 WHERE did = $1"
)


def _hot_of(table: str, author: str) -> str:
    return (
        f"SELECT '{table}' AS name, t.uri, {_HOT_VERSION} FROM public.{table} AS t WHERE {author} = $1 AND "
        f"{_older('t.commit_rev', _HOT_SEQ)}"
    )


_RANGE = "uri >= 'at://' || $1 || '/' AND uri < 'at://' || $1 || '0'"  # '0' follows '/' in byte order
# (table name or NULL, uri, rev, seq): $1 DID, $2 and $3 what its deletion beats (GONE), $4 how many
PURGE_PIECE = (
    " UNION ALL ".join(
        _hot_of(table, author)
        for table, author in (
            ("posts", "author_did"),
            ("likes", "user_did"),
            ("reposts", "user_did"),
            ("follows", "follower_did"),
            ("blocks", "blocker_did"),
        )
    )
    + f" UNION ALL SELECT table_name, uri, rev, seq FROM fastworker.twins WHERE {_RANGE} AND {_older('rev', 'seq')} "
    + "AND (rev IS NOT NULL OR seq IS NOT NULL OR NOT EXISTS ("
    + "SELECT 1 FROM fastworker.versions AS v WHERE v.uri = twins.uri))"
    + f" UNION ALL SELECT NULL, uri, rev, seq FROM fastworker.versions WHERE {_RANGE} "
    + f"AND NOT deleted AND {_older('rev', 'seq')} LIMIT $4"
)
PURGED = (
    # mutant: an account is purged once
    "UPDATE fastworker.accounts SET purge_pending = purged_at IS NULL, "
    "purged_at = CASE WHEN purged_at IS NULL THEN now() END "
    "WHERE did = $1 AND deleted_seq = $2 AND deleted_at IS NOT DISTINCT FROM $3"
)
