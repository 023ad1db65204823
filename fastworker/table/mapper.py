"""Ops to rows: one function per collection turns a record into the row of its table (state law, section 3).

Pure and hot. What the rows promise: they fit their columns (types, lengths, NOT NULL, characters), so that PostgreSQL
refuses none of them for its data. What a bad member costs:

- one that says what the record is about (a like's subject, a list's name) drops the record if it is missing or of the
  wrong type (`bad_record`); any other becomes null, empty or its default. A post needs no text: many are images;
- an identifier that exceeds its column drops the record (`too_long`): a cut identifier names something else. Names are
  cut, at a character; a CID of another record is left out, its URI says enough.

DIDs and URIs are matched, never mended; every other text is cleaned of what PostgreSQL cannot hold.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

import msgspec

from fastworker.errors import InvalidEvent, Reason
from fastworker.event import Commit, Drop, Op, Record
from fastworker.event.record import clean_text, json_text, link_text, load_record
from fastworker.table import schema
from fastworker.table.batch import Change, Mapped, Row
from fastworker.table.dates import date_or, entry_moment, latest_date, parse_date

# Lengths of the contract's columns, in characters as PostgreSQL counts them (0001_contract.sql).
URI_MAX = 512
DID_MAX = 255
NAME_MAX = 255
CID_MAX = 255
NSID_MAX = 255
LABEL_VALUE_MAX = 128
PURPOSE_MAX = 64
_DETAIL_MAX = 200

_DID = r"did:[a-z]+:[a-zA-Z0-9._:%-]*[a-zA-Z0-9._-]"
_is_did = re.compile(_DID).fullmatch
# A reference to a record. Its authority is a DID, also where the lexicon allows a handle: a handle moves, so that
# nobody could tell whose record was meant, whom to notify, or who owns the list.
_is_uri = re.compile(rf"at://({_DID})(?:/[!-~]*)?").fullmatch


class _Origin(msgspec.Struct, frozen=True, gc=False):
    """Where a record comes from: what rows need beside it."""

    uri: str
    repo: str
    op: Op
    cid: str
    created_at: datetime
    latest: datetime  # the end of what its dates may say


def map_commit(commit: Commit, entry_ms: int) -> Mapped:
    """What one commit becomes. `entry_ms`: the milliseconds of its stream id, the time of a commit that has none.

    Never raises for what the network sent: an op that cannot be stored is a Drop, its siblings live.
    """
    repo = commit.repo
    drops = list(commit.drops)
    if len(repo) > DID_MAX:
        drops.extend([Drop(Reason.TOO_LONG, op.collection, "repo") for op in commit.ops])
        return Mapped([], [], drops)
    commit_time = parse_date(commit.time) if commit.time is not None else None
    happened = commit_time or entry_moment(entry_ms)
    latest = latest_date(happened)
    rev, seq = commit.rev, commit.seq
    stamp = (commit_time, None if seq is None else str(seq), rev)
    changes: list[Change] = []
    dids = [repo]
    for index, op in enumerate(commit.ops):
        collection, rkey, cid = op.collection, op.rkey, op.cid or ""
        uri = f"at://{repo}/{collection}/{rkey}"
        table, to_row, date_member, subject = _MAPPERS.get(collection, _GENERIC)
        if len(uri) > URI_MAX or len(collection) > NSID_MAX:
            drops.append(Drop(Reason.TOO_LONG, collection, "uri"))
            continue
        if op.action == "delete":
            changes.append(Change(table, uri, repo, rkey, rev, seq, index, None, None))
            continue
        if len(cid) > CID_MAX:
            drops.append(Drop(Reason.TOO_LONG, collection, "cid"))
            continue
        try:
            record = load_record(op)
            if record.get("$type", collection) != collection:
                drops.append(Drop(Reason.TYPE_MISMATCH, collection, "$type"))
                continue
            created_at = date_or(record.get(date_member), happened, latest)
            row = to_row(record, _Origin(uri, repo, op, cid, created_at, latest))
        except InvalidEvent as invalid:
            drops.append(Drop(invalid.reason, collection, invalid.detail[:_DETAIL_MAX]))
            continue
        if table.hot:
            row += stamp
        if subject is not None:
            dids.append(row[subject])
        changes.append(Change(table, uri, repo, rkey, rev, seq, index, op.cid, row))
    return Mapped(changes, dids, drops, commit.relay)


# Members


def _bad(member: str) -> InvalidEvent:
    return InvalidEvent(Reason.BAD_RECORD, member)


def _text(value: Any) -> str | None:
    return clean_text(value) if type(value) is str else None


def _name(value: Any) -> str | None:
    """A varchar(255) for people to read."""
    return clean_text(value)[:NAME_MAX] if type(value) is str else None


def _required(value: Any, member: str) -> str:
    if type(value) is not str:
        raise _bad(member)
    return clean_text(value)


def _fitting(identifier: str, length_max: int, member: str) -> str:
    if len(identifier) > length_max:
        raise InvalidEvent(Reason.TOO_LONG, member)
    return identifier


def _required_did(value: Any, member: str) -> str:
    if type(value) is not str or _is_did(value) is None:
        raise _bad(member)
    return _fitting(value, DID_MAX, member)


def _uri_or_none(value: Any, member: str) -> str | None:
    if type(value) is not str or (found := _is_uri(value)) is None:
        return None
    uri: str = value
    if len(uri) > DID_MAX:  # a shorter one fits, and so does its DID
        _fitting(uri, URI_MAX, member)
        _fitting(found[1], DID_MAX, member)
    return uri


def _required_uri(value: Any, member: str) -> str:
    uri = _uri_or_none(value, member)
    if uri is None:
        raise _bad(member)
    return uri


def _cid_or_none(value: Any) -> str | None:
    return clean_text(value) if type(value) is str and len(value) <= CID_MAX else None


def _strong_ref(value: Any, member: str) -> tuple[str | None, str | None]:
    """URI and CID of a reference to a record; the CID may be missing, without the URI there is nothing."""
    uri = _uri_or_none(value.get("uri"), member) if type(value) is dict else None
    return (None, None) if uri is None else (uri, _cid_or_none(value.get("cid")))


def _json_object(value: Any, op: Op) -> str | None:
    return json_text(value, op) if type(value) is dict else None


def _json_array(value: Any, op: Op) -> str | None:
    return json_text(value, op) if type(value) is list else None


def _blob_cid(value: Any, op: Op) -> str | None:
    """The CID of a blob in any of its forms: typed blob, old `{"cid", "mimeType"}`, bare text."""
    if type(value) is dict:
        ref = value.get("ref")
        value = value.get("cid") if ref is None else link_text(ref, op)
    return (clean_text(value) or None) if type(value) is str else None


# Embeds: what an API server would trip over is taken out.


def _embed(value: Any, op: Op) -> Record | None:
    """The embed without media that name no blob; the very same object where there is nothing to mend."""
    if type(value) is not dict or value.get("$type") != "app.bsky.embed.recordWithMedia":
        return _media(value, op)
    embed: Record = value
    media = _media(embed.get("media"), op)
    if media is not None:
        return embed if media is embed["media"] else {**embed, "media": media}
    # Without its media it is a plain quote, and without that nothing.
    record = embed.get("record")
    quoted = record.get("record") if type(record) is dict else None
    return {"$type": "app.bsky.embed.record", "record": quoted} if type(quoted) is dict else None


def _media(value: Any, op: Op) -> Record | None:
    if type(value) is not dict:
        return None
    media: Record = value
    kind = media.get("$type")
    if kind == "app.bsky.embed.images":
        images = media.get("images")
        kept = [image for image in images if _has_blob(image, "image", op)] if type(images) is list else []
        if not kept:
            return None
        return media if len(kept) == len(media["images"]) else {**media, "images": kept}
    if kind == "app.bsky.embed.external":
        external = media.get("external")
        if type(external) is dict and "thumb" in external and not _has_blob(external, "thumb", op):
            return {**media, "external": _without(external, "thumb")}
    elif kind == "app.bsky.embed.video" and "thumbnail" in media and not _has_blob(media, "thumbnail", op):
        return _without(media, "thumbnail")
    return media


def _has_blob(value: Any, member: str, op: Op) -> bool:
    return type(value) is dict and _blob_cid(value.get(member), op) is not None


def _without(record: Record, member: str) -> Record:
    return {name: value for name, value in record.items() if name != member}


# Rows, in the order of each table's columns (schema.py; the commit columns of hot tables are added by map_commit)


def _post(record: Record, origin: _Origin) -> Row:
    op, created_at = origin.op, origin.created_at
    get = record.get
    parent_uri = parent_cid = root_uri = root_cid = None
    reply = get("reply")
    if type(reply) is dict:
        parent_uri, parent_cid = _strong_ref(reply.get("parent"), "reply.parent.uri")
        root_uri, root_cid = _strong_ref(reply.get("root"), "reply.root.uri")
    return (
        origin.uri,
        origin.cid,
        origin.repo,
        _text(get("text")) or "",
        _json_array(get("langs"), op),
        parent_uri,
        parent_cid,
        root_uri,
        root_cid,
        _json_object(_embed(get("embed"), op), op),
        _json_array(get("facets"), op),
        _json_array(get("tags"), op) or "[]",
        created_at,
        created_at,  # indexed_at: timelines order by it, as the API expects
    )


def _like(record: Record, origin: _Origin) -> Row:
    """Likes and reposts."""
    subject = record.get("subject")
    if type(subject) is not dict:
        raise _bad("subject")
    return (
        origin.uri,
        origin.repo,
        _required_uri(subject.get("uri"), "subject.uri"),
        _cid_or_none(subject.get("cid")),
        _json_object(record.get("via"), origin.op),
        origin.created_at,
    )


def _bookmark(record: Record, origin: _Origin) -> Row:
    subject = record.get("subject")
    if type(subject) is not dict:
        raise _bad("subject")
    return (origin.uri, origin.repo, _required_uri(subject.get("uri"), "subject.uri"), origin.created_at)


def _follow(record: Record, origin: _Origin) -> Row:
    """Follows and blocks."""
    return (origin.uri, origin.repo, _required_did(record.get("subject"), "subject"), origin.created_at)


def _list(record: Record, origin: _Origin) -> Row:
    return (
        origin.uri,
        origin.cid,
        origin.repo,
        _required(record.get("name"), "name")[:NAME_MAX],
        _fitting(_required(record.get("purpose"), "purpose"), PURPOSE_MAX, "purpose"),
        _text(record.get("description")),
        _blob_cid(record.get("avatar"), origin.op),
        origin.created_at,
    )


def _list_item(record: Record, origin: _Origin) -> Row:
    list_uri = _required_uri(record.get("list"), "list")
    if list_uri.split("/", 3)[2] != origin.repo:
        # Anyone can name anyone's list; only its owner puts people on it.
        raise InvalidEvent(Reason.NOT_OWNER, "list")
    return (origin.uri, origin.cid, list_uri, _required_did(record.get("subject"), "subject"), origin.created_at)


def _list_block(record: Record, origin: _Origin) -> Row:
    return (origin.uri, origin.repo, _required_uri(record.get("subject"), "subject"), origin.created_at)


def _feed_generator(record: Record, origin: _Origin) -> Row:
    return (
        origin.uri,
        origin.cid,
        origin.repo,
        _required_did(record.get("did"), "did"),
        _required(record.get("displayName"), "displayName")[:NAME_MAX],
        _text(record.get("description")),
        _blob_cid(record.get("avatar"), origin.op),
        origin.created_at,
    )


def _starter_pack(record: Record, origin: _Origin) -> Row:
    feeds = record.get("feeds")
    uris = [feed.get("uri") for feed in feeds if type(feed) is dict] if type(feeds) is list else []
    return (
        origin.uri,
        origin.cid,
        origin.repo,
        _required(record.get("name"), "name")[:NAME_MAX],
        _text(record.get("description")),
        _uri_or_none(record.get("list"), "list"),
        json_text([uri for uri in uris if type(uri) is str], origin.op),
        origin.created_at,
    )


def _labeler(record: Record, origin: _Origin) -> Row:
    policies = _json_object(record.get("policies"), origin.op) or '{"labelValues":[],"labelValueDefinitions":[]}'
    return (origin.uri, origin.cid, origin.repo, policies, origin.created_at)


def _label(record: Record, origin: _Origin) -> Row:
    source = record.get("src")
    subject = _text(record.get("uri")) or _text(record.get("did"))  # a record or an account
    if not subject:
        raise _bad("uri")
    return (
        origin.uri,
        _required_did(source, "src") if type(source) is str and _is_did(source) else origin.repo,
        _fitting(subject, URI_MAX, "uri"),
        _fitting(_required(record.get("val"), "val"), LABEL_VALUE_MAX, "val"),
        record.get("neg") is True,
        origin.created_at,
    )


def _verification(record: Record, origin: _Origin) -> Row:
    return (
        origin.uri,
        origin.cid,
        _required_did(record.get("subject"), "subject"),
        _required(record.get("handle"), "handle").lower()[:NAME_MAX],
        date_or(record.get("verifiedAt"), origin.created_at, origin.latest),  # in no lexicon, but some write it
        origin.created_at,
    )


def _generic(record: Record, origin: _Origin) -> Row:
    return (origin.uri, origin.cid, origin.repo, origin.op.collection, json_text(record, origin.op), origin.created_at)


def _thread_gate(record: Record, origin: _Origin) -> Row:
    allow, hidden = record.get("allow"), record.get("hiddenReplies")
    rules = {
        "allow": allow if type(allow) is list else None,  # everyone may reply; [] is nobody
        "hiddenReplies": hidden if type(hidden) is list else [],
    }
    return _gate("thread", rules, record, origin)


def _post_gate(record: Record, origin: _Origin) -> Row:
    embedding, detached = record.get("embeddingRules"), record.get("detachedEmbeddingUris")
    rules = {
        "embeddingRules": embedding if type(embedding) is list else [],
        "detachedEmbeddingUris": detached if type(detached) is list else [],
    }
    return _gate("post", rules, record, origin)


def _gate(kind: str, rules: Record, record: Record, origin: _Origin) -> Row:
    """A gate rules over the post of its own repository that has its rkey, and may not say otherwise."""
    post_uri = f"at://{origin.repo}/app.bsky.feed.post/{origin.op.rkey}"
    if record.get("post", post_uri) != post_uri:
        raise InvalidEvent(Reason.GATE_MISMATCH, "post")
    return (origin.uri, kind, post_uri, origin.repo, json_text(rules, origin.op), origin.created_at)


def _profile(record: Record, origin: _Origin) -> Row:
    op = origin.op
    if op.rkey != "self":
        raise InvalidEvent(Reason.BAD_PATH, "a profile's rkey is self")
    pinned_uri, pinned_cid = _strong_ref(record.get("pinnedPost"), "pinnedPost.uri")
    return (
        origin.uri,
        origin.repo,
        _name(record.get("displayName")),
        _text(record.get("description")),
        _blob_cid(record.get("avatar"), op),
        _blob_cid(record.get("banner"), op),
        json_text(record, op),
        None if pinned_uri is None else json_text({"uri": pinned_uri, "cid": pinned_cid}, op),
    )


_ToRow = Callable[[Record, _Origin], Row]
# Table, row function, the member with the record's date, the row's position of a DID that becomes a user.
_Mapper = tuple[schema.Table, _ToRow, str, int | None]

_ROWS: dict[str, tuple[_ToRow, str | None]] = {  # the column of a DID that becomes a user
    "app.bsky.feed.post": (_post, None),
    "app.bsky.feed.like": (_like, None),
    "app.bsky.feed.repost": (_like, None),
    "app.bsky.graph.follow": (_follow, "following_did"),
    "app.bsky.graph.block": (_follow, "blocked_did"),
    "app.bsky.bookmark": (_bookmark, None),
    "app.bsky.graph.list": (_list, None),
    "app.bsky.graph.listitem": (_list_item, "subject_did"),
    "app.bsky.graph.listblock": (_list_block, None),
    "app.bsky.feed.generator": (_feed_generator, None),
    "app.bsky.graph.starterpack": (_starter_pack, None),
    "app.bsky.labeler.service": (_labeler, None),
    "com.atproto.label.label": (_label, None),
    "app.bsky.graph.verification": (_verification, None),
    "app.bsky.feed.threadgate": (_thread_gate, None),
    "app.bsky.feed.postgate": (_post_gate, None),
    "app.bsky.actor.profile": (_profile, None),
}


def _mapper(table: schema.Table, to_row: _ToRow, user_column: str | None) -> _Mapper:
    date_member = "cts" if table is schema.LABELS else "createdAt"
    return table, to_row, date_member, None if user_column is None else table.index(user_column)


_MAPPERS = {collection: _mapper(table, *_ROWS[collection]) for collection, table in schema.COLLECTIONS.items()}
_GENERIC = _mapper(schema.GENERIC_RECORDS, _generic, None)
