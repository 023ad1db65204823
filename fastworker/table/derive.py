"""What follows from rows: the derived tables as a pure function of rows added to and removed from the primary ones.

`Effects` collects what one flush changes in the derived tables. A replaced row is a removed one and an
added one: deltas cancel, keys that are removed and added again are written once. The rules are
in docs/invariants.md; nothing here knows SQL.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

import orjson

from fastworker.event.syntax import DID, is_cid
from fastworker.table import schema
from fastworker.table.batch import Change, Row
from fastworker.table.rows import BOOKMARK, FEED_ITEM, FOLLOW, GATE, LABEL, LIKE, NOTIFICATION, POST, PROFILE, REPOST

URI_MAX = 512  # varchar(512) of notifications.uri and quotes.uri
DID_MAX = 255
CID_MAX = 255
_is_did = re.compile(DID).fullmatch
_post_of = re.compile(rf"at://({DID})/app\.bsky\.feed\.post/[!-.0-~]+").fullmatch
_GATE_RULES = frozenset(f"app.bsky.feed.threadgate#{name}Rule" for name in ("mention", "following", "list"))
"""Rules that public.thread_gates has a column for."""
MENTIONS_MAX = 100  # notifications of one post; a post of 3,000 bytes has room for more facets than people

FULL = frozenset(
    {
        "counts",  # post_aggregations: likes, reposts, bookmarks
        "reply_counts",  # post_aggregations.reply_count
        "feed_items",
        "quotes",  # and post_aggregations.quote_count
        "notifications",
        "viewer_states",
        "thread_contexts",
        "gate_flags",  # posts.has_thread_gate, posts.has_post_gate
        "like_counts",  # feed_generators.like_count, labeler_services.like_count
    }
)
CORE = frozenset({"counts", "feed_items"})  # what the predecessor's Python worker wrote

LIKE_COUNT, REPOST_COUNT, REPLY_COUNT, BOOKMARK_COUNT, QUOTE_COUNT = range(5)  # positions in Effects.counts

Counts = list[int]
Viewer = list[Any]  # like_uri, repost_uri, bookmarked


class Effects:
    """What one transaction changes in the derived tables, keyed so that the last word per key wins.

    A key that is both removed and added is a row that was there and is written anew; one that is only added is new.
    """

    __slots__ = (
        "counts",
        "derive",
        "feed_added",
        "feed_removed",
        "gates_removed",
        "gates_set",
        "labels_added",
        "labels_removed",
        "notes_added",
        "notes_removed",
        "owed",
        "profiles",
        "quotes_added",
        "quotes_removed",
        "recount",
        "viewers_cleared",
        "viewers_set",
    )

    def __init__(self, derive: frozenset[str]) -> None:
        self.derive = derive
        self.counts: dict[str, Counts] = {}  # post_uri -> deltas
        self.recount: set[str] = set()  # post_uris whose deltas cannot be known
        self.feed_added: dict[str, Row] = {}
        self.feed_removed: set[str] = set()
        self.quotes_added: dict[str, Row] = {}
        self.quotes_removed: set[str] = set()
        self.notes_added: dict[str, Row] = {}
        self.notes_removed: set[str] = set()
        self.viewers_set: dict[tuple[str, str], Viewer] = {}
        self.viewers_cleared: dict[tuple[str, str], set[int]] = {}  # columns, by position in Viewer
        self.profiles: dict[str, Row | None] = {}  # did -> PROFILES row
        self.gates_set: dict[str, Row] = {}  # gate uri -> GATES row
        self.gates_removed: dict[str, str] = {}  # gate uri -> post_uri
        self.labels_added: list[str] = []
        self.labels_removed: set[str] = set()  # a label that is replaced keeps its row in label_events
        self.owed: set[tuple[str, str]] = set()  # (kind, key) to recompute after the commit

    def count(self, uri: str, which: int, delta: int) -> None:
        counts = self.counts.get(uri)
        if counts is None:
            counts = self.counts[uri] = [0, 0, 0, 0, 0]
        counts[which] += delta
        if delta < 0:
            self.owed.add(("aggregate", uri))

    def feed_item(self, row: Row) -> None:
        self.feed_added[row[FEED_ITEM.uri]] = row

    def no_feed_item(self, uri: str) -> None:
        self.feed_added.pop(uri, None)
        self.feed_removed.add(uri)

    def note(self, uri: str, row: Row) -> None:
        if len(uri) <= URI_MAX:
            self.notes_added[uri] = row

    def no_note(self, uri: str) -> None:
        self.notes_added.pop(uri, None)
        self.notes_removed.add(uri)

    def view(self, post_uri: str, viewer: str, which: int, value: object) -> None:
        key = (post_uri, viewer)
        state = self.viewers_set.get(key)
        if state is None:
            state = self.viewers_set[key] = [None, None, False]
        state[which] = value

    def no_view(self, post_uri: str, viewer: str, which: int) -> None:
        key = (post_uri, viewer)
        self.viewers_cleared.setdefault(key, set()).add(which)
        state = self.viewers_set.get(key)
        if state is not None:
            state[which] = False if which == 2 else None


def did_of(uri: str) -> str:
    """The authority of an at:// URI."""
    end = uri.find("/", 5)
    return uri[5:end] if end > 0 else uri[5:]


def _loads(text: str) -> Any:
    """Rows of other writers hold numbers (1e400) and depths that orjson refuses and PostgreSQL does not."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(text)
    return None


def quoted_post(embed: str | None) -> tuple[str, str | None] | None:
    """(uri, cid) of the post that an embed (JSON text) quotes, if it quotes one."""
    if embed is None or "app.bsky.embed.record" not in embed:
        return None
    value = _loads(embed)
    if not isinstance(value, dict):
        return None
    ref = value.get("record")
    if value.get("$type") == "app.bsky.embed.recordWithMedia" and isinstance(ref, dict):
        ref = ref.get("record")
    elif value.get("$type") != "app.bsky.embed.record":
        return None
    if not isinstance(ref, dict):
        return None
    uri, cid = ref.get("uri"), ref.get("cid")
    if not isinstance(uri, str) or len(uri) > URI_MAX or (found := _post_of(uri)) is None or len(found[1]) > DID_MAX:
        return None
    return uri, cid if isinstance(cid, str) and len(cid) <= CID_MAX and is_cid(cid) else None


def mentioned(facets: str | None) -> list[str]:
    """Distinct DIDs that facets (JSON text) mention, in their order, at most MENTIONS_MAX."""
    if facets is None or "#mention" not in facets:
        return []
    value = _loads(facets)
    found: dict[str, None] = {}
    for facet in value if isinstance(value, list) else ():
        features = facet.get("features") if isinstance(facet, dict) else None
        for feature in features if isinstance(features, list) else ():
            if isinstance(feature, dict) and feature.get("$type") == "app.bsky.richtext.facet#mention":
                did = feature.get("did")
                if isinstance(did, str) and len(did) <= DID_MAX and len(found) < MENTIONS_MAX and _is_did(did):
                    found[did] = None
    return list(found)


def _note_row(
    uri: str, recipient: str, author: str, reason: str, subject: str | None, cid: str | None, at: datetime
) -> Row:
    return (uri, recipient, author, reason, subject, cid, at)


def _post_notes(row: Row, cid: str | None) -> list[Row]:
    uri, author, parent, at = row[POST.uri], row[POST.author_did], row[POST.parent_uri], row[POST.created_at]
    notes = []
    # mutant: notifications to oneself
    if parent is not None and (to := did_of(parent)) != author:
        note = uri + "#notification/reply"
        notes.append(_note_row(note, to, author, "reply", parent, cid, at))
    quoted = quoted_post(row[POST.embed])
    if quoted is not None and (to := did_of(quoted[0])) != author:
        note = uri + "#notification/quote"
        notes.append(_note_row(note, to, author, "quote", quoted[0], cid, at))
    for did in mentioned(row[POST.facets]):
        if did != author:
            note = f"{uri}#notification/mention/{did}"
            notes.append(_note_row(note, did, author, "mention", uri, cid, at))
    return notes


def _add_post(fx: Effects, row: Row, cid: str | None) -> None:
    uri, parent = row[POST.uri], row[POST.parent_uri]
    derive = fx.derive
    if "counts" in derive:
        fx.counts.setdefault(uri, [0, 0, 0, 0, 0])
    if parent is not None and "reply_counts" in derive:
        fx.count(parent, REPLY_COUNT, 1)
    if "feed_items" in derive:
        fx.feed_item(
            (uri, uri, row[POST.author_did], "post", row[POST.created_at], row[POST.cid], row[POST.created_at])
        )
    if "quotes" in derive and (quoted := quoted_post(row[POST.embed])) is not None and len(uri) + 6 <= URI_MAX:
        quote_uri = uri + "#quote"
        fx.quotes_added[quote_uri] = (quote_uri, row[POST.cid], uri, quoted[0], quoted[1], row[POST.created_at])
        fx.count(quoted[0], QUOTE_COUNT, 1)
    if "notifications" in derive:
        for note in _post_notes(row, cid):
            fx.note(note[NOTIFICATION.uri], note)


def _remove_post(fx: Effects, row: Row) -> None:
    uri, parent = row[POST.uri], row[POST.parent_uri]
    derive = fx.derive
    fx.owed.add(("aggregate", uri))
    if parent is not None and "reply_counts" in derive:
        # mutant: no reply decrement
        fx.count(parent, REPLY_COUNT, -1)
    if "feed_items" in derive:
        fx.no_feed_item(uri)
    if "quotes" in derive and (quoted := quoted_post(row[POST.embed])) is not None and len(uri) + 6 <= URI_MAX:
        quote_uri = uri + "#quote"
        fx.quotes_added.pop(quote_uri, None)
        fx.quotes_removed.add(quote_uri)
        fx.count(quoted[0], QUOTE_COUNT, -1)
    if "notifications" in derive:
        for note in _post_notes(row, None):
            fx.no_note(note[NOTIFICATION.uri])
    if "thread_contexts" in derive:
        fx.owed.add(("context", uri))
        fx.owed.add(("root", uri))


def _add_like(fx: Effects, row: Row, cid: str | None) -> None:
    uri, user, post = row[LIKE.uri], row[LIKE.user_did], row[LIKE.post_uri]
    derive = fx.derive
    if "counts" in derive:
        fx.count(post, LIKE_COUNT, 1)
    if "viewer_states" in derive:
        fx.view(post, user, 0, uri)
    if "notifications" in derive and (to := did_of(post)) != user:
        note = uri + "#notification"
        fx.note(note, (note, to, user, "like", post, cid, row[LIKE.created_at]))


def _remove_like(fx: Effects, row: Row) -> None:
    uri, user, post = row[LIKE.uri], row[LIKE.user_did], row[LIKE.post_uri]
    derive = fx.derive
    if "counts" in derive:
        # mutant: no like decrement
        fx.count(post, LIKE_COUNT, -1)
    if "viewer_states" in derive:
        fx.no_view(post, user, 0)
    if "notifications" in derive:
        fx.no_note(uri + "#notification")
    if "thread_contexts" in derive:
        fx.owed.add(("context", post))
    if "like_counts" in derive and is_liked_service(post):
        fx.owed.add(("like_count", post))


def _add_repost(fx: Effects, row: Row, cid: str | None) -> None:
    uri, user, post = row[REPOST.uri], row[REPOST.user_did], row[REPOST.post_uri]
    derive = fx.derive
    if "counts" in derive:
        fx.count(post, REPOST_COUNT, 1)
    if "feed_items" in derive:
        fx.feed_item((uri, post, user, "repost", row[REPOST.created_at], cid or uri[:255], row[REPOST.created_at]))
    if "viewer_states" in derive:
        fx.view(post, user, 1, uri)
    if "notifications" in derive and (to := did_of(post)) != user:
        note = uri + "#notification"
        fx.note(note, (note, to, user, "repost", post, cid, row[REPOST.created_at]))


def _remove_repost(fx: Effects, row: Row) -> None:
    uri, user, post = row[REPOST.uri], row[REPOST.user_did], row[REPOST.post_uri]
    derive = fx.derive
    if "counts" in derive:
        fx.count(post, REPOST_COUNT, -1)
    if "feed_items" in derive:
        fx.no_feed_item(uri)
    if "viewer_states" in derive:
        fx.no_view(post, user, 1)
    if "notifications" in derive:
        fx.no_note(uri + "#notification")


def _add_bookmark(fx: Effects, row: Row, cid: str | None) -> None:  # noqa: ARG001 - one signature
    if "counts" in fx.derive:
        fx.count(row[BOOKMARK.post_uri], BOOKMARK_COUNT, 1)
    if "viewer_states" in fx.derive:
        fx.view(row[BOOKMARK.post_uri], row[BOOKMARK.user_did], 2, value=True)


def _remove_bookmark(fx: Effects, row: Row) -> None:
    if "counts" in fx.derive:
        fx.count(row[BOOKMARK.post_uri], BOOKMARK_COUNT, -1)
    if "viewer_states" in fx.derive:
        fx.no_view(row[BOOKMARK.post_uri], row[BOOKMARK.user_did], 2)


def _add_follow(fx: Effects, row: Row, cid: str | None) -> None:
    if "notifications" in fx.derive and row[FOLLOW.follower_did] != row[FOLLOW.following_did]:
        note = row[FOLLOW.uri] + "#notification"
        fx.note(
            note,
            (note, row[FOLLOW.following_did], row[FOLLOW.follower_did], "follow", None, cid, row[FOLLOW.created_at]),
        )


def _remove_follow(fx: Effects, row: Row) -> None:
    if "notifications" in fx.derive:
        fx.no_note(row[FOLLOW.uri] + "#notification")


def _add_profile(fx: Effects, row: Row, cid: str | None) -> None:  # noqa: ARG001 - one signature
    fx.profiles[row[PROFILE.did]] = row


def _remove_profile(fx: Effects, row: Row) -> None:
    # mutant: profile stays after its delete
    fx.profiles[row[PROFILE.did]] = None


def _add_gate(fx: Effects, row: Row, cid: str | None) -> None:  # noqa: ARG001 - one signature
    fx.gates_set[row[GATE.uri]] = row
    fx.gates_removed.pop(row[GATE.uri], None)


def _remove_gate(fx: Effects, row: Row) -> None:
    fx.gates_set.pop(row[GATE.uri], None)
    fx.gates_removed[row[GATE.uri]] = row[GATE.post_uri]
    if "gate_flags" in fx.derive:
        fx.owed.add(("gate", row[GATE.post_uri]))


def _add_label(fx: Effects, row: Row, cid: str | None) -> None:  # noqa: ARG001 - one signature
    if row[LABEL.uri] not in fx.labels_removed:
        fx.labels_added.append(row[LABEL.uri])


def _remove_label(fx: Effects, row: Row) -> None:
    fx.labels_removed.add(row[LABEL.uri])


_Add = Callable[[Effects, Row, str | None], None]
_Remove = Callable[[Effects, Row], None]

_DERIVED: dict[str, tuple[_Add, _Remove]] = {
    schema.POSTS.name: (_add_post, _remove_post),
    schema.LIKES.name: (_add_like, _remove_like),
    schema.REPOSTS.name: (_add_repost, _remove_repost),
    schema.BOOKMARKS.name: (_add_bookmark, _remove_bookmark),
    schema.FOLLOWS.name: (_add_follow, _remove_follow),
    schema.PROFILES.name: (_add_profile, _remove_profile),
    schema.GATES.name: (_add_gate, _remove_gate),
    schema.LABELS.name: (_add_label, _remove_label),
}


def add(fx: Effects, table: schema.Table, changes: Iterable[Change]) -> None:
    """The rows of these upserts are now in the table."""
    functions = _DERIVED.get(table.name)
    if functions is not None:
        follow = functions[0]
        for change in changes:
            follow(fx, change.row, change.cid)  # type: ignore[arg-type]


def added(fx: Effects, table: schema.Table, row: Row, cid: str | None) -> None:
    """A row of ours is now in the table."""
    functions = _DERIVED.get(table.name)
    if functions is not None:
        functions[0](fx, row, cid)


def removed(fx: Effects, table: schema.Table, row: Row, *, counted: bool = True) -> None:
    """A row has left the table. Not `counted`: nobody of ours versioned it, so its counters are recounted."""
    functions = _DERIVED.get(table.name)
    if functions is None:
        return
    functions[1](fx, row)
    if not counted:
        # mutant: no recount
        fx.recount.update(subjects(table, row))


def subjects(table: schema.Table, row: Row) -> list[str]:
    """The aggregate keys that a row counts for."""
    if table is schema.POSTS:
        quoted = quoted_post(row[POST.embed])
        return [uri for uri in (row[POST.parent_uri], quoted and quoted[0]) if uri is not None]
    if table in (schema.LIKES, schema.REPOSTS, schema.BOOKMARKS):
        return [row[table.index("post_uri")]]
    return []


def is_liked_service(uri: str) -> bool:
    """Whether a like's subject is a record with its own like_count column."""
    return "/app.bsky.feed.generator/" in uri or "/app.bsky.labeler.service/" in uri


def thread_gate_row(gate: Row) -> Row | None:
    """public.thread_gates row (post_uri, owner, mentions, following, list members, list uris, created_at), if any.

    No `allow` means everyone may reply: there is no row. Nor is there one for a rule without a column: three columns
    that are false would shut out those whom it lets in.
    """
    rules = orjson.loads(gate[GATE.rules])
    allow = rules.get("allow")
    if not isinstance(allow, list):
        # mutant: no allow means nobody
        return None
    kinds = {kind for rule in allow if isinstance(rule, dict) and isinstance(kind := rule.get("$type"), str)}
    if not kinds <= _GATE_RULES:
        return None
    lists = [
        rule["list"]
        for rule in allow
        if isinstance(rule, dict)
        and rule.get("$type") == "app.bsky.feed.threadgate#listRule"
        and isinstance(rule.get("list"), str)
    ]
    return (
        gate[GATE.post_uri],
        gate[GATE.owner_did],
        "app.bsky.feed.threadgate#mentionRule" in kinds,
        "app.bsky.feed.threadgate#followingRule" in kinds,
        "app.bsky.feed.threadgate#listRule" in kinds,
        orjson.dumps(lists).decode(),
        gate[GATE.created_at],
    )


def post_gate_row(gate: Row) -> Row:
    """public.post_gates row (post_uri, embedding_rules, created_at)."""
    rules = orjson.loads(gate[GATE.rules])
    embedding: dict[str, Any] = {}
    if any(
        isinstance(rule, dict) and rule.get("$type") == "app.bsky.feed.postgate#disableRule"
        for rule in rules.get("embeddingRules") or ()
    ):
        embedding["disableRule"] = True
    if detached := [uri for uri in rules.get("detachedEmbeddingUris") or () if isinstance(uri, str)]:
        embedding["detachedEmbeddingUris"] = detached
    return (gate[GATE.post_uri], orjson.dumps(embedding).decode(), gate[GATE.created_at])
