"""What the derived tables must hold, asked of PostgreSQL in sets: the reading half of `fastworker verify`.

It owns its own statement of the state law: nothing here is shared with the writer, so that an error in one is seen by
the other; an import contract in pyproject.toml keeps it so. A check compares one derived table with the primary ones
over a range of keys, one statement and so one snapshot for each range; store/repair.py mends what it finds.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import asyncpg
import msgspec
import orjson

from fastworker.event.syntax import DID
from fastworker.store.session import NO_TRANSACTION_TIMEOUT, PATH, translating
from fastworker.table.batch import Change
from fastworker.table.schema import TABLES, VERIFICATIONS, Table, qualified

Key = tuple[str, ...]
Where = Callable[..., str]
"""Key columns to the condition that they are in the range, or among the keys, that is looked at."""

# Every statement looks up keys. Plans are made for the range at hand: a generic one expects 0.5 % of the table.
_SESSION = (
    f"{NO_TRANSACTION_TIMEOUT}"
    "SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off; SET jit = off; "
    "SET max_parallel_workers_per_gather = 0; "
    "SET plan_cache_mode = force_custom_plan; SET default_transaction_read_only = on; SET TIME ZONE 'UTC'; "
    "SET statement_timeout = '300s'; SET lock_timeout = 0; SET idle_session_timeout = 0; "
    "SET idle_in_transaction_session_timeout = 0; SET transform_null_equals = off; SET array_nulls = on; "
    "SET standard_conforming_strings = on; SET DateStyle = 'ISO, MDY'; SET row_security = off; "
    "SET default_transaction_isolation = 'read committed'; " + PATH
)
CONNECT_SECONDS_MAX = 10.0
_ADOPTED = "coalesce((SELECT adopted FROM fastworker.migrations WHERE number = 1), false)"


class Drift(msgspec.Struct, frozen=True):
    """One row that is not what it must be.

    `key` is where the check found it, `target` the key of the row. `problem`: missing, wrong, extra, forbidden (a row
    of somebody who does not want to be collected), or unowned (a gate of the predecessor, whose record we never saw).
    """

    key: Key
    target: str
    problem: str
    expected: dict[str, Any] | None
    found: dict[str, Any] | None

    @property
    def row(self) -> tuple[Key, str]:
        """Identifies the row: one target may be found under two keys."""
        return (self.key, self.target)


class Check(msgspec.Struct, frozen=True):
    """One statement over ranges of one key. `sources`: the tables that have the key, with its columns.

    `mend` is how store/repair.py mends it. `is_joined`: its rows are written in a transaction of their own, a moment
    after what they follow from.
    """

    name: str
    table: str
    feature: str | None  # of FASTWORKER_DERIVE; None: always kept
    sources: tuple[tuple[str, ...], ...]
    sql: Callable[[Where, frozenset[str]], str]
    mend: str
    is_joined: bool = False

    @property
    def width(self) -> int:
        return len(self.sources[0]) - 1


# One way to compare ------------------------------------------------------------------------------------------


def _compare(columns: str, expected: str, found: str, *, join: str = "FULL", width: int = 1, unless: str = "") -> str:
    """Rows of two queries by `target`, where any of the columns differs. Both have k1 (k2), target and the columns."""
    names = columns.split()
    keys = [f"k{n}" for n in range(1, width + 1)]
    both = join == "FULL"

    def packed(side: str) -> str:
        members = ", ".join(f"'{name}', {side}.{name}" for name in names)
        return f"CASE WHEN {side}.target IS NOT NULL THEN jsonb_build_object({members}) END"

    def record(side: str) -> str:
        return f"ROW({', '.join(_told(f'{side}.{name}') for name in ['target', *names])})"

    selected = ", ".join(f"coalesce(e.{key}, f.{key})" if both else f"e.{key}" for key in keys)
    return (
        f"SELECT {selected}, {'coalesce(e.target, f.target)' if both else 'e.target'}, "
        "CASE WHEN e.target IS NULL THEN 'extra' WHEN f.target IS NULL THEN 'missing' ELSE 'wrong' END, "
        f"{packed('e')}, {packed('f')} FROM ({expected}) AS e {join} JOIN ({found}) AS f ON e.target = f.target "
        f"WHERE {record('e')} IS DISTINCT FROM {record('f')} {unless}"
    )


def _told(column: str) -> str:
    """Dates that only PostgreSQL can hold are as good as the nearest that a writer can."""
    if column.endswith((".created_at", ".sort_at")):
        return f"greatest(least({column}, '9999-12-31 23:59:59.999999'), '0001-01-01')"
    return column


def _did(uri: str) -> str:
    """In the collation of the contract's columns, whose indexes could not be looked into with another one."""
    return f"split_part({uri} COLLATE \"default\", '/', 3)"


def _elements(value: str) -> str:
    """The elements of a JSON array; none of anything else."""
    return f"jsonb_array_elements(CASE jsonb_typeof({value}) WHEN 'array' THEN {value} ELSE '[]' END) WITH ORDINALITY"


def _string(value: str, member: str) -> str:
    return f"CASE WHEN jsonb_typeof({value}->'{member}') = 'string' THEN {value}->>'{member}' END"


_FEATURES = "f.facet->'features'"
# Of a posts row p: the post that it quotes, the DIDs that it mentions, the notifications that it causes.
_QUOTE = (
    "(SELECT s.quoted_uri, CASE WHEN s.quoted_cid ~ '^[a-zA-Z0-9+=]+$' AND length(s.quoted_cid) <= 255 "
    "THEN s.quoted_cid END AS quoted_cid FROM ("
    f"SELECT {_string('r.ref', 'uri')} AS quoted_uri, {_string('r.ref', 'cid')} AS quoted_cid FROM ("
    "SELECT CASE p.embed->>'$type' WHEN 'app.bsky.embed.record' THEN p.embed->'record' "
    "WHEN 'app.bsky.embed.recordWithMedia' THEN p.embed->'record'->'record' END AS ref) AS r) AS s "
    f"WHERE s.quoted_uri ~ '^at://{DID}/app\\.bsky\\.feed\\.post/[!-.0-~]+$' AND length(s.quoted_uri) <= 512 "
    f"AND length({_did('s.quoted_uri')}) <= 255)"
)
_MENTIONS = (
    "(SELECT m.did FROM ("
    f"SELECT {_string('t.feature', 'did')} AS did, f.i, t.j "
    f"FROM {_elements('p.facets')} AS f (facet, i), {_elements(_FEATURES)} AS t (feature, j) "
    "WHERE t.feature->>'$type' = 'app.bsky.richtext.facet#mention') AS m "
    f"WHERE m.did ~ '^{DID}$' AND length(m.did) <= 255 GROUP BY m.did ORDER BY min(ARRAY[m.i, m.j]) LIMIT 100)"
)
_POST_NOTES = (
    "(SELECT n.* FROM ("
    f"SELECT p.uri || '#notification/reply' AS uri, {_did('p.parent_uri')} AS recipient_did, 'reply' AS reason, "
    "p.parent_uri::text AS reason_subject WHERE p.parent_uri IS NOT NULL UNION ALL "
    f"SELECT p.uri || '#notification/quote', {_did('q.quoted_uri')}, 'quote', q.quoted_uri FROM {_QUOTE} AS q "
    "UNION ALL SELECT p.uri || '#notification/mention/' || m.did, m.did, 'mention', p.uri "
    f"FROM {_MENTIONS} AS m) AS n WHERE n.recipient_did <> p.author_did AND length(n.uri) <= 512)"
)


# What must not be there at all -------------------------------------------------------------------------------


def _forbidden(table: str) -> Check:
    def sql(where: Where, _: frozenset[str]) -> str:
        return (
            "SELECT r.uri, r.uri, 'forbidden', NULL::jsonb, jsonb_build_object('did', r.did) FROM ("
            f"SELECT uri, {_did('uri')} AS did FROM {qualified(table)} WHERE {where('uri')}) AS r "
            "WHERE EXISTS (SELECT 1 FROM public.user_settings AS s WHERE s.user_did = r.did "
            "AND s.data_collection_forbidden)"
        )

    return Check(f"forbidden.{table.rpartition('.')[2]}", table, None, ((table, "uri"),), sql, "remove")


def _rank(table: Table, uri: str) -> str:
    """The place of a record's account among the trusted verifiers, which `open_audit` tells the session."""
    if table is not VERIFICATIONS:
        return "0"
    trusted = "string_to_array(current_setting('fastworker.trusted_verifiers'), ',')"
    return f"coalesce(array_position({trusted}, {_did(uri)}), 2147483647)"


def _twins(where: Where, _: frozenset[str]) -> str:
    """Twins that wait although the table holds no row of their pair, or one that comes after them."""

    def of(table: Table) -> str:
        # In the collation of the contract's columns, whose index could not be looked into with that of ours. As a
        # range: of equal columns PostgreSQL may look up one alone, and a post may have a million likes.
        pair = 't.pair COLLATE "default"'
        held = _row([f"w.{column}" for column in table.pair])
        waits = _row([f"split_part({pair}, E'\\n', {number})" for number in range(1, len(table.pair) + 1)])
        on = f"{held} >= {waits} AND {held} <= {waits}"
        return (
            f"SELECT t.uri, t.pair, w.uri AS holder, t.rkey, {_rank(table, 'w.uri')} AS holds, "
            f"{_rank(table, 't.uri')} AS waits FROM fastworker.twins AS t "
            f"LEFT JOIN {qualified(table.name)} AS w ON {on} WHERE t.table_name = '{table.name}' AND {where('t.uri')}"
        )

    rows = " UNION ALL ".join(of(table) for table in TABLES if table.pair)
    return (
        "SELECT uri, uri, CASE WHEN holder IS NULL THEN 'missing' ELSE 'wrong' END, jsonb_build_object('pair', pair), "
        f"CASE WHEN holder IS NOT NULL THEN jsonb_build_object('holder', holder) END FROM ({rows}) AS t "
        "WHERE holder IS NULL OR "
        '(holds, split_part(holder, \'/\', 5) COLLATE "C", holder COLLATE "C") >= (waits, rkey, uri)'
    )


# Users -------------------------------------------------------------------------------------------------------


def _users(table: str, key: str, *dids: str) -> Check:
    """Users rows of everyone whom a table's rows name: those of `dids`."""

    def sql(where: Where, _: frozenset[str]) -> str:
        rows = " UNION ALL ".join(
            f"SELECT {key} AS key, {did} AS did FROM {qualified(table)} WHERE {where(key)}" for did in dids
        )
        return (
            f"SELECT min(r.key), r.did, 'missing', jsonb_build_object('did', r.did), NULL::jsonb FROM ({rows}) AS r "
            "WHERE r.did LIKE 'did:%' AND length(r.did) <= 255 "
            "AND NOT EXISTS (SELECT 1 FROM public.users AS u WHERE u.did = r.did) "
            "AND NOT EXISTS (SELECT 1 FROM public.user_settings AS s WHERE s.user_did = r.did "
            "AND s.data_collection_forbidden) GROUP BY r.did"
        )

    return Check(f"users.{table.rpartition('.')[2]}", "users", None, ((table, key),), sql, "users")


_NAMED = {"follows": "following_did", "blocks": "blocked_did", "list_items": "subject_did"}
_PROFILE = "display_name description avatar_url banner_url profile_record pinned_post"


def _profiles(where: Where, _: frozenset[str]) -> str:
    columns = ", ".join(_PROFILE.split())
    return _compare(
        _PROFILE,
        f"SELECT uri AS k1, did AS target, {columns} FROM fastworker.profiles WHERE {where('uri')}",
        f"SELECT did AS target, {columns} FROM public.users",
        join="LEFT",
    )


def _handles(where: Where, _: frozenset[str]) -> str:
    """A users row whose handle is neither what its host claims nor verified, or that another one shows as well.

    A claim that was never to be verified is shown (the resolver is off), unless another one has it. What an older
    worker showed may be in capitals, and counts as verified at -infinity: with the resolver off a claim is newer.
    """
    return _compare(
        "handle",
        "SELECT i.did AS k1, i.did AS target, CASE WHEN CASE WHEN u.handle = 'handle.invalid' THEN "
        "w.handle IS NULL OR EXISTS (SELECT 1 FROM public.users AS o WHERE o.handle IN (lower(w.handle), "
        "CASE WHEN i.verified_at = '-infinity' THEN i.handle END)) "
        "ELSE coalesce(u.handle IN (i.handle, i.verified_handle), false) AND NOT EXISTS ("
        "SELECT 1 FROM public.users AS o WHERE o.handle = u.handle AND o.did <> u.did) END THEN u.handle "
        "ELSE coalesce(w.handle, 'handle.invalid') END AS handle FROM fastworker.identities AS i "
        "JOIN public.users AS u ON u.did = i.did, LATERAL (SELECT CASE WHEN i.resolve_pending "
        "OR i.resolve_after > '-infinity' OR i.handle IS NULL OR i.verified_at >= i.event_at "
        "THEN i.verified_handle ELSE i.handle END) AS w (handle) "
        f"WHERE {where('i.did')} AND coalesce(i.handle, i.verified_handle) IS NOT NULL",
        "SELECT did AS target, handle::text AS handle FROM public.users",
        join="LEFT",
    )


# What follows from one row -----------------------------------------------------------------------------------


def _label_events(where: Where, _: frozenset[str]) -> str:
    return (
        "SELECT r.uri, r.uri, CASE WHEN r.events = 0 THEN 'missing' ELSE 'extra' END, "
        "jsonb_build_object('created', 1), jsonb_build_object('created', r.events) FROM ("
        "SELECT l.uri, (SELECT count(*) FROM public.label_events AS e WHERE e.label_uri = l.uri "
        f"AND e.action = 'created') AS events FROM public.labels AS l WHERE {where('l.uri')}) AS r WHERE r.events <> 1"
    )


def _has_rule(rules: str, kind: str) -> str:
    return f"EXISTS (SELECT 1 FROM {_elements(rules)} AS r (rule, i) WHERE r.rule->>'$type' = '{kind}')"


def _gates(kind: str, columns: str, expected: str, condition: str) -> Check:
    """public.thread_gates or public.post_gates against our gates of that kind."""
    table = f"{kind}_gates"

    def sql(where: Where, _: frozenset[str]) -> str:
        compared = _compare(
            columns,
            f"SELECT g.post_uri AS k1, g.post_uri AS target, {expected} FROM fastworker.gates AS g "
            f"WHERE {where('g.post_uri')} AND g.kind = '{kind}' AND {condition}",
            f"SELECT post_uri AS k1, post_uri AS target, {', '.join(columns.split())} FROM public.{table} "
            f"WHERE {where('post_uri')}",
        )
        return (
            "SELECT d.key, d.target, CASE WHEN d.problem = 'extra' AND NOT EXISTS (SELECT 1 FROM fastworker.gates AS g "
            f"WHERE g.post_uri = d.target AND g.kind = '{kind}') THEN 'unowned' ELSE d.problem END, "
            f"d.expected, d.found FROM ({compared}) AS d (key, target, problem, expected, found)"
        )

    return Check(table, table, None, (("fastworker.gates", "post_uri"), (table, "post_uri")), sql, table)


_THREAD_RULE = "app.bsky.feed.threadgate#"
_ALLOW = "g.rules->'allow'"
_THREAD_GATES = _gates(
    "thread",
    "owner_did allow_mentions allow_following allow_list_members allow_list_uris created_at",
    f"g.owner_did, {_has_rule(_ALLOW, _THREAD_RULE + 'mentionRule')} AS allow_mentions, "
    f"{_has_rule(_ALLOW, _THREAD_RULE + 'followingRule')} AS allow_following, "
    f"{_has_rule(_ALLOW, _THREAD_RULE + 'listRule')} AS allow_list_members, "
    f"coalesce((SELECT jsonb_agg(r.rule->'list' ORDER BY r.i) FROM {_elements(_ALLOW)} AS r (rule, i) "
    f"WHERE r.rule->>'$type' = '{_THREAD_RULE}listRule' AND jsonb_typeof(r.rule->'list') = 'string'), '[]') "
    "AS allow_list_uris, g.created_at",
    f"jsonb_typeof({_ALLOW}) = 'array' AND NOT EXISTS (SELECT 1 FROM {_elements(_ALLOW)} AS r (rule, i) "
    "WHERE jsonb_typeof(r.rule->'$type') = 'string' AND r.rule->>'$type' NOT IN "
    f"('{_THREAD_RULE}mentionRule', '{_THREAD_RULE}followingRule', '{_THREAD_RULE}listRule'))",
)
_EMBEDDING, _DETACHED = "g.rules->'embeddingRules'", "g.rules->'detachedEmbeddingUris'"
_POST_GATES = _gates(
    "post",
    "embedding_rules created_at",
    f"CASE WHEN {_has_rule(_EMBEDDING, 'app.bsky.feed.postgate#disableRule')} "
    "THEN jsonb_build_object('disableRule', true) ELSE '{}' END || coalesce((SELECT jsonb_build_object("
    f"'detachedEmbeddingUris', jsonb_agg(r.uri ORDER BY r.i)) FROM {_elements(_DETACHED)} AS r (uri, i) "
    "WHERE jsonb_typeof(r.uri) = 'string' HAVING count(*) > 0), '{}') AS embedding_rules, g.created_at",
    "true",
)


def _feed_items(where: Where, _: frozenset[str]) -> str:
    """The CID of a repost is in no other table: that of its feed item is taken as it is."""
    return _compare(
        "post_uri originator_did type sort_at cid created_at",
        "SELECT uri AS k1, uri AS target, uri AS post_uri, author_did AS originator_did, 'post' AS type, "
        f"created_at AS sort_at, cid, created_at FROM public.posts WHERE {where('uri')} UNION ALL "
        "SELECT uri, uri, post_uri, user_did, 'repost', created_at, NULL, created_at "
        f"FROM public.reposts WHERE {where('uri')}",
        "SELECT uri AS k1, uri AS target, post_uri, originator_did, type, sort_at, "
        f"CASE WHEN type <> 'repost' THEN cid END AS cid, created_at FROM public.feed_items WHERE {where('uri')}",
    )


def _quotes(where: Where, _: frozenset[str]) -> str:
    return _compare(
        "cid post_uri quoted_uri quoted_cid created_at",
        "SELECT p.uri AS k1, p.uri || '#quote' AS target, p.cid, p.uri AS post_uri, q.quoted_uri, q.quoted_cid, "
        f"p.created_at FROM public.posts AS p CROSS JOIN LATERAL {_QUOTE} AS q WHERE {where('p.uri')} "
        "AND length(p.uri || '#quote') <= 512",
        "SELECT post_uri AS k1, uri AS target, cid, post_uri, quoted_uri, quoted_cid, created_at "
        f"FROM public.quotes WHERE {where('post_uri')}",
    )


_NOTE = "recipient_did author_did reason reason_subject created_at"
_NOTES = f"SELECT uri AS target, {', '.join(_NOTE.split())} FROM public.notifications"
_REASONS = "('like', 'repost', 'follow', 'reply', 'quote', 'mention')"


def _notes(table: str, author: str, recipient: str, reason: str, subject: str) -> Check:
    """Notifications of likes, reposts and follows. Their CIDs are in no other table."""

    def sql(where: Where, _: frozenset[str]) -> str:
        return _compare(
            _NOTE,
            f"SELECT uri AS k1, uri || '#notification' AS target, {recipient} AS recipient_did, "
            f"{author} AS author_did, '{reason}' AS reason, {subject} AS reason_subject, created_at "
            f"FROM public.{table} WHERE {where('uri')} "
            f"AND {recipient} <> {author} AND length(uri || '#notification') <= 512",
            _NOTES,
            join="LEFT",
        )

    return Check(f"notifications.{table}", "notifications", "notifications", ((table, "uri"),), sql, "notifications")


def _post_notes(where: Where, _: frozenset[str]) -> str:
    return _compare(
        f"{_NOTE} cid",
        "SELECT p.uri AS k1, n.uri AS target, n.recipient_did, p.author_did, n.reason, n.reason_subject, p.created_at, "
        f"p.cid FROM public.posts AS p CROSS JOIN LATERAL {_POST_NOTES} AS n WHERE {where('p.uri')}",
        _NOTES.replace(" FROM", ", cid FROM"),
        join="LEFT",
    )


def _extra_notes(where: Where, _: frozenset[str]) -> str:
    """Notifications without a cause. Reasons that are not ours are somebody else's."""
    by_row = [("likes", "post_uri", "user_did"), ("reposts", "post_uri", "user_did")]
    causes = [
        f"NOT EXISTS (SELECT 1 FROM public.{table} AS c WHERE c.uri = n.cause AND n.uri = c.uri || '#notification' "
        f"AND {_did('c.' + subject)} <> c.{author})"
        for table, subject, author in by_row
    ]
    causes.append(
        "NOT EXISTS (SELECT 1 FROM public.follows AS c WHERE c.uri = n.cause AND n.uri = c.uri || '#notification' "
        "AND c.following_did <> c.follower_did)"
    )
    causes.append(
        f"NOT EXISTS (SELECT 1 FROM public.posts AS p CROSS JOIN LATERAL {_POST_NOTES} AS e "
        "WHERE p.uri = n.cause AND e.uri = n.uri)"
    )
    return (
        "SELECT n.uri, n.uri, 'extra', NULL::jsonb, jsonb_build_object('recipient_did', n.recipient_did, 'reason', "
        "n.reason, 'reason_subject', n.reason_subject) FROM (SELECT uri, recipient_did, reason, reason_subject, "
        f"split_part(uri, '#notification', 1) AS cause FROM public.notifications WHERE {where('uri')} "
        f"AND reason IN {_REASONS}) AS n WHERE {' AND '.join(causes)}"
    )


# What follows from several rows ------------------------------------------------------------------------------


def _viewer_states(where: Where, _: frozenset[str]) -> str:
    """Our three columns. A row with nothing of ours is another's, unless it has nothing of theirs either."""

    def of(table: str, like: str, repost: str, bookmarked: str) -> str:
        return (
            f"SELECT user_did, post_uri, {like}, {repost}, {bookmarked} FROM public.{table} "
            f"WHERE {where('user_did', 'post_uri')}"
        )

    rows = " UNION ALL ".join(
        (
            of("likes", "uri", "NULL::varchar", "false"),
            of("reposts", "NULL", "uri", "false"),
            of("bookmarks", "NULL", "NULL", "true"),
        )
    )
    return _compare(
        "like_uri repost_uri bookmarked",
        "SELECT viewer AS k1, post AS k2, post || ' ' || viewer AS target, max(like_uri) AS like_uri, "
        "max(repost_uri) AS repost_uri, bool_or(bookmarked) AS bookmarked "
        f"FROM ({rows}) AS s (viewer, post, like_uri, repost_uri, bookmarked) GROUP BY viewer, post",
        "SELECT viewer_did AS k1, post_uri AS k2, post_uri || ' ' || viewer_did AS target, like_uri, repost_uri, "
        f"bookmarked FROM public.post_viewer_states WHERE {where('viewer_did', 'post_uri')} "
        "AND (like_uri IS NOT NULL OR repost_uri IS NOT NULL OR bookmarked "
        "OR NOT (thread_muted OR reply_disabled OR embedding_disabled OR pinned))",
        width=2,
    )


_COUNTS = (
    ("like_count", "likes", "post_uri", "counts"),
    ("repost_count", "reposts", "post_uri", "counts"),
    ("bookmark_count", "bookmarks", "post_uri", "counts"),
    ("reply_count", "posts", "parent_uri", "reply_counts"),
    ("quote_count", "quotes", "quoted_uri", "quotes"),
)


def _aggregations(where: Where, derive: frozenset[str]) -> str:
    """A row for every live post and every subject. What committed flushes owe for counters is no drift.

    Counters that FASTWORKER_DERIVE leaves out belong to others: a row that has one of them set is not removed.
    """
    counted = [count for count in _COUNTS if count[3] in derive]
    names = [count[0] for count in counted]
    rows = [f"SELECT uri{', 0' * len(counted)} FROM public.posts WHERE {where('uri')}"]
    for name, table, column, _ in counted:
        counts = ", ".join("count(*)" if other == name else "0" for other in names)
        rows.append(f"SELECT {column}, {counts} FROM public.{table} WHERE {where(column)} GROUP BY {column}")
    sums = ", ".join(f"sum({name})::int AS {name}" for name in names)
    others = "".join(f" AND {name} <= 0" for name, *_ in _COUNTS if name not in names)
    ours = f"bool_and(true{others})"
    told = ", ".join(["post_uri", *(name for name, *_ in _COUNTS)])
    return _compare(
        " ".join(names),
        f"SELECT key AS k1, key AS target, {sums} FROM ({' UNION ALL '.join(rows)}) AS s (key, {', '.join(names)}) "
        "GROUP BY key",
        f"SELECT post_uri AS k1, post_uri AS target, {sums}, {ours} AS is_ours FROM ("
        f"SELECT {told} FROM public.post_aggregations WHERE {where('post_uri')} UNION ALL "
        # mutant: a debt is drift
        f"SELECT {told} FROM (SELECT d.* FROM fastworker.debts, unnest(deltas) AS d) AS d WHERE {where('post_uri')}"
        ") AS t GROUP BY post_uri",
        unless="AND NOT (e.target IS NULL AND NOT f.is_ours) AND NOT EXISTS (SELECT FROM fastworker.debts AS o "
        "WHERE coalesce(e.target, f.target) = ANY(o.recounts))",
    )


def _contexts(where: Where, _: frozenset[str]) -> str:
    return _compare(
        "root_author_like_uri",
        "SELECT p.uri AS k1, p.uri AS target, (SELECT l.uri FROM public.likes AS l "
        f"WHERE l.user_did = {_did('p.root_uri')} AND l.post_uri = p.uri) AS root_author_like_uri "
        "FROM public.posts AS p JOIN public.posts AS r ON r.uri = p.root_uri "
        f"WHERE {where('p.uri')} AND p.root_uri <> p.uri",
        "SELECT post_uri AS k1, post_uri AS target, root_author_like_uri FROM public.thread_contexts "
        f"WHERE {where('post_uri')}",
    )


def _gate_flags(where: Where, _: frozenset[str]) -> str:
    """On an adopted database a gate whose record only the predecessor saw has a row in public and none of ours."""

    def flag(kind: str) -> str:
        return (
            f"(EXISTS (SELECT 1 FROM fastworker.gates AS g WHERE g.post_uri = p.uri AND g.kind = '{kind}') "
            f"OR ({_ADOPTED} AND EXISTS (SELECT 1 FROM public.{kind}_gates AS g WHERE g.post_uri = p.uri))) "
            f"AS has_{kind}_gate"
        )

    return _compare(
        "has_thread_gate has_post_gate",
        f"SELECT p.uri AS k1, p.uri AS target, {flag('thread')}, {flag('post')} "
        f"FROM public.posts AS p WHERE {where('p.uri')}",
        "SELECT uri AS target, has_thread_gate, has_post_gate FROM public.posts",
        join="LEFT",
    )


def _like_count(table: str) -> Check:
    def sql(where: Where, _: frozenset[str]) -> str:
        return _compare(
            "like_count",
            "SELECT s.uri AS k1, s.uri AS target, (SELECT count(*) FROM public.likes AS l WHERE l.post_uri = s.uri) "
            f"AS like_count FROM public.{table} AS s WHERE {where('s.uri')}",
            f"SELECT uri AS target, like_count FROM public.{table}",
            join="LEFT",
        )

    return Check(f"{table}.like_count", table, "like_counts", ((table, "uri"),), sql, "like_count", is_joined=True)


_PAIRS = tuple((table, "user_did", "post_uri") for table in ("likes", "reposts", "bookmarks"))

# In the order in which they are mended: what others follow from comes first.
CHECKS: tuple[Check, ...] = (
    _forbidden("fastworker.twins"),  # first: a twin takes the place of the row that goes
    *(_forbidden(table.name) for table in TABLES),
    Check("twins", "fastworker.twins", None, (("fastworker.twins", "uri"),), _twins, "twins"),
    *(
        _users(table.name, "uri", _did("uri"), *([_NAMED[table.name]] if table.name in _NAMED else []))
        for table in TABLES
    ),
    _users("fastworker.twins", "uri", _did("uri")),
    _users("fastworker.accounts", "did", "did"),
    _users("fastworker.identities", "did", "did"),
    Check("users.profile", "users", None, (("fastworker.profiles", "uri"),), _profiles, "profiles"),
    Check("users.handle", "users", None, (("fastworker.identities", "did"),), _handles, "handles"),
    Check("label_events", "label_events", None, (("labels", "uri"),), _label_events, "label_events"),
    _THREAD_GATES,
    _POST_GATES,
    Check(
        "feed_items",
        "feed_items",
        "feed_items",
        (("posts", "uri"), ("reposts", "uri"), ("feed_items", "uri")),
        _feed_items,
        "feed_items",
    ),
    Check("quotes", "quotes", "quotes", (("posts", "uri"), ("quotes", "post_uri")), _quotes, "quotes"),
    _notes("likes", "user_did", _did("post_uri"), "like", "post_uri"),
    _notes("reposts", "user_did", _did("post_uri"), "repost", "post_uri"),
    _notes("follows", "follower_did", "following_did", "follow", "NULL::varchar"),
    Check("notifications.posts", "notifications", "notifications", (("posts", "uri"),), _post_notes, "notifications"),
    Check(
        "notifications.extra",
        "notifications",
        "notifications",
        (("notifications", "uri"),),
        _extra_notes,
        "notifications",
    ),
    Check(
        "post_viewer_states",
        "post_viewer_states",
        "viewer_states",
        (*_PAIRS, ("post_viewer_states", "viewer_did", "post_uri")),
        _viewer_states,
        "viewer_states",
    ),
    Check(
        "post_aggregations",
        "post_aggregations",
        "counts",
        (
            ("posts", "uri"),
            ("likes", "post_uri"),
            ("reposts", "post_uri"),
            ("bookmarks", "post_uri"),
            ("posts", "parent_uri"),
            ("quotes", "quoted_uri"),
            ("post_aggregations", "post_uri"),
        ),
        _aggregations,
        "aggregates",
        is_joined=True,  # the removal of a row
    ),
    Check(
        "thread_contexts",
        "thread_contexts",
        "thread_contexts",
        (("posts", "uri"), ("thread_contexts", "post_uri")),
        _contexts,
        "context",
        is_joined=True,
    ),
    Check("posts.gates", "posts", "gate_flags", (("posts", "uri"),), _gate_flags, "gate", is_joined=True),
    _like_count("feed_generators"),
    _like_count("labeler_services"),
)


# Asking ------------------------------------------------------------------------------------------------------


class Piece(msgspec.Struct, frozen=True):
    """A range of keys: all above `after`, up to and including `last`. `rows` of the tables that have them."""

    after: Key
    last: Key
    rows: int


class StoredRecord(msgspec.Struct, frozen=True):
    """What the database has of one record, against a change of it.

    `rev` and `seq`: the version of the row (both None: nobody of ours wrote it), `gone_rev` and `gone_seq` that of its
    tombstone. `differs`: the columns that are not what the change says.
    """

    uri: str
    is_there: bool
    rev: str | None
    seq: int | None
    differs: list[str]
    is_gone: bool
    gone_rev: str | None
    gone_seq: int | None
    is_twin: bool
    deleted_rev: str | None
    deleted_seq: int | None
    is_forbidden: bool


_TRUSTED = "SELECT set_config('fastworker.trusted_verifiers', $1, false)"


class Audit:
    """One connection that only reads."""

    def __init__(self, connection: asyncpg.Connection[Any], derive: frozenset[str]) -> None:
        self._connection = connection
        self._derive = derive
        self._adopted = False

    async def checks(self) -> list[Check]:
        """Those that mean something here: of what is derived, and about forbidden users only where there are any."""
        with translating():
            self._adopted = await self._connection.fetchval(f"SELECT {_ADOPTED}")
            has_forbidden = await self._connection.fetchval(_HAS_FORBIDDEN)
        return [
            check
            for check in CHECKS
            if (check.feature is None or check.feature in self._derive)
            and (has_forbidden or not check.name.startswith("forbidden."))
        ]

    async def size(self, check: Check) -> int:
        """About how many rows the check goes through, as PostgreSQL's statistics have it."""
        with translating():
            return int(await self._connection.fetchval(_SIZE, [qualified(source[0]) for source in check.sources]))

    async def piece(self, check: Check, after: Key, rows_max: int) -> Piece | None:
        """The next range of keys; None after the last."""
        columns = [f"k{n}" for n in range(1, check.width + 1)]
        limit = f"${check.width + 1}::int"
        sources = " UNION ALL ".join(
            f"(SELECT {', '.join(f'{c} AS {k}' for c, k in zip(source[1:], columns, strict=True))} "
            f"FROM {qualified(source[0])} WHERE {_above(source[1:])} ORDER BY {', '.join(source[1:])} LIMIT {limit})"
            for source in check.sources
        )
        keys = ", ".join(columns)
        statement = (
            f"SELECT {keys}, n FROM (SELECT {keys}, row_number() OVER (ORDER BY {keys}) AS n FROM ({sources}) AS s) "
            f"AS s WHERE n <= {limit} ORDER BY n DESC LIMIT 1"
        )
        with translating():
            row = await self._connection.fetchrow(statement, *after, rows_max)
        return Piece(after, tuple(row[: check.width]), row[check.width]) if row is not None else None

    async def look(self, check: Check, piece: Piece) -> list[Drift]:
        """What differs in one range."""
        return await self._fetch(check, check.sql(_between, self._derive), [*piece.after, *piece.last])

    async def look_again(self, check: Check, keys: Sequence[Key]) -> list[Drift]:
        """What differs at these keys."""
        return await self._fetch(check, check.sql(_among, self._derive), list(zip(*sorted(keys), strict=True)))

    async def keys_of(self, check: Check, uris: Sequence[str]) -> list[Key]:
        """The check's keys that rows of these records have."""
        keys: set[Key] = set()
        for table, *columns in check.sources:
            if table not in _RECORDS:
                continue
            chosen = ", ".join(columns)
            statement = (
                f"SELECT DISTINCT {chosen} FROM {qualified(table)} WHERE uri = ANY($1) AND ({chosen}) IS NOT NULL"
            )
            with translating():
                keys.update(tuple(row) for row in await self._connection.fetch(statement, list(uris)))
        return sorted(keys)

    async def held(self, table: Table, changes: Sequence[Change]) -> list[StoredRecord]:
        """What the database has of the records that these changes are about."""
        upserts = [change.row for change in changes if change.row is not None]
        deletes = [change.uri for change in changes if change.row is None]
        with translating():
            rows = await self._connection.fetch(_held(table), upserts) if upserts else []
            rows += await self._connection.fetch(_held(table, deletes=True), deletes) if deletes else []
        return [StoredRecord(*row) for row in rows]

    async def newest(self, table: str, dids: Sequence[str]) -> dict[tuple[str, str], int | None]:
        """By DID and relay, the seq of the newest event in `fastworker.accounts` or `fastworker.identities`.

        None for one without a seq, and for a user whose identity may not be stored; where there is any, also by "".
        """
        more, seq = {"accounts": ("account_events", "seq"), "identities": ("claims", "max(last_seq)")}[table]
        with translating():
            rows = await self._connection.fetch(
                f"SELECT did, '', NULL::bigint FROM fastworker.{table} WHERE did = ANY($1) UNION ALL "
                "SELECT user_did, '', NULL FROM public.user_settings WHERE user_did = ANY($1) "
                "AND data_collection_forbidden UNION ALL "
                f"SELECT did, relay, seq FROM fastworker.{table} WHERE did = ANY($1) AND relay IS NOT NULL UNION ALL "
                f"SELECT did, relay, {seq} FROM fastworker.{more} WHERE did = ANY($1) "
                f"{'GROUP BY did, relay' if more == 'claims' else ''}",
                list(dids),
            )
        return {(row[0], row[1]): row[2] for row in sorted(rows, key=lambda row: row[2] or 0)}

    async def _fetch(self, check: Check, statement: str, arguments: list[Any]) -> list[Drift]:
        with translating():
            rows = await self._connection.fetch(statement, *arguments)
        width = check.width
        return [
            Drift(
                key=tuple(row[:width]),
                target=row[width],
                problem="extra" if row[width + 1] == "unowned" and not self._adopted else row[width + 1],
                expected=_loads(row[width + 2]),
                found=_loads(row[width + 3]),
            )
            for row in rows
        ]


@contextlib.asynccontextmanager
async def open_audit(
    database_url: str, derive: frozenset[str], trusted_verifiers: Sequence[str] = ()
) -> AsyncIterator[Audit]:
    """Raises StoreUnavailable."""
    with translating():
        connection = await asyncpg.connect(
            database_url,
            timeout=CONNECT_SECONDS_MAX,
            command_timeout=330.0,
            server_settings={"application_name": "fastworker-verify"},
        )
    try:
        with translating():
            await connection.execute(_SESSION)
            await connection.execute(_TRUSTED, ",".join(trusted_verifiers))
        yield Audit(connection, derive)
    finally:
        connection.terminate()


_RECORDS = frozenset(table.name for table in TABLES)
_SEVERAL_RELAYS = "(SELECT count(*) FROM fastworker.relays) >= 2"


def first_tid(moment: str) -> str:
    """The lowest TID of a moment: 13 digits of base 32 that sort as text, of microseconds followed by ten zero bits.

    Moments outside [1970, 2200] count as the nearest end.
    """
    micros = f"greatest(0, least(extract(epoch FROM {moment}), {_END_S})) * 1000000"
    digit = "mod(div(t.micros, power(32::numeric, 10 - t.place)), 32)::int"
    return (
        "(SELECT string_agg(substr('234567abcdefghijklmnopqrstuvwxyz', "
        f"CASE WHEN t.place > 10 THEN 0 ELSE {digit} END + 1, 1), '' ORDER BY t.place) "
        f"FROM (SELECT floor({micros}) AS micros, place FROM generate_series(0, 12) AS s (place)) AS t)"
    )


_END_S = 7_258_118_400  # 2200-01-01
# What the deletion of an account beats: with one relay what has a lower seq; with several, whose seqs cannot be
# compared, what has a rev of before its moment.
_DELETED_BEFORE = (
    f"CASE WHEN {_SEVERAL_RELAYS} THEN {first_tid('coalesce(deleted_at, event_at)')} END, "
    f"CASE WHEN NOT {_SEVERAL_RELAYS} THEN deleted_seq END"
)


def _held(table: Table, *, deletes: bool = False) -> str:
    """The columns of `StoredRecord`, for an array of the table's rows, or of URIs."""
    differs = ", ".join(f"CASE WHEN e.{c} IS DISTINCT FROM f.{c} THEN '{c}' END" for c in table.columns)
    seq = "CASE WHEN f.commit_seq ~ '^[0-9]{1,18}$' THEN f.commit_seq::bigint END"
    version = (
        f"f.commit_rev, {seq}"
        if table.hot
        else "CASE WHEN NOT v.deleted THEN v.rev END, CASE WHEN NOT v.deleted THEN v.seq END"
    )
    source = "unnest($1::text[]) AS e (uri)" if deletes else f"unnest($1::{table.row_type}[]) AS e"
    return (
        f"SELECT e.uri, f.uri IS NOT NULL, {version}, "
        f"{'ARRAY[]::text[]' if deletes else f'array_remove(ARRAY[{differs}], NULL)'}, "
        "coalesce(v.deleted, false), CASE WHEN v.deleted THEN v.rev END, CASE WHEN v.deleted THEN v.seq END, "
        "EXISTS (SELECT 1 FROM fastworker.twins AS t WHERE t.uri = e.uri), "
        "a.deleted_rev, a.deleted_seq, "
        f"EXISTS (SELECT 1 FROM public.user_settings AS s WHERE s.user_did = {_did('e.uri')} "
        "AND s.data_collection_forbidden) "
        f"FROM {source} LEFT JOIN {qualified(table.name)} AS f ON f.uri = e.uri "
        "LEFT JOIN fastworker.versions AS v ON v.uri = e.uri "
        f"LEFT JOIN LATERAL (SELECT {_DELETED_BEFORE} FROM fastworker.accounts WHERE did = {_did('e.uri')} "
        "AND deleted_seq IS NOT NULL) AS a (deleted_rev, deleted_seq) ON true"
    )


def _loads(text: str | None) -> dict[str, Any] | None:
    return orjson.loads(text) if text is not None else None


def _row(columns: Sequence[str]) -> str:
    return columns[0] if len(columns) == 1 else f"({', '.join(columns)})"


def _parameters(first: int, count: int) -> str:
    return _row([f"${n}::varchar" for n in range(first, first + count)])


def _above(columns: Sequence[str]) -> str:
    return f"{_row(columns)} > {_parameters(1, len(columns))}"


def _between(*columns: str) -> str:
    width = len(columns)
    return f"{_above(columns)} AND {_row(columns)} <= {_parameters(width + 1, width)}"


def _among(*columns: str) -> str:
    arrays = ", ".join(f"${n}::varchar[]" for n in range(1, len(columns) + 1))
    return (
        f"{columns[0]} = ANY({arrays})" if len(columns) == 1 else f"{_row(columns)} IN (SELECT * FROM unnest({arrays}))"
    )


_HAS_FORBIDDEN = "SELECT EXISTS (SELECT 1 FROM public.user_settings WHERE data_collection_forbidden)"
_SIZE = "SELECT coalesce(sum(greatest(reltuples, 0)), 0)::bigint FROM pg_class WHERE oid = ANY($1::text[]::regclass[])"
