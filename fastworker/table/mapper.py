"""Ops to rows: one function per collection turns a record into the row of its table.

Pure and hot. What the rows promise: they fit their columns (types, lengths, NOT NULL, characters), so that PostgreSQL
refuses none of them for its data. What a bad member costs:

- one that says what the record is about (a like's subject, a list's name) drops the record if it is missing or of the
  wrong type (`bad_record`); any other becomes null, empty or its default. A post needs no text: many are images;
- an identifier that exceeds its column drops the record (`too_long`): a cut identifier names something else. Names are
  cut, at a character; a CID of another record is left out, its URI says enough;
- text beyond TEXT_BYTES_MAX is cut: what a trigger makes of it for searching must fit a tsvector.

DIDs, URIs and CIDs are matched, never mended: what is none is left out, also inside an embed, a facet or an array, and
counted once for the op (`bad_reference`). Every other text is cleaned of what PostgreSQL cannot hold.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

import msgspec

from fastworker.errors import InvalidEvent, Reason
from fastworker.event import Commit, Drop, Op, Record
from fastworker.event.record import TOO_MANY_VALUES, clean_text, json_text, link_text, load_record, too_heavy
from fastworker.event.syntax import DID, is_cid, is_reference
from fastworker.table import schema
from fastworker.table.batch import Change, Mapped, Row
from fastworker.table.chosen import is_account_left_out, is_left_out
from fastworker.table.dates import date_or, moment_of, parse_date

# Lengths of the contract's columns, in characters as PostgreSQL counts them (0001_contract.sql).
URI_MAX = 512
DID_MAX = 255
NAME_MAX = 255
CID_MAX = 255
NSID_MAX = 255
LABEL_VALUE_MAX = 128
PURPOSE_MAX = 64
TEXT_BYTES_MAX = 100_000
"""Of a post or a description (lexicons allow 3,000). A tsvector holds 1 MB and is at worst a few times its text."""
_DETAIL_MAX = 200
SELF_ONLY = frozenset(  # lexicons whose key is `literal:self`: there is one such record in a repository
    {
        "app.bsky.actor.profile",
        "app.bsky.actor.status",
        "app.bsky.labeler.service",
        "app.bsky.notification.declaration",
        "chat.bsky.actor.declaration",
    }
)

_is_did = re.compile(DID).fullmatch
# A reference to a record. Its authority is a DID, also where the lexicon allows a handle: a handle moves, so that
# nobody could tell whose record was meant, whom to notify, or who owns the list.
_is_uri = re.compile(rf"at://({DID})(?:/[!-~]*)?").fullmatch
_is_word = re.compile(r"[!-~]+").fullmatch


class _Origin(msgspec.Struct, frozen=True, gc=False):
    """Where a record comes from: what rows need beside it."""

    uri: str
    repo: str
    op: Op
    cid: str
    created_at: datetime
    happened: datetime
    lost: list[str]  # references that were left out


def map_commit(commit: Commit, entry_ms: int) -> Mapped:
    """What one commit becomes. `entry_ms`: when it was received (`event.entry.received_ms`).

    Never raises for what the network sent: an op that cannot be stored is a Drop, its siblings live.
    """
    commit_time = parse_date(commit.time) if commit.time is not None else None
    return map_at(commit, commit_time, moment_of(commit_time, entry_ms))


def map_at(commit: Commit, commit_time: datetime | None, happened: datetime) -> Mapped:
    """The same of a commit that happened then; `commit_time`: when it says so itself."""
    repo = commit.repo
    drops = list(commit.drops)
    if len(repo) > DID_MAX:
        drops.extend([Drop(Reason.TOO_LONG, op.collection, "repo") for op in commit.ops])
        return Mapped([], [], drops)
    rev, seq = commit.rev, commit.seq
    stamp = (commit_time, None if seq is None else str(seq), rev)
    changes: list[Change] = []
    # mutant: accounts are not left out
    is_stranger = is_account_left_out(repo)
    dids = [] if is_stranger else [repo]
    heavy = too_heavy(commit.ops)
    for index, op in enumerate(commit.ops):
        collection, rkey, cid = op.collection, op.rkey, op.cid or ""
        uri = f"at://{repo}/{collection}/{rkey}"
        table, to_row, date_member, subject = _MAPPERS.get(collection, _GENERIC)
        if len(uri) > URI_MAX or len(collection) > NSID_MAX:
            drops.append(Drop(Reason.TOO_LONG, collection, "uri"))
            continue
        # mutant: delete mapped to update
        if op.action == "delete":
            changes.append(Change(table, uri, repo, rkey, rev, seq, index, None, None))
            continue
        if is_stranger or is_left_out(collection) or len(cid) > CID_MAX or index in heavy:
            drops.append(Drop(Reason.FILTERED_ACCOUNT, collection) if is_stranger else _not_read(collection, cid))
            continue
        try:
            if rkey != "self" and collection in SELF_ONLY:
                drops.append(Drop(Reason.BAD_PATH, collection, "its rkey is self"))
                continue
            record = load_record(op)
            # mutant: type spoofed
            if record.get("$type", collection) != collection:
                drops.append(Drop(Reason.TYPE_MISMATCH, collection, "$type"))
                continue
            created_at = date_or(record.get(date_member), happened, happened)
            lost: list[str] = []
            row = to_row(record, _Origin(uri, repo, op, cid, created_at, happened, lost))
        except InvalidEvent as invalid:
            drops.append(Drop(invalid.reason, collection, invalid.detail[:_DETAIL_MAX]))
            continue
        if lost:
            drops.append(Drop(Reason.BAD_REFERENCE, collection, ascii(", ".join(lost[:3]))[:_DETAIL_MAX]))
        if table.hot:
            row += stamp
        if subject is not None:
            dids.append(row[subject])
        changes.append(Change(table, uri, repo, rkey, rev, seq, index, op.cid, row))
    return Mapped(changes, dids, drops, commit.relay)


def users_of(change: Change) -> list[str]:
    """The users that a row needs: whose record it is, and whom it is about. As `Mapped.dids` of it alone."""
    subject = _MAPPERS.get(change.uri.split("/")[3], _GENERIC)[3]
    return [change.repo] if subject is None or change.row is None else [change.repo, change.row[subject]]


def _not_read(collection: str, cid: str) -> Drop:
    """Why an op's record is not even looked at."""
    if is_left_out(collection):
        return Drop(Reason.FILTERED, collection)
    if len(cid) > CID_MAX:
        return Drop(Reason.TOO_LONG, collection, "cid")
    return Drop(Reason.OVERSIZED, collection, TOO_MANY_VALUES)


# Members


def _bad(member: str) -> InvalidEvent:
    return InvalidEvent(Reason.BAD_RECORD, member)


def _text(value: Any) -> str | None:
    if type(value) is not str:
        return None
    text = clean_text(value)
    if len(text) > TEXT_BYTES_MAX // 4 and len(encoded := text.encode()) > TEXT_BYTES_MAX:
        return encoded[:TEXT_BYTES_MAX].decode(errors="ignore")
    return text


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


def _uri_or_none(value: Any, member: str, lost: list[str]) -> str | None:
    # mutant: identifiers mended
    if type(value) is not str or (found := _is_uri(value)) is None:
        if _is_no_reference(value):
            lost.append(member)
        return None
    uri: str = value
    if len(uri) > DID_MAX:  # a shorter one fits, and so does its DID
        _fitting(uri, URI_MAX, member)
        _fitting(found[1], DID_MAX, member)
    return uri


def _required_uri(value: Any, member: str) -> str:
    uri = _uri_or_none(value, member, [])
    if uri is None:
        raise _bad(member)
    return uri


def _cid_or_none(value: Any, lost: list[str]) -> str | None:
    if type(value) is not str:
        return None
    if is_cid(value):
        return value if len(value) <= CID_MAX else None
    lost.append("cid")
    return None


def _strong_ref(value: Any, member: str, lost: list[str]) -> tuple[str | None, str | None]:
    """URI and CID of a reference to a record; the CID may be missing, without the URI there is nothing."""
    uri = _uri_or_none(value.get("uri"), member, lost) if type(value) is dict else None
    return (None, None) if uri is None else (uri, _cid_or_none(value.get("cid"), lost))


def _json_object(value: Any, origin: _Origin) -> str | None:
    """A link or byte string, too: from JSON they are objects, and the rows are the same from every form."""
    return json_text(value, origin.op, origin.lost) if type(value) is dict or type(value) is bytes else None


def _json_array(value: Any, origin: _Origin) -> str | None:
    return json_text(value, origin.op, origin.lost) if type(value) is list else None


def _blob_cid(value: Any, origin: _Origin) -> str | None:
    """The CID of a blob in any of its forms: typed blob, old `{"cid", "mimeType"}`, bare text."""
    if type(value) is dict:
        ref = value.get("ref")
        value = value.get("cid") if ref is None else link_text(ref, origin.op)
    if type(value) is not str or not value:
        return None
    if is_cid(value):
        return value
    origin.lost.append("blob")
    return None


def _via(value: Any, origin: _Origin) -> str | None:
    """The record through which somebody came to like or repost."""
    if type(value) is dict and _is_no_reference(value.get("uri")):
        origin.lost.append("via.uri")
        return None
    return _json_object(value, origin)


def _is_no_reference(uri: Any) -> bool:
    return type(uri) is str and not is_reference(uri)


def _references(value: Any, member: str, lost: list[str]) -> list[Any]:
    """An array without texts that are no at:// URIs."""
    items = value if type(value) is list else []
    kept = [item for item in items if not _is_no_reference(item)]
    if len(kept) < len(items):
        lost.append(member)
    return kept


# Embeds: what an API server would trip over is taken out.


def _embed(value: Any, origin: _Origin) -> Any:
    """The embed without media that name no blob and references that name no record; the very same object where there
    is nothing to mend."""
    if type(value) is not dict:
        return _media(value, origin)
    embed: Record = value
    kind = embed.get("$type")
    if kind == "app.bsky.embed.record":
        quoted = _quoted(embed.get("record"), origin.lost)
        return embed if quoted is embed.get("record") else quoted and {**embed, "record": quoted}
    if kind != "app.bsky.embed.recordWithMedia":
        return _media(embed, origin)
    media = _media(embed.get("media"), origin)
    record = embed.get("record")
    told = record.get("record") if type(record) is dict else None
    quoted = _quoted(told, origin.lost)
    if media is not None and quoted is told:
        return embed if media is embed["media"] else {**embed, "media": media}
    # Without its media it is a plain quote, and the other way round; without both it is nothing.
    if type(quoted) is not dict and type(quoted) is not bytes:
        return media
    if media is None:
        return {"$type": "app.bsky.embed.record", "record": quoted}
    return {**embed, "media": media, "record": {**embed["record"], "record": quoted}}


def _quoted(value: Any, lost: list[str]) -> Any:
    """An embedded reference: None if its URI is none, without its CID if that is none."""
    if type(value) is not dict:
        return value
    if _is_no_reference(value.get("uri")):
        lost.append("embed.record.uri")
        return None
    cid = value.get("cid")
    if type(cid) is str and not is_cid(cid):
        lost.append("embed.record.cid")
        return _without(value, "cid")
    return value


def _facets(value: Any, lost: list[str]) -> Any:
    """The facets without features that refer to nobody; the very same list where there is nothing to mend."""
    if type(value) is not list or not any(_is_lost(feature) for facet in value for feature in _features(facet)):
        return value
    lost.append("facets")
    kept = []
    for facet in value:
        features = _features(facet)
        good = [feature for feature in features if not _is_lost(feature)]
        if len(good) == len(features):
            kept.append(facet)
        elif good:
            kept.append({**facet, "features": good})
    return kept


def _features(facet: Any) -> list[Any]:
    features = facet.get("features") if type(facet) is dict else None
    return features if type(features) is list else []


def _is_lost(feature: Any) -> bool:
    if type(feature) is not dict:
        return False
    kind = feature.get("$type")
    if kind == "app.bsky.richtext.facet#mention":
        did = feature.get("did")
        return type(did) is not str or _is_did(did) is None
    return kind == "app.bsky.richtext.facet#link" and _is_mended(feature.get("uri"))


def _is_mended(uri: Any) -> bool:
    """Whether cleaning would make another URI of it. Addresses on the web may be odd, as people write them."""
    return type(uri) is str and clean_text(uri) != uri


def _media(value: Any, origin: _Origin) -> Any:
    if type(value) is not dict:
        return value if type(value) is bytes else None  # as in _json_object
    media: Record = value
    kind = media.get("$type")
    if kind == "app.bsky.embed.images":
        images = media.get("images")
        kept = [image for image in images if _has_blob(image, "image", origin)] if type(images) is list else []
        if not kept:
            return None
        return media if len(kept) == len(media["images"]) else {**media, "images": kept}
    if kind == "app.bsky.embed.external":
        external = media.get("external")
        if type(external) is dict and _is_mended(external.get("uri")):
            origin.lost.append("embed.external.uri")
            return None
        if type(external) is dict and "thumb" in external and not _has_blob(external, "thumb", origin):
            return {**media, "external": _without(external, "thumb")}
    elif kind == "app.bsky.embed.video" and "thumbnail" in media and not _has_blob(media, "thumbnail", origin):
        return _without(media, "thumbnail")
    return media


def _has_blob(value: Any, member: str, origin: _Origin) -> bool:
    return type(value) is dict and _blob_cid(value.get(member), origin) is not None


def _without(record: Record, member: str) -> Record:
    return {name: value for name, value in record.items() if name != member}


# Rows, in the order of each table's columns (schema.py; the commit columns of hot tables are added by map_commit)


def _post(record: Record, origin: _Origin) -> Row:
    created_at, lost = origin.created_at, origin.lost
    get = record.get
    parent_uri = parent_cid = root_uri = root_cid = None
    reply = get("reply")
    if type(reply) is dict:
        parent_uri, parent_cid = _strong_ref(reply.get("parent"), "reply.parent.uri", lost)
        root_uri, root_cid = _strong_ref(reply.get("root"), "reply.root.uri", lost)
    return (
        origin.uri,
        origin.cid,
        origin.repo,
        _text(get("text")) or "",
        _json_array(get("langs"), origin),
        parent_uri,
        parent_cid,
        root_uri,
        root_cid,
        _json_object(_embed(get("embed"), origin), origin),
        _json_array(_facets(get("facets"), lost), origin),
        _json_array(get("tags"), origin) or "[]",
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
        _cid_or_none(subject.get("cid"), origin.lost),
        _via(record.get("via"), origin),
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
        _blob_cid(record.get("avatar"), origin),
        origin.created_at,
    )


def _list_item(record: Record, origin: _Origin) -> Row:
    list_uri = _required_uri(record.get("list"), "list")
    # mutant: list items of others
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
        _blob_cid(record.get("avatar"), origin),
        origin.created_at,
    )


def _starter_pack(record: Record, origin: _Origin) -> Row:
    feeds = record.get("feeds")
    uris = [feed.get("uri") for feed in feeds if type(feed) is dict] if type(feeds) is list else []
    uris = [uri for uri in uris if type(uri) is str]
    return (
        origin.uri,
        origin.cid,
        origin.repo,
        _required(record.get("name"), "name")[:NAME_MAX],
        _text(record.get("description")),
        _uri_or_none(record.get("list"), "list", origin.lost),
        json_text(_references(uris, "feeds", origin.lost), origin.op),
        origin.created_at,
    )


def _labeler(record: Record, origin: _Origin) -> Row:
    policies = _json_object(record.get("policies"), origin) or '{"labelValues":[],"labelValueDefinitions":[]}'
    return (origin.uri, origin.cid, origin.repo, policies, origin.created_at)


def _label(record: Record, origin: _Origin) -> Row:
    source = record.get("src")
    is_source = type(source) is str and _is_did(source) is not None
    if type(source) is str and not is_source:
        origin.lost.append("src")
    subject = next((text for name in ("uri", "did") if type(text := record.get(name)) is str and text), "")
    if not (
        is_reference(subject)
        if subject.startswith("at:")
        else _is_did(subject)
        if subject.startswith("did:")
        else _is_word(subject)
    ):
        raise _bad("uri")
    return (
        origin.uri,
        _required_did(source, "src") if is_source else origin.repo,
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
        date_or(record.get("verifiedAt"), origin.created_at, origin.happened),  # in no lexicon, but some write it
        origin.created_at,
    )


def _generic(record: Record, origin: _Origin) -> Row:
    text = json_text(record, origin.op, origin.lost)
    return (origin.uri, origin.cid, origin.repo, origin.op.collection, text, origin.created_at)


def _thread_gate(record: Record, origin: _Origin) -> Row:
    allow, lost = record.get("allow"), origin.lost
    rules = {
        "allow": [_rule(rule, lost) for rule in allow] if type(allow) is list else None,  # everyone; [] is nobody
        "hiddenReplies": _references(record.get("hiddenReplies"), "hiddenReplies", lost),
    }
    return _gate("thread", rules, record, origin)


def _rule(rule: Any, lost: list[str]) -> Any:
    """A list rule without its list lets nobody in: it stays a rule."""
    if type(rule) is not dict or not _is_no_reference(rule.get("list")):
        return rule
    lost.append("allow.list")
    return _without(rule, "list")


def _post_gate(record: Record, origin: _Origin) -> Row:
    embedding = record.get("embeddingRules")
    rules = {
        "embeddingRules": embedding if type(embedding) is list else [],
        "detachedEmbeddingUris": _references(record.get("detachedEmbeddingUris"), "detachedEmbeddingUris", origin.lost),
    }
    return _gate("post", rules, record, origin)


def _gate(kind: str, rules: Record, record: Record, origin: _Origin) -> Row:
    """A gate rules over the post of its own repository that has its rkey, and may not say otherwise."""
    post_uri = f"at://{origin.repo}/app.bsky.feed.post/{origin.op.rkey}"
    if record.get("post", post_uri) != post_uri:
        raise InvalidEvent(Reason.GATE_MISMATCH, "post")
    return (origin.uri, kind, post_uri, origin.repo, json_text(rules, origin.op, origin.lost), origin.created_at)


def _profile(record: Record, origin: _Origin) -> Row:
    pinned_uri, pinned_cid = _strong_ref(record.get("pinnedPost"), "pinnedPost.uri", origin.lost)
    return (
        origin.uri,
        origin.repo,
        _name(record.get("displayName")),
        _text(record.get("description")),
        _blob_cid(record.get("avatar"), origin),
        _blob_cid(record.get("banner"), origin),
        json_text(record, origin.op, origin.lost),
        None if pinned_uri is None else json_text({"uri": pinned_uri, "cid": pinned_cid}, origin.op),
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


if _forgotten := schema.COLLECTIONS.keys() - _ROWS.keys():
    raise LookupError(f"no function in _ROWS for {', '.join(sorted(_forgotten))}")
_MAPPERS = {collection: _mapper(table, *_ROWS[collection]) for collection, table in schema.COLLECTIONS.items()}
_GENERIC = _mapper(schema.GENERIC_RECORDS, _generic, None)
