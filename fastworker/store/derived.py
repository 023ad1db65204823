"""Derived rows of staged history, each table as one statement over sets: what `table/derive.py` does row by row.

The staged rows are all new (store/bulk.py has taken out what was not), so that everything here is added: counters grow
by what is staged, rows that are there already are changed in place, the others inserted. `verify` states the law a
third time (store/audit.py) and judges both.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Fill(NamedTuple):
    """How one table is filled. `reads`: staged tables, or the primary ones of that name: they are complete by then.
    `first`: changes of rows that are there, while the table still has its indexes."""

    table: str
    feature: str | None
    insert: str
    reads: tuple[str, ...]
    first: tuple[str, ...] = ()


class Update(NamedTuple):
    """What is changed in rows that are there. `reads` as in a fill."""

    name: str
    feature: str | None
    statements: tuple[str, ...]
    reads: tuple[str, ...]


_S: Final = "fastworker.staged_"
KEYS: Final = {
    "posts": "uri, author_did, parent_uri",
    "likes": "uri, user_did, post_uri",
    "reposts": "uri, user_did, post_uri",
}
"""Columns by which large staged tables are joined and counted."""


def _did(uri: str) -> str:
    return f"split_part({uri}, '/', 3)"


def _absent(table: str, alias: str, *columns: str) -> str:
    on = " AND ".join(f"t.{column} = {alias}.{column}" for column in columns)
    return f"NOT EXISTS (SELECT FROM public.{table} AS t WHERE {on})"


_FEED_ITEMS: Final = (
    "INSERT INTO public.feed_items (uri, post_uri, originator_did, type, sort_at, cid, created_at) "
    "SELECT f.* FROM (SELECT uri, uri, author_did, 'post', created_at, cid, created_at "
    f"FROM {_S}posts UNION ALL SELECT uri, post_uri, user_did, 'repost', created_at, "
    f"coalesce(record_cid, left(uri, 255)), created_at FROM {_S}reposts) "
    "AS f (uri, post_uri, originator_did, type, sort_at, cid, created_at) "
    f"WHERE {_absent('feed_items', 'f', 'uri')}"
)
_QUOTES: Final = (
    "INSERT INTO public.quotes (uri, cid, post_uri, quoted_uri, quoted_cid, created_at) "
    f"SELECT s.* FROM {_S}quotes AS s WHERE {_absent('quotes', 's', 'uri')}"
)


def _note(table: str, recipient: str, author: str, reason: str, subject: str) -> str:
    return (
        f"SELECT uri || '#notification', {recipient}, {author}, '{reason}', {subject}, record_cid, created_at "
        f"FROM {_S}{table} WHERE {recipient} <> {author} AND length(uri) <= 499"
    )


# Those of long ago come in read: nobody wants thousands of unread ones about last year.
_NOTIFICATIONS: Final = (
    "INSERT INTO public.notifications "
    "(uri, recipient_did, author_did, reason, reason_subject, cid, created_at, is_read) "
    "SELECT n.*, n.created_at < now() AT TIME ZONE 'UTC' - interval '1 day' FROM ("
    + " UNION ALL ".join(
        (
            _note("likes", _did("post_uri"), "user_did", "like", "post_uri"),
            _note("reposts", _did("post_uri"), "user_did", "repost", "post_uri"),
            _note("follows", "following_did", "follower_did", "follow", "NULL"),
            f"SELECT uri, recipient_did, author_did, reason, reason_subject, cid, created_at FROM {_S}notifications",
        )
    )
    + ") AS n (uri, recipient_did, author_did, reason, reason_subject, cid, created_at) "
    f"WHERE {_absent('notifications', 'n', 'uri')}"
)
_VIEWS: Final = (
    "SELECT coalesce(l.post_uri, r.post_uri) AS post_uri, coalesce(l.user_did, r.user_did) AS viewer_did, "
    f"l.uri AS like_uri, r.uri AS repost_uri FROM {_S}likes AS l FULL JOIN {_S}reposts AS r "
    "ON r.user_did = l.user_did AND r.post_uri = l.post_uri"
)
_VIEWS_THERE: Final = (
    "UPDATE public.post_viewer_states AS t SET like_uri = coalesce(v.like_uri, t.like_uri), "
    f"repost_uri = coalesce(v.repost_uri, t.repost_uri), updated_at = now() FROM ({_VIEWS}) AS v "
    "WHERE t.post_uri = v.post_uri AND t.viewer_did = v.viewer_did"
)
_VIEWS_NEW: Final = (
    "INSERT INTO public.post_viewer_states (post_uri, viewer_did, like_uri, repost_uri) "
    f"SELECT v.* FROM ({_VIEWS}) AS v WHERE {_absent('post_viewer_states', 'v', 'post_uri', 'viewer_did')}"
)
_COUNTED: Final = (
    (None, "posts", "uri", "counts"),
    ("like_count", "likes", "post_uri", "counts"),
    ("repost_count", "reposts", "post_uri", "counts"),
    ("reply_count", "posts", "parent_uri", "reply_counts"),
    ("quote_count", "quotes", "quoted_uri", "quotes"),
)


def _aggregates(derive: frozenset[str]) -> Fill:
    """Of the counters that are kept. A row for every post and every subject."""
    counted = [one for one in _COUNTED if one[3] in derive]
    names = [name for name, *_ in counted if name is not None]
    keys = " UNION ALL ".join(
        f"SELECT {column}, {number} FROM {_S}{table} WHERE {column} IS NOT NULL"
        for number, (_, table, column, _) in enumerate(counted)
    )
    counts = "".join(
        f", count(*) FILTER (WHERE kind = {number})::int AS {name}"
        for number, (name, *_) in enumerate(counted)
        if name is not None
    )
    added = f"SELECT post_uri{counts} FROM ({keys}) AS k (post_uri, kind) GROUP BY post_uri"
    columns = ", ".join(["post_uri", *names])
    sets = ", ".join([*(f"{name} = t.{name} + a.{name}" for name in names), "updated_at = now()"])
    return Fill(
        "public.post_aggregations",
        "counts",
        f"INSERT INTO public.post_aggregations ({columns}) SELECT {columns} FROM ({added}) AS a "
        f"WHERE {_absent('post_aggregations', 'a', 'post_uri')}",
        tuple(sorted({table for _, table, *_ in counted})),
        (f"UPDATE public.post_aggregations AS t SET {sets} FROM ({added}) AS a WHERE t.post_uri = a.post_uri",),
    )


_CONTEXTS: Final = (
    "SELECT p.uri AS post_uri, l.uri AS root_author_like_uri FROM public.posts AS p "
    "JOIN public.posts AS r ON r.uri = p.root_uri LEFT JOIN public.likes AS l "
    f"ON l.user_did = {_did('p.root_uri')} AND l.post_uri = p.uri WHERE p.root_uri <> p.uri"
)
_CONTEXTS_THERE: Final = (
    "UPDATE public.thread_contexts AS t SET root_author_like_uri = c.root_author_like_uri, updated_at = now() "
    f"FROM ({_CONTEXTS}) AS c WHERE t.post_uri = c.post_uri "
    "AND t.root_author_like_uri IS DISTINCT FROM c.root_author_like_uri"
)
_CONTEXTS_NEW: Final = (
    "INSERT INTO public.thread_contexts (post_uri, root_author_like_uri) "
    f"SELECT c.* FROM ({_CONTEXTS}) AS c WHERE {_absent('thread_contexts', 'c', 'post_uri')}"
)
_THREAD_GATES: Final = (
    "INSERT INTO public.thread_gates (post_uri, owner_did, allow_mentions, allow_following, allow_list_members, "
    f"allow_list_uris, created_at) SELECT * FROM {_S}thread_gates ON CONFLICT (post_uri) DO UPDATE SET "
    "owner_did = excluded.owner_did, allow_mentions = excluded.allow_mentions, "
    "allow_following = excluded.allow_following, allow_list_members = excluded.allow_list_members, "
    "allow_list_uris = excluded.allow_list_uris, created_at = excluded.created_at, updated_at = now()"
)
_POST_GATES: Final = (
    "INSERT INTO public.post_gates (post_uri, embedding_rules, created_at) "
    f"SELECT * FROM {_S}post_gates ON CONFLICT (post_uri) DO UPDATE SET "
    "embedding_rules = excluded.embedding_rules, created_at = excluded.created_at"
)
_GATE_FLAGS: Final = tuple(
    f"UPDATE public.posts AS p SET has_{kind}_gate = true FROM fastworker.gates AS g "
    f"WHERE g.post_uri = p.uri AND g.kind = '{kind}' AND NOT p.has_{kind}_gate"
    for kind in ("thread", "post")
)
# A row for everybody whose records are staged or whom they name; those who do not want to be collected have none.
_PROFILE: Final = ("display_name", "description", "avatar_url", "banner_url", "profile_record", "pinned_post")
_USERS_THERE: Final = (
    f"UPDATE public.users AS t SET {', '.join(f'{c} = p.{c}' for c in _PROFILE)} "
    f"FROM {_S}profiles AS p WHERE t.did = p.did"
)
_USERS_NEW: Final = (
    f"INSERT INTO public.users (did, handle, {', '.join(_PROFILE)}) "
    f"SELECT u.did, 'handle.invalid', {', '.join(f'p.{c}' for c in _PROFILE)} FROM ("
    "SELECT did FROM fastworker.bulk_repos WHERE state = 'staged' AND records > 0 "
    f"UNION SELECT following_did FROM {_S}follows UNION SELECT blocked_did FROM {_S}blocks "
    f"UNION SELECT subject_did FROM {_S}list_items) AS u (did) LEFT JOIN {_S}profiles AS p ON p.did = u.did "
    f"WHERE {_absent('users', 'u', 'did')} AND NOT EXISTS (SELECT FROM public.user_settings AS s "
    "WHERE s.user_did = u.did AND s.data_collection_forbidden)"
)


def _like_counts(table: str, collection: str) -> str:
    return (
        f"UPDATE public.{table} AS t SET like_count = c.likes FROM (SELECT post_uri, count(*) AS likes "
        f"FROM public.likes WHERE post_uri LIKE '%/{collection}/%' GROUP BY post_uri) AS c "
        "WHERE c.post_uri = t.uri AND t.like_count <> c.likes"
    )


def _fills(derive: frozenset[str]) -> tuple[Fill, ...]:
    return (
        Fill("public.notifications", "notifications", _NOTIFICATIONS, ("likes", "reposts", "follows", "notifications")),
        Fill("public.post_viewer_states", "viewer_states", _VIEWS_NEW, ("likes", "reposts"), (_VIEWS_THERE,)),
        _aggregates(derive),
        Fill("public.feed_items", "feed_items", _FEED_ITEMS, ("posts", "reposts")),
        Fill("public.quotes", "quotes", _QUOTES, ("quotes",)),
        Fill("public.users", None, _USERS_NEW, ("follows", "blocks", "list_items", "profiles"), (_USERS_THERE,)),
        Fill("public.thread_contexts", "thread_contexts", _CONTEXTS_NEW, ("posts", "likes"), (_CONTEXTS_THERE,)),
    )


def fills(derive: frozenset[str]) -> list[Fill]:
    """Tables that are filled."""
    return [fill for fill in _fills(derive) if fill.feature is None or fill.feature in derive]


_UPDATES: Final = (
    Update("gates", None, (_THREAD_GATES, _POST_GATES), ("gates",)),
    Update("gate flags", "gate_flags", _GATE_FLAGS, ("posts", "gates")),
    Update(
        "like counts",
        "like_counts",
        (
            _like_counts("feed_generators", "app.bsky.feed.generator"),
            _like_counts("labeler_services", "app.bsky.labeler.service"),
        ),
        ("likes", "feed_generators", "labeler_services"),
    ),
)


def updates(derive: frozenset[str]) -> list[Update]:
    return [update for update in _UPDATES if update.feature is None or update.feature in derive]
