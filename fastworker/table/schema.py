"""The tables as data: what we write, in which order, and how rows are kept apart.

Nothing else lists columns. Column order here is the order of every row tuple. Columns that are
not listed (`indexed_at` of most tables, serial ids, `is_read`, ...) are left to their defaults.
Source of names and types: migrations/0001_contract.sql, the tables as the AppView makes them.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class Table(msgspec.Struct, frozen=True):
    """One table that holds records.

    `pair` names the columns that the schema keeps unique beside the key: the record with the lowest
    rkey is in the table, its twins wait in `fastworker.twins`.
    `hot` tables carry their version in `commit_seq` and `commit_rev`; the version of a record in any
    other table is in `fastworker.versions`.
    """

    name: str
    columns: tuple[str, ...]
    types: tuple[str, ...]  # PostgreSQL types of the columns of `row_type`
    key: str = "uri"
    pair: tuple[str, ...] = ()
    hot: bool = False

    @property
    def author(self) -> str | None:
        """The column of the account that wrote the record, where there is one."""
        return next((column for column in self.columns if column in _AUTHORS), None)

    def index(self, column: str) -> int:
        return self.columns.index(column)

    @property
    def qualified(self) -> str:
        return qualified(self.name)

    @property
    def row_type(self) -> str:
        """The composite type of one row of ours; statements take arrays of it (0002_fastworker.sql makes it)."""
        return f"fastworker.{self.name.rpartition('.')[2]}_row"


_AUTHORS = frozenset({"author_did", "user_did", "follower_did", "blocker_did", "creator_did"})


def qualified(name: str) -> str:
    """The name with its schema, as SQL says it whatever the search path is."""
    return name if "." in name else f"public.{name}"


def _table(name: str, columns: str, *, key: str = "uri", pair: tuple[str, ...] = (), hot: bool = False) -> Table:
    """Columns are `name:type` words; the type is varchar where it is left out."""
    words = [word.partition(":") for word in columns.split()]
    return Table(
        name=name,
        columns=tuple(w[0] for w in words),
        types=tuple(w[2] or "varchar" for w in words),
        key=key,
        pair=pair,
        hot=hot,
    )


_COMMIT = "commit_time:timestamp commit_seq commit_rev"

POSTS = _table(
    "posts",
    "uri cid author_did text:text langs:jsonb parent_uri parent_cid root_uri root_cid "
    f"embed:jsonb facets:jsonb tags:jsonb created_at:timestamp indexed_at:timestamp {_COMMIT}",
    hot=True,
)
LIKES = _table(
    "likes",
    f"uri user_did post_uri subject_cid via:jsonb created_at:timestamp {_COMMIT}",
    pair=("user_did", "post_uri"),
    hot=True,
)
REPOSTS = _table(
    "reposts",
    f"uri user_did post_uri subject_cid via:jsonb created_at:timestamp {_COMMIT}",
    pair=("user_did", "post_uri"),
    hot=True,
)
FOLLOWS = _table(
    "follows",
    f"uri follower_did following_did created_at:timestamp {_COMMIT}",
    pair=("follower_did", "following_did"),
    hot=True,
)
BLOCKS = _table(
    "blocks",
    f"uri blocker_did blocked_did created_at:timestamp {_COMMIT}",
    pair=("blocker_did", "blocked_did"),
    hot=True,
)
BOOKMARKS = _table("bookmarks", "uri user_did post_uri created_at:timestamp", pair=("user_did", "post_uri"))
LISTS = _table("lists", "uri cid creator_did name purpose description:text avatar_url:text created_at:timestamp")
LIST_ITEMS = _table("list_items", "uri cid list_uri subject_did created_at:timestamp", pair=("list_uri", "subject_did"))
LIST_BLOCKS = _table("list_blocks", "uri blocker_did list_uri created_at:timestamp", pair=("blocker_did", "list_uri"))
FEED_GENERATORS = _table(
    "feed_generators",
    "uri cid creator_did did display_name description:text avatar_url:text created_at:timestamp",
)
STARTER_PACKS = _table(
    "starter_packs",
    "uri cid creator_did name description:text list_uri feeds:jsonb created_at:timestamp",
)
LABELER_SERVICES = _table("labeler_services", "uri cid creator_did policies:jsonb created_at:timestamp")
LABELS = _table("labels", "uri src subject val neg:boolean created_at:timestamp")
VERIFICATIONS = _table(
    "verifications",
    "uri cid subject_did handle verified_at:timestamp created_at:timestamp",
    pair=("subject_did",),
)
GENERIC_RECORDS = _table("generic_records", "uri cid author_did record_type record:jsonb created_at:timestamp")
# Both gate kinds are records of ours: public.thread_gates and public.post_gates follow them. `kind` is
# `thread` or `post`; `rules` is {"allow": [...] or null, "hiddenReplies": [...]} or
# {"embeddingRules": [...], "detachedEmbeddingUris": [...]}, as lexicon JSON.
GATES = _table("fastworker.gates", "uri kind post_uri owner_did rules:jsonb created_at:timestamp")
# The profile record (`app.bsky.actor.profile/self`); the columns of public.users follow it.
PROFILES = _table(
    "fastworker.profiles",
    "uri did display_name description:text avatar_url:text banner_url:text profile_record:jsonb pinned_post:jsonb",
)

# Derived tables that follow from high traffic. The others are written by statements of their own (store/statements.py).
FEED_ITEMS = _table("feed_items", "uri post_uri originator_did type sort_at:timestamp cid created_at:timestamp")
QUOTES = _table("quotes", "uri cid post_uri quoted_uri quoted_cid created_at:timestamp")
NOTIFICATIONS = _table("notifications", "uri recipient_did author_did reason reason_subject cid created_at:timestamp")
VIEWER_STATES = _table(
    "post_viewer_states", "post_uri viewer_did like_uri repost_uri bookmarked:boolean", key="post_uri, viewer_did"
)
AGGREGATIONS = _table(
    "post_aggregations",
    "post_uri like_count:int repost_count:int reply_count:int bookmark_count:int quote_count:int",
    key="post_uri",
)
DERIVED: tuple[Table, ...] = (FEED_ITEMS, QUOTES, NOTIFICATIONS, VIEWER_STATES, AGGREGATIONS)

# The order in which every writer locks (sorted keys inside a table): deadlocks need two orders.
TABLES: tuple[Table, ...] = (
    LIKES,
    REPOSTS,
    FOLLOWS,
    BLOCKS,
    POSTS,  # whose rows other flushes wait for: they recompute what joins two records under a post's lock
    BOOKMARKS,
    LISTS,
    LIST_ITEMS,
    LIST_BLOCKS,
    FEED_GENERATORS,
    STARTER_PACKS,
    LABELER_SERVICES,
    LABELS,
    VERIFICATIONS,
    GENERIC_RECORDS,
    GATES,
    PROFILES,
)

COLLECTIONS: dict[str, Table] = {
    "app.bsky.feed.post": POSTS,
    "app.bsky.feed.like": LIKES,
    "app.bsky.feed.repost": REPOSTS,
    "app.bsky.graph.follow": FOLLOWS,
    "app.bsky.graph.block": BLOCKS,
    "app.bsky.bookmark": BOOKMARKS,
    "app.bsky.graph.list": LISTS,
    "app.bsky.graph.listitem": LIST_ITEMS,
    "app.bsky.graph.listblock": LIST_BLOCKS,
    "app.bsky.feed.generator": FEED_GENERATORS,
    "app.bsky.graph.starterpack": STARTER_PACKS,
    "app.bsky.labeler.service": LABELER_SERVICES,
    "com.atproto.label.label": LABELS,
    "app.bsky.graph.verification": VERIFICATIONS,
    "app.bsky.feed.threadgate": GATES,
    "app.bsky.feed.postgate": GATES,
    "app.bsky.actor.profile": PROFILES,
}
"""Every other collection goes to `generic_records`."""


def twin_order(table: Table, uri: str, rkey: str, trusted: Mapping[str, int]) -> tuple[int, str, str]:
    """Of the live records of one unique pair, the least is in the table: those of trusted verifiers first (`trusted`:
    their DIDs and places), then the lowest rkey, then URI."""
    # mutant: trusted verifier ignored
    rank = trusted.get(uri.split("/", 3)[2], len(trusted)) if table is VERIFICATIONS else 0
    return rank, rkey, uri


def collection_table(uri: str) -> Table:
    """The table of a record URI's collection."""
    return COLLECTIONS.get(uri.split("/")[3], GENERIC_RECORDS)
